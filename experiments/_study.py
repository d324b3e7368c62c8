"""Run a study: rows that differ in one setting, trained on the same data, steps and seeds.

1. train     every row with every seed; a finished run is skipped, an interrupted one resumes
2. measure   every trained model and the one that all of them start from, item by item, so that rows
             can be paired
3. report    a table, differences to one row with paired intervals, and a plot

Paths in a study's config are relative to the working directory.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlduet import config
from vlduet.cli.main import keep_freed_memory
from vlduet.config import RunConfig
from vlduet.eval.benchmarks.scores import (
    BenchmarkScore,
    MetricSample,
    MetricValue,
    paired_difference,
)
from vlduet.eval.run import read_samples, write_samples
from vlduet.files import write_atomically, write_text_atomically
from vlduet.logs import install_log_handler, logger, read_metrics
from vlduet.model.duet import DuetModel
from vlduet.model.feature_cache import FeatureCache
from vlduet.model.prompts import DEFAULT_MAX_TOKENS
from vlduet.recipes.registry import load_recipe
from vlduet.train.loop import train
from vlduet.train.setup import load_model

START_ROW = "start"
"""Row that is measured but not trained."""
PLOT_COLUMNS = 3

Measurements = dict[str, MetricSample]
"""Sample by the name of the number, in the order of the table."""
SeedRuns = Mapping[str, Sequence[Measurements]]
"""Measurements of every seed, by the name of the row."""


@dataclass(frozen=True)
class Study:
    """A comparison of training settings."""

    name: str
    """Name of the files with the results."""
    base: Path
    """Config or preset that all rows share."""
    overrides: tuple[str, ...]
    """Overrides of that config in all rows."""
    rows: Mapping[str, tuple[str, ...]]
    """Overrides of each row, by its name."""
    reference: str
    """Row that the others are compared with."""
    measure: Callable[[DuetModel, Path], Measurements]
    """Function of a model and the folder of the corpora."""
    max_tokens: int | None = None
    """Longest sequence in the measurements; None for the default of the model."""
    lower_is_better: frozenset[str] = frozenset()
    """Numbers for which a smaller value is better."""


def run_study(study: Study) -> None:
    """Parse the command line, then train and measure, or write the results of finished runs."""
    options = _parse_options(study)
    install_log_handler()
    if options.report is not None:
        write_results(study, options.work, options.report)
        return
    keep_freed_memory()
    for seed in range(options.seeds):
        for row in (START_ROW, *options.rows):
            overrides = [*study.overrides, *options.set, *study.rows.get(row, ())]
            run = config.load_run_config(study.base, overrides)
            run = run.model_copy(update={"out": find_run_folder(options.work, row, seed)})
            run = run.model_copy(update={"seed": seed})
            if row != START_ROW:
                train_unless_finished(run)
            if row != START_ROW or seed == 0:
                measure_unless_finished(study, run, options.data)


def _parse_options(study: Study) -> argparse.Namespace:
    """Return the options of the command line; wrong options end the process with a message."""
    parser = argparse.ArgumentParser(
        description=f"The study {study.name}; see {study.base} for what it needs."
    )
    parser.add_argument("--work", type=Path, required=True, help="trained models and measurements")
    parser.add_argument(
        "--data", type=Path, default=Path("data"), help="folder written by 'vlduet data fetch'"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--rows", nargs="+", default=list(study.rows), choices=study.rows, help="default: all"
    )
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=VALUE", help="overrides of all rows"
    )
    parser.add_argument(
        "--report", type=Path, metavar="DIR", help="only write the results of finished runs there"
    )
    return parser.parse_args()


def find_run_folder(work: Path, row: str, seed: int) -> Path:
    """Return the folder of one run."""
    return work / row.replace(" ", "-") / f"seed-{seed}"


def train_unless_finished(run: RunConfig) -> None:
    """Train a run, or resume it, unless its model exists."""
    if not (run.out / "model").exists():
        logger.info(f"training {run.out}")
        train(run, resume="auto")


def measure_unless_finished(study: Study, run: RunConfig, data: Path) -> None:
    """Measure a run and write samples.npz to its folder, unless that file exists."""
    if read_samples(run.out):
        return
    trained = run.out / "model"
    if trained.exists():
        limit = DEFAULT_MAX_TOKENS if study.max_tokens is None else study.max_tokens
        model = DuetModel.from_pretrained(trained, max_tokens=limit)
    else:
        model = load_model(run, load_recipe(run), cache=None)
    model.feature_cache = FeatureCache(run.data.cache or None)
    measurements = study.measure(model, data)
    run.out.mkdir(parents=True, exist_ok=True)
    score = BenchmarkScore(measurements)
    write_atomically(run.out / "samples.npz", lambda out: write_samples(out, score))
    numbers = ", ".join(f"{name} {sample.mean:.3g}" for name, sample in measurements.items())
    logger.info(f"{run.out}: {numbers}")


# ------------------------------------------------------------------ report


def average_seeds(samples: Sequence[MetricSample]) -> MetricSample:
    """Return the mean over seeds, item by item.

    Its interval is that of the items: a second seed does not count as more items. All samples must
    have the same items; AssertionError otherwise.
    """
    first = samples[0]
    sizes = [len(values) for values, _ in first.groups]
    groups = []
    for index, (_, weights) in enumerate(first.groups):
        values = [sample.groups[index][0] for sample in samples]
        assert {len(items) for items in values} == {sizes[index]}, "seeds have different items"
        groups.append((np.mean(values, axis=0), weights))
    return MetricSample(tuple(groups), scale=first.scale, sum_groups=first.sum_groups)


def read_runs(study: Study, work: Path) -> dict[str, list[Measurements]]:
    """Return the measurements of every seed of every row that has any."""
    runs = {}
    for row in (START_ROW, *study.rows):
        folders = sorted(work.glob(f"{row.replace(' ', '-')}/seed-*"))
        measurements = [samples for folder in folders if (samples := read_samples(folder))]
        if measurements:
            runs[row] = measurements
    return runs


def write_results(study: Study, work: Path, folder: Path) -> None:
    """Write NAME.json with every number and NAME.svg, and print the tables in Markdown.

    A row's number is the mean over its seeds, ± the standard deviation between them. A difference
    to the reference has its 95 % bootstrap interval over the items; the same items are drawn on
    both sides."""
    runs = read_runs(study, work)
    names = list(runs[START_ROW][0])
    means: dict[str, Measurements] = {}
    values: dict[str, dict[str, str]] = {}
    for row, seeds in runs.items():
        means[row] = {name: average_seeds([seed[name] for seed in seeds]) for name in names}
        values[row] = {}
        for name in names:
            deviation = statistics.stdev(seed[name].mean for seed in seeds) if seeds[1:] else 0.0
            values[row][name] = f"{means[row][name].mean:.2f} ± {deviation:.2f}"
    differences = compute_differences(study, means)
    cells: dict[str, dict[str, str]] = {}
    for row, row_differences in differences.items():
        cells[row] = {
            name: format_difference(value, lower_is_better=name in study.lower_is_better)
            for name, value in row_differences.items()
        }
    print(f"{format_table(names, values)}\nMinus {study.reference}:\n")
    print(format_table(names, cells))
    results = {
        "rows": {row: _describe_row(means[row], seeds) for row, seeds in runs.items()},
        f"minus {study.reference}": {
            row: _describe_differences(row_differences)
            for row, row_differences in differences.items()
        },
        "seconds a step": _measure_speed(study, work),
    }
    write_text_atomically(folder / f"{study.name}.json", json.dumps(results, indent=1) + "\n")
    draw_differences(study, differences, folder / f"{study.name}.svg")


def compute_differences(
    study: Study, means: Mapping[str, Measurements]
) -> dict[str, dict[str, MetricValue]]:
    """Return every row minus the reference, by row and number; numbers without pairs are left
    out."""
    differences: dict[str, dict[str, MetricValue]] = {}
    for row, samples in means.items():
        if row == study.reference:
            continue
        differences[row] = {}
        for name, sample in samples.items():
            value = paired_difference(sample, means[study.reference][name])
            if value is not None:
                differences[row][name] = value
    return differences


def _describe_row(means: Measurements, seeds: Sequence[Measurements]) -> dict[str, Any]:
    """Return mean, value of every seed and number of items of each number, for JSON."""
    row = {}
    for name, sample in means.items():
        values = [seed[name].mean for seed in seeds]
        row[name] = {"mean": sample.mean, "seeds": values, "items": sample.estimate().n}
    return row


def _describe_differences(differences: Mapping[str, MetricValue]) -> dict[str, Any]:
    """Return mean and interval of each difference, for JSON."""
    return {
        name: {"mean": value.mean, "low": value.low, "high": value.high}
        for name, value in differences.items()
    }


def _measure_speed(study: Study, work: Path) -> dict[str, list[float]]:
    """Return the seconds per step of every run of every row that has runs."""
    speeds = {}
    for row in study.rows:
        folders = sorted(work.glob(f"{row.replace(' ', '-')}/seed-*"))
        if folders:
            speeds[row] = [seconds_per_step(folder) for folder in folders]
    return speeds


def seconds_per_step(run: Path) -> float:
    """Return the median time of a step between two logged steps; NaN with fewer than two."""
    rows = [row for row in read_metrics(run / "metrics.jsonl") if "loss" in row]
    speeds = [
        (later["seconds"] - earlier["seconds"]) / (later["step"] - earlier["step"])
        for earlier, later in itertools.pairwise(rows)
    ]
    return statistics.median(speeds) if speeds else float("nan")


def format_table(names: Sequence[str], columns: Mapping[str, Mapping[str, str]]) -> str:
    """Return a Markdown table with a line per number and a column per row of the study."""
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name in names:
        cells = [column.get(name, "") for column in columns.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def format_difference(value: MetricValue, *, lower_is_better: bool) -> str:
    """Return mean and interval, followed by "better" or "worse" if the interval excludes zero."""
    text = f"{value.mean:+.2f} ({value.low:+.2f}, {value.high:+.2f})"
    if value.low <= 0 <= value.high:
        return text
    return text + (" better" if (value.mean > 0) != lower_is_better else " worse")


def draw_differences(
    study: Study, differences: Mapping[str, Mapping[str, MetricValue]], path: Path
) -> None:
    """Write an SVG with the differences and their intervals: a panel per number, a line per row."""
    import matplotlib
    from matplotlib.figure import Figure

    names = list(next(iter(differences.values())))
    num_rows = -(-len(names) // PLOT_COLUMNS)
    figure = Figure(figsize=(11, 0.9 + num_rows * (0.6 + 0.22 * len(differences))))
    all_axes = figure.subplots(num_rows, PLOT_COLUMNS, sharey=True, squeeze=False).flat
    for axes, name in zip(all_axes, names, strict=False):
        values = [row[name] for row in differences.values()]
        below = [abs(value.mean - value.low) for value in values]
        above = [abs(value.high - value.mean) for value in values]
        means = [value.mean for value in values]
        positions = range(len(values))
        axes.errorbar(means, positions, xerr=[below, above], fmt="o", ms=4, capsize=2)
        axes.axvline(0, color="gray", lw=0.8)
        note = " (lower is better)" if name in study.lower_is_better else ""
        axes.set_title(name + note, fontsize=9)
        axes.set_yticks(positions, list(differences), fontsize=8)
        axes.tick_params(axis="x", labelsize=8)
    for axes in all_axes[len(names) :]:
        axes.set_visible(False)
    all_axes[0].invert_yaxis()
    title = f"{study.name}: minus {study.reference}, mean over seeds, 95 % interval over items"
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    # The same numbers give the same file.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": study.name}):
        figure.savefig(path, format="svg", metadata={"Date": None})
