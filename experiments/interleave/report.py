"""Write docs/results/interleave.md from the files that `run.py` has written.

python experiments/interleave/report.py
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from vlduet.eval.benchmarks.scores import MetricSample, MetricValue, average, paired_difference
from vlduet.files import write_text_atomically

RESULTS = Path(__file__).parents[2] / "docs" / "results"
INTRODUCTION_FILE = Path(__file__).parent / "introduction.md"
MODELS = {"demo": "The demo's trained model", "base": "The base of nano, before training"}
"""Title of the section of each file, in the order of the page."""
TITLES = {
    "documents": ("Retrieval at different places", "documents", "place"),
    "dialogs": ("Retrieval and dialog", "dialogs", "turn"),
}
"""Heading, items and positions of each kind of searches."""
REFERENCE = "operation"
"""Method that the others are compared with."""

Results = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, and write the page."""
    parser = argparse.ArgumentParser(description="Write the page on interleaved retrieval.")
    parser.add_argument("--results", type=Path, default=RESULTS / "interleave")
    parser.add_argument("--to", type=Path, default=RESULTS / "interleave.md")
    options = parser.parse_args(arguments)
    files = {name: options.results / f"{name}.json" for name in MODELS}
    results = {
        name: json.loads(path.read_text(encoding="utf-8"))
        for name, path in files.items()
        if path.exists()
    }
    write_text_atomically(options.to, format_page(results))


def format_page(results: dict[str, Results]) -> str:
    """Return the page in Markdown: the introduction, and a section for each model."""
    sections = [INTRODUCTION_FILE.read_text(encoding="utf-8")]
    sections += [format_model(MODELS[name], content) for name, content in results.items()]
    return "\n".join(sections)


def format_model(title: str, content: Results) -> str:
    """Return the section of one model."""
    lines = [f"## {title}", "", f"Fingerprint {content['model']['fingerprint']}.", ""]
    for kind in TITLES:
        if kind in content:
            lines += format_searches(kind, content[kind])
    if "documents" in content:
        continuations = content["documents"]["continuations"]
        description = "Nats per token of the text that follows an image in its document, after"
        count = len(continuations["groups"])
        description += f" different images ({count} places)."
        lines += format_nats("The true continuation", continuations, description)
    if "questions" in content:
        lines += format_questions(content["questions"])
        lines += format_nats(
            "Plain answers after an image",
            content["questions"]["plain"],
            "Nats per token of answers to plain questions, in a later turn than the image.",
        )
    return "\n".join(lines)


def format_run(run: Results) -> str:
    """Return the command, time, machine and versions of a part."""
    versions = ", ".join(f"{name} {run[name]}" for name in ("vlduet", "torch", "transformers"))
    cost = f"{run['minutes']} minutes of one core, {run['processor']} ({versions})"
    return f"`{run['command']}`: {cost}."


# ------------------------------------------------------------------ numbers


def average_by_group(
    values: ArrayLike, groups: Sequence[int], *, weights: ArrayLike | None = None, scale: float
) -> MetricSample:
    """Return the weighted mean of items whose interval resamples whole groups, such as documents.

    Args:
        values: one number per item, float[N].
        groups: group of every item.
        weights: float[N]; None for equal weights.
        scale: factor of the number.
    """
    value_array = np.asarray(values, dtype=np.float64)
    weight_array = np.ones_like(value_array) if weights is None else np.asarray(weights, float)
    _, index = np.unique(np.asarray(groups), return_inverse=True)
    sums = np.bincount(index, weights=value_array * weight_array)
    totals = np.bincount(index, weights=weight_array)
    return average(sums / totals, totals, scale=scale)


def compare(first: MetricSample, second: MetricSample) -> MetricValue:
    """Return first - second with its paired interval; both must be of the same groups."""
    difference = paired_difference(first, second)
    assert difference is not None, "other items"
    return difference


def format_value(value: MetricValue, *, digits: int = 1, signed: bool = False) -> str:
    """Return a number with its interval, such as ``12.3 (9.1 to 15.4)``."""
    sign = "+" if signed else ""
    interval = f"{value.low:{sign}.{digits}f} to {value.high:{sign}.{digits}f}"
    return f"{value.mean:{sign}.{digits}f} ({interval})"


# ------------------------------------------------------------------ searches


