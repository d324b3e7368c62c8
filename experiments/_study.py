"""Rows that differ in a setting, trained on the same data, steps and seeds, and measured on the same held-out items.

1. train     every row with every seed; what is finished is left as it is, what was stopped goes on
2. measure   every trained model, and the one that all of them start from; item by item, so that rows can be paired
3. tell      a table, differences to one row with paired intervals, and a plot

Paths in a study's config are relative to where the command runs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vlduet import config
from vlduet.cli.main import keep_freed_memory
from vlduet.config import RunConfig
from vlduet.eval.benchmarks.scores import BenchmarkScore, MetricSample, MetricValue, paired_difference
from vlduet.eval.run import read_samples, write_samples
from vlduet.files import recover_folder, write_atomically, write_text_atomically
from vlduet.logs import install_log_handler, logger, read_metrics
from vlduet.model.duet import DuetModel
from vlduet.model.feature_cache import FeatureCache
from vlduet.recipes.registry import load_recipe
from vlduet.train import checkpointing
from vlduet.train.loop import train
from vlduet.train.setup import load_model

START = "start"
"""The row that is measured and not trained."""

Numbers = dict[str, MetricSample]


@dataclass(frozen=True)
class Study:
    """What is compared, and by what."""

    name: str
    base: Path
    """The config that all rows share."""
    overrides: tuple[str, ...]
    """What all rows change in it."""
    rows: Mapping[str, tuple[str, ...]]
    """Name -> what makes it what it is."""
    reference: str
    """The row that the others are compared with."""
    measure: Callable[[DuetModel, Path], Numbers]
    """(model, folder of the corpora) -> numbers by name, in the order of the table."""
    lower: frozenset[str] = frozenset()
    """Numbers that are better when they are lower."""


def main(study: Study) -> None:
    """The command line of a study."""
    parser = argparse.ArgumentParser(
        description=f"The study {study.name}; see {study.base} for what it needs."
    )
    parser.add_argument("--work", type=Path, required=True, help="trained models and measurements")
    parser.add_argument(
        "--data", type=Path, default=Path("data"), help="what 'vlduet data fetch' wrote"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--rows", nargs="+", default=list(study.rows), choices=study.rows, help="default: all"
    )
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings of all rows"
    )
    parser.add_argument(
        "--tell",
        type=Path,
        metavar="DIR",
        help="train nothing; write tables and a plot of what there is",
    )
    options = parser.parse_args()
    install_log_handler()
    if options.tell is not None:
        tell(study, options.work, options.tell)
        return
    keep_freed_memory()
    for seed in range(options.seeds):
        for row in (START, *options.rows):
            changed = study.rows.get(row, ())
            plan = config.load_run_config(study.base, [*study.overrides, *options.set, *changed])
            plan = plan.model_copy(update={"out": folder(options.work, row, seed), "seed": seed})
            if row != START:
                trained(plan)
            if row != START or seed == 0:
                measured(study, plan, options.data)


def folder(work: Path, row: str, seed: int) -> Path:
    """Where a run stands."""
    return work / row.replace(" ", "-") / f"seed-{seed}"


def trained(plan: RunConfig) -> None:
    """Train a run that is not finished."""
    if not (plan.out / "model").exists():
        logger.info(f"training {plan.out}")
        train(plan, resume=recover_folder(plan.out / checkpointing.STATE_FOLDER).exists())


def measured(study: Study, plan: RunConfig, data: Path) -> None:
    """Measure a run whose numbers are not there."""
    if read_samples(plan.out):
        return
    own = plan.out / "model"
    model = (
        DuetModel.from_pretrained(own) if own.exists() else load_model(plan, load_recipe(plan), cache=None)
    )
    model.feature_cache = FeatureCache(plan.data.cache or None)
    found = study.measure(model, data)
    plan.out.mkdir(parents=True, exist_ok=True)
    write_atomically(plan.out / "samples.npz", lambda out: write_samples(out, BenchmarkScore(found)))
    logger.info(f"{plan.out}: " + ", ".join(f"{name} {sample.mean:.3g}" for name, sample in found.items()))


# ------------------------------------------------------------------ tell


def averaged(samples: Sequence[MetricSample]) -> MetricSample:
    """The mean over seeds, item by item: its interval is that of the items, and seeds do not count as items."""
    first = samples[0]
    assert all([len(v) for v, _ in s.groups] == [len(v) for v, _ in first.groups] for s in samples)
    groups = tuple(
        (np.mean([s.groups[i][0] for s in samples], axis=0), first.groups[i][1])
        for i in range(len(first.groups))
    )
    return MetricSample(groups, scale=first.scale, sum_groups=first.sum_groups)


def tell(study: Study, work: Path, to: Path) -> None:
    """Write NAME.json (every number) and NAME.svg, and print the tables in Markdown.

    A row's number is the mean over its seeds, ± the standard deviation between them. A difference to the reference comes
    with its 95 % bootstrap interval over the items, the same items drawn on both sides.
    """
    runs = {
        row: [
            found
            for at in sorted(work.glob(f"{row.replace(' ', '-')}/seed-*"))
            if (found := read_samples(at))
        ]
        for row in (START, *study.rows)
    }
    runs = {row: found for row, found in runs.items() if found}
    numbers = list(runs[START][0])
    means = {
        row: {n: averaged([s[n] for s in seeds]) for n in numbers} for row, seeds in runs.items()
    }
    spread = {
        row: {
            n: statistics.stdev(s[n].mean for s in seeds) if len(seeds) > 1 else 0.0
            for n in numbers
        }
        for row, seeds in runs.items()
    }
    against: dict[str, dict[str, MetricValue]] = {
        row: {
            n: value
            for n in numbers
            if (value := paired_difference(means[row][n], means[study.reference][n]))
        }
        for row in runs
        if row != study.reference
    }
    values = {
        row: {n: f"{means[row][n].mean:.2f} ± {spread[row][n]:.2f}" for n in numbers}
        for row in runs
    }
    gaps = {
        row: {
            n: f"{v.mean:+.2f} ({v.low:+.2f}, {v.high:+.2f}){mark(v, n in study.lower)}"
            for n, v in found.items()
        }
        for row, found in against.items()
    }
    print(f"{table(numbers, values)}\nMinus {study.reference}:\n\n{table(numbers, gaps)}")  # noqa: T201
    paces = {
        row: [pace(at) for at in sorted(work.glob(f"{row.replace(' ', '-')}/seed-*"))]
        for row in study.rows
    }
    kept = {
        "rows": {
            row: {
                n: {"mean": m.mean, "seeds": [s[n].mean for s in runs[row]], "items": m.estimate().n}
                for n, m in means[row].items()
            }
            for row in runs
        },
        f"minus {study.reference}": {
            row: {n: {"mean": v.mean, "low": v.low, "high": v.high} for n, v in found.items()}
            for row, found in against.items()
        },
        "seconds a step": {row: found for row, found in paces.items() if found},
    }
    write_text_atomically(to / f"{study.name}.json", json.dumps(kept, indent=1) + "\n")
    draw(study, against, to / f"{study.name}.svg")


def table(numbers: Sequence[str], cells: Mapping[str, Mapping[str, str]]) -> str:
    """A line a number, a column a row of the study."""
    lines = ["| | " + " | ".join(cells) + " |", "|---" * (len(cells) + 1) + "|"]
    lines += [
        f"| {n} | " + " | ".join(found.get(n, "") for found in cells.values()) + " |"
        for n in numbers
    ]
    return "\n".join(lines) + "\n"


def mark(value: MetricValue, lower: bool) -> str:
    """What stands behind a difference whose interval leaves out zero."""
    if value.low <= 0 <= value.high:
        return ""
    return " better" if (value.mean > 0) != lower else " worse"


def pace(run: Path) -> float:
    """Median seconds between two logged steps, per step."""
    rows = [row for row in read_metrics(run / "metrics.jsonl") if "loss" in row]
    each = [
        (b["seconds"] - a["seconds"]) / (b["step"] - a["step"]) for a, b in itertools.pairwise(rows)
    ]
    return statistics.median(each) if each else float("nan")


def draw(study: Study, against: Mapping[str, Mapping[str, MetricValue]], path: Path) -> None:
    """Differences to the reference with their intervals: a panel a number, a line a row."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.fonttype"] = "none"
    matplotlib.rcParams["svg.hashsalt"] = study.name  # the same numbers give the same file
    numbers = list(next(iter(against.values())))
    columns = 3
    rows = -(-len(numbers) // columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(11, 0.9 + rows * (0.6 + 0.22 * len(against))), sharey=True
    )
    for axis, number in zip(axes.flat, numbers, strict=False):
        values = [found[number] for found in against.values()]
        sides = np.array([[v.mean - v.low, v.high - v.mean] for v in values]).T
        axis.errorbar(
            [v.mean for v in values],
            range(len(values)),
            xerr=np.abs(sides),
            fmt="o",
            ms=4,
            capsize=2,
        )
        axis.axvline(0, color="gray", lw=0.8)
        axis.set_title(number + (" (lower is better)" if number in study.lower else ""), fontsize=9)
        axis.set_yticks(range(len(values)), list(against), fontsize=8)
        axis.tick_params(axis="x", labelsize=8)
    for axis in axes.flat[len(numbers) :]:
        axis.set_visible(False)
    axes.flat[0].invert_yaxis()
    figure.suptitle(
        f"{study.name}: minus {study.reference}, mean over seeds, 95 % interval over items",
        fontsize=10,
    )
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