def format_searches(kind: str, searches: Results) -> list[str]:
    """Return the lines on the searches of documents or dialogs: hits, differences and costs."""
    title, items, position = TITLES[kind]
    groups, numbers = np.array(searches["groups"]), np.array(searches["numbers"])
    positions = sorted(set(searches["numbers"]))
    left_out = searches["left_out"]
    lines = [
        f"### {title}",
        "",
        format_run(searches["run"]),
        "",
        f"{len(set(searches['groups']))} {items} with {len(groups)} searches among"
        f" {searches['gallery']} images"
        + (f"; {left_out} of the suite's have no text of their own" if left_out else "")
        + ". hit@10 / hit@1, x 100.",
        "",
        f"| method | {' | '.join(f'{position} {n}' for n in positions)} | all |",
        "|---" * (len(positions) + 2) + "|",
    ]
    masks = [numbers == n for n in positions] + [numbers > 0]
    for method, ranks in searches["ranks"].items():
        hits = [np.array(ranks) <= k for k in (10, 1)]
        cells = [" / ".join(f"{100 * hit[mask].mean():.1f}" for hit in hits) for mask in masks]
        overall = average_by_group(hits[0], searches["groups"], scale=100.0).estimate()
        cells[-1] = f"{format_value(overall)} / {100 * hits[1].mean():.1f}"
        lines.append(f"| {method} | {' | '.join(cells)} |")
    chances = [np.array(searches["chance"][name]) for name in ("hit@10", "hit@1")]
    cells = [" / ".join(f"{100 * c[mask].mean():.1f}" for c in chances) for mask in masks]
    lines += [f"| *chance* | {' | '.join(cells)} |", ""]
    lines += format_differences(searches, masks=masks, heads=[f"{position} {n}" for n in positions])
    lines += format_costs(searches["costs"], f"Per answer, on {{count}} {items}:")
    if searches["writing"]:
        text = "The model writes up to 48 tokens itself, with an image at every sentence"
        lines += format_costs(searches["writing"], f"{text} ({{count}} requests):")
    return lines


def format_differences(
    searches: Results, *, masks: Sequence[np.ndarray], heads: Sequence[str]
) -> list[str]:
    """Return the table of differences to the operation without feed-back.

    The columns are hit@10 at every position, at all of them, and hit@1 at all.
    """
    groups = np.array(searches["groups"])
    lines = [
        f"Minus *{REFERENCE}*, paired, 95 % intervals over whole documents or dialogs:",
        "",
        f"| method | {' | '.join(f'{head}, @10' for head in heads)} | all, @10 | all, @1 |",
        "|---" * (len(heads) + 3) + "|",
    ]
    columns = [(mask, 10) for mask in masks] + [(masks[-1], 1)]
    reference = np.array(searches["ranks"][REFERENCE])
    for method, ranks in searches["ranks"].items():
        if method == REFERENCE:
            continue
        cells = []
        for mask, k in columns:
            samples = [
                average_by_group((np.array(r) <= k)[mask], groups[mask], scale=100.0)
                for r in (ranks, reference)
            ]
            cells.append(format_value(compare(*samples), signed=True))
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return [*lines, ""]


def format_costs(costs: Results, description: str) -> list[str]:
    """Return the table of seconds and numbers per answer.

    `{count}` in the description becomes the number of answers.
    """
    numbers = next(iter(costs.values()))
    names = [name for name in numbers if name != "seconds"]
    heads = {"passes": "forward passes", "images": "images"}
    lines = [
        f"{description.format(count=len(numbers['seconds']))}",
        "",
        f"| method | seconds of one core | {' | '.join(heads[name] for name in names)} |",
        "|---" * (len(names) + 2) + "|",
    ]
    for method, values in costs.items():
        seconds = average(values["seconds"], scale=1.0).estimate()
        cells = [f"{np.mean(values[name]):.1f}" for name in names]
        lines.append(f"| {method} | {format_value(seconds, digits=2)} | {' | '.join(cells)} |")
    return [*lines, ""]


# ------------------------------------------------------------------ text after an image


def format_nats(title: str, texts: Results, description: str) -> list[str]:
    """Return the section on the likelihoods of texts."""
    lines = [
        f"### {title}",
        "",
        f"{description} Intervals are over documents or questions, those of differences paired.",
        "",
        "| after | nats per token | minus no image |",
        "|---|---|---|",
    ]
    counts = np.array(texts["num_tokens"], dtype=np.float64)
    samples = {
        condition: average_by_group(
            np.array(nats) / counts, texts["groups"], weights=counts, scale=1.0
        )
        for condition, nats in texts["nats"].items()
    }
    return [*lines, *_format_conditions(samples, digits=3), ""]


def format_questions(questions: Results) -> list[str]:
    """Return the section on questions about the image that was shown."""
    count = len(next(iter(questions["correct"].values())))
    lines = [
        "### Questions about the retrieved image",
        "",
        format_run(questions["run"]),
        "",
        f'"What is shown?" about the image that {count} requests have retrieved, in a later turn;'
        f" {questions['num_right_images']} of them retrieved an image of the requested name."
        " Accuracy x 100 of the caption that is likeliest per token among four;"
        f" chance {100 * questions['chance']:.1f}.",
        "",
        "| after | accuracy | minus no image |",
        "|---|---|---|",
    ]
    samples = {condition: average(values) for condition, values in questions["correct"].items()}
    return [*lines, *_format_conditions(samples, digits=1), ""]


def _format_conditions(samples: dict[str, MetricSample], *, digits: int) -> list[str]:
    """Return a row for each condition, with the difference to the one without an image."""
    reference = samples["no image"]
    rows = []
    for condition, sample in samples.items():
        difference = "" if sample is reference else compare(sample, reference)
        if isinstance(difference, MetricValue):
            difference = format_value(difference, digits=digits, signed=True)
        rows.append(
            f"| {condition} | {format_value(sample.estimate(), digits=digits)} | {difference} |"
        )
    return rows


if __name__ == "__main__":
    main()
