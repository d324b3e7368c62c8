"""Comparison of several recipes on the same data, steps and seeds: ``vlduet compare``.

1. check      configs, models and records of all runs, before the first one costs anything
2. train      every run with every seed in turn; finished runs are skipped, stopped ones resumed
3. measure    the trained models on benchmarks, and item by item, where the comparison asks for it
4. tabulate   the last validation of every run, with mean and spread over the seeds, and the
              differences of the reference to the others: table.json and table.md
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from contextlib import ExitStack
from itertools import pairwise
from typing import Any

from vlduet import config, distributed
from vlduet.config import ComparisonConfig, RunConfig
from vlduet.errors import ConfigError, suggest_name
from vlduet.eval.benchmarks.registry import get_benchmark
from vlduet.eval.benchmarks.scores import MetricSample
from vlduet.files import write_text_atomically
from vlduet.locks import lock_folder
from vlduet.logs import logger, read_metrics
from vlduet.train import checkpointing, setup
from vlduet.train.loop import train
from vlduet.train.source_check import check_sources
from vlduet.workflows.comparison_measures import ComparisonMeasures, compare_with_reference
from vlduet.workflows.validation import make_config_validator

VALIDATION_PREFIX = "validation/"
"""Prefix of the metrics of a validation in ``metrics.jsonl``."""
UNTRAINED_NAME = "before training"
"""Row of the table that holds the first validation of the first run."""
STEP_TIME_NAME = "seconds a step"
"""Column of the table that holds `_median_step_seconds`."""
TOKENS_NAME = "tokens a step"
"""Column of the table that holds the mean number of tokens of a logged step."""


def run_comparison(
    settings: ComparisonConfig, *, measures: ComparisonMeasures | None = None
) -> dict[str, Any]:
    """Train every run that is not finished, then write and return the table of all runs.

    All configs, and the data and model of every unfinished run, are checked before the first is
    trained. An interrupted run is resumed from its saved state. Under torchrun the process group is
    initialised. The main process writes ``table.json`` and ``table.md`` into `settings.out`, beside
    the folders ``NAME/seed-SEED`` of the runs. Torch's global seed is set by training.

    Args:
        settings: the comparison.
        measures: measurements of the trained models, where `settings` has a reference or
            benchmarks; None: only what training has validated.

    Returns:
        Content of ``table.json``: ``base``, ``overrides``, ``seeds``, and ``runs``, which maps a
        run's name to its ``overrides`` and, per metric, its ``values`` in the order of the seeds.
        The first run is `UNTRAINED_NAME`: the first validation of the first one. With a reference
        also ``reference``, its name, and ``differences`` (see `compare_with_reference`).

    Raises:
        ConfigError: a setting is wrong, a benchmark or the reference is unknown, the runs have no
            or different validation files, or the folder of a run holds one with other settings.
        LockError: another process writes this comparison.
        DataError, ModelError, TrainingError: as `train`.
    """
    distributed.init_process_group()
    with ExitStack() as stack:
        distributed.call_on_main(lambda: stack.enter_context(lock_folder(settings.out)))
        return _train_runs(settings, measures)


def _train_runs(settings: ComparisonConfig, measures: ComparisonMeasures | None) -> dict[str, Any]:
    """Check, train and tabulate the runs as `run_comparison` does, with the locked folder."""
    if settings.reference is not None and settings.reference not in settings.runs:
        fix = suggest_name(settings.reference, settings.runs)
        raise ConfigError(f"no run '{settings.reference}'", place="reference", fix=fix)
    for benchmark in settings.benchmarks:
        get_benchmark(benchmark)
    configs: dict[str, list[RunConfig]] = {}
    for name in settings.runs:
        configs[name] = [_build_run_config(settings, name, seed) for seed in settings.seeds]
    all_configs = [run for runs in configs.values() for run in runs]
    validations = [_select_validation_settings(run) for run in all_configs]
    if validations[0] is None or any(settings != validations[0] for settings in validations):
        message = "the runs must be measured on the same records"
        raise ConfigError(message, place="data.validation", fix="Name one file")
    num_steps: dict[str, int] = {}
    finished = {run.out: _is_finished(run) for run in all_configs}
    for name, runs in configs.items():
        if not all(finished[run.out] for run in runs):
            # One seed is enough: runs that differ in the seed only have the same mistakes.
            prepared = setup.prepare_run(runs[0], write_files=False)
            check_sources(prepared)
            num_steps[name] = prepared.num_steps
    if len(set(num_steps.values())) > 1:
        lengths = ", ".join(f"{name} {count}" for name, count in num_steps.items())
        message = f"the runs must have the same number of steps, and have {lengths}"
        raise ConfigError(message, place="train.epochs", fix="Set train.steps for all of them")
    validate = None
    for number, run in enumerate(all_configs, 1):
        suffix = " is finished" if finished[run.out] else ""
        logger.info(f"[{number}/{len(all_configs)}] {run.out}{suffix}")
        if not finished[run.out]:
            # Seed 0 for all: the same wrong image for each caption, so the same question.
            validate = validate or make_config_validator(run, seed=0)
            train(run, evaluate=validate, calibrate=validate.calibrate, resume="auto")
    results = _collect_results(settings, configs)
    if distributed.is_main_process():
        if measures is not None and (settings.reference or settings.benchmarks):
            _add_measures(results, settings, configs, measures)
        write_text_atomically(settings.out / "table.json", json.dumps(results, indent=1) + "\n")
        write_text_atomically(settings.out / "table.md", format_table(results))
    return results


def _add_measures(
    results: dict[str, Any],
    settings: ComparisonConfig,
    configs: Mapping[str, list[RunConfig]],
    measures: ComparisonMeasures,
) -> None:
    """Measure all trained models, and add what validation lacks and the differences, in place."""
    samples: dict[str, list[dict[str, MetricSample]]] = {}
    for name, runs in configs.items():
        samples[name] = [measures.measure(run) for run in runs]
        values = results["runs"][name]["values"]
        for metric in samples[name][0]:
            # Validation has the hit rates and captions of the same pairs.
            if metric == "chat" or metric.partition(" ")[0] in settings.benchmarks:
                values[metric] = [seed[metric].mean for seed in samples[name] if metric in seed]
    if settings.reference is not None:
        results["reference"] = settings.reference
        results["differences"] = compare_with_reference(samples, reference=settings.reference)


def _build_run_config(settings: ComparisonConfig, name: str, seed: int) -> RunConfig:
    """Return the config of one run: the base with the shared overrides and those of `name`.

    Its folder is ``settings.out/NAME/seed-SEED``. Unless it sets ``data.cache``, that is
    ``settings.out/features`` for all runs, because the vision tower is frozen. Raises ConfigError
    as `load_run_config` does.
    """
    run = config.load_run_config(settings.base, [*settings.overrides, *settings.runs[name]])
    feature_cache = settings.out / "features" if run.data.cache is None else run.data.cache
    data = run.data.model_copy(update={"cache": feature_cache})
    folder = settings.out / name / f"seed-{seed}"
    return run.model_copy(update={"out": folder, "seed": seed, "data": data})


def _select_validation_settings(run: RunConfig) -> object:
    """Return what decides the validation records: equal for runs that have the same; None for none.

    A share of the training records depends on their sources, too.
    """
    validation = run.data.validation
    return (validation, run.data.train) if isinstance(validation, float) else validation


def _is_finished(run: RunConfig) -> bool:
    """Return whether the run's folder holds its trained model; False without ``config.yaml``.

    Raises:
        ConfigError: the folder holds a run with other settings, or its config is broken.
    """
    saved_config = run.out / "config.yaml"
    if not saved_config.is_file():
        return False
    difference = checkpointing.describe_difference(
        checkpointing.decisive_settings(config.load_run_config(saved_config)),
        checkpointing.decisive_settings(run),
    )
    if difference:
        fix = "Give another out=, or remove that folder"
        raise ConfigError(difference, place=run.out, fix=fix)
    return (run.out / "model").is_dir()  # a model folder is complete or absent


def _collect_results(
    settings: ComparisonConfig, configs: Mapping[str, list[RunConfig]]
) -> dict[str, Any]:
    """Return the content of ``table.json`` (see `run_comparison`), read from ``metrics.jsonl``.

    Values are those of each run's last validation, and the step time. Raises IndexError for a run
    without a validation, and KeyError if a metric is missing for a later seed of a run.
    """
    results: dict[str, list[dict[str, float]]] = {}  # metrics of each seed, by name of the run
    for name, runs in configs.items():
        logs = [read_metrics(run.out / "metrics.jsonl") for run in runs]
        if not results:
            results[UNTRAINED_NAME] = [_select_validations(rows)[0] for rows in logs]
        results[name] = [
            _select_validations(rows)[-1]
            | {TOKENS_NAME: _mean_tokens(rows), STEP_TIME_NAME: _median_step_seconds(rows)}
            for rows in logs
        ]
    table: dict[str, Any] = {}
    for name, seeds in results.items():
        values: dict[str, list[float]] = {}
        for metric in seeds[0]:
            values[metric] = [metrics[metric] for metrics in seeds]
        table[name] = {"overrides": settings.runs.get(name, []), "values": values}
    return {
        "base": str(settings.base),
        "overrides": settings.overrides,
        "seeds": settings.seeds,
        "runs": table,
    }


def _select_validations(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    """Return the metrics of each validation, in order, with names without `VALIDATION_PREFIX`.

    Rows without such metrics are left out, and so are the other values of a row.
    """
    validations = []
    for row in rows:
        metrics = {
            name.removeprefix(VALIDATION_PREFIX): value
            for name, value in row.items()
            if name.startswith(VALIDATION_PREFIX)
        }
        if metrics:
            validations.append(metrics)
    return validations


def _mean_tokens(rows: list[dict[str, float]]) -> float:
    """Return the mean number of tokens of the steps that are logged; NaN if none is."""
    counts = [row["tokens"] for row in rows if "tokens" in row]
    return statistics.fmean(counts) if counts else float("nan")


def _median_step_seconds(rows: list[dict[str, float]]) -> float:
    """Return the median duration of a training step; NaN if fewer than two rows have a loss.

    A median, so that pauses between steps (validation, a stop, another load) do not count.
    """
    logged = [row for row in rows if "loss" in row]
    durations = [
        (second["seconds"] - first["seconds"]) / (second["step"] - first["step"])
        for first, second in pairwise(logged)
        if second["seconds"] > first["seconds"]
    ]
    return statistics.median(durations) if durations else float("nan")


def format_table(results: Mapping[str, Any]) -> str:
    """Return the content of ``table.json`` as Markdown: a table with a row per run, then settings.

    A cell holds mean ± standard deviation over the seeds (`_format_cell`), and is empty for a
    missing metric. Rows and columns are in the order of `results`; overrides of single runs follow
    as a list.
    """
    runs: Mapping[str, Any] = results["runs"]
    metrics = list(dict.fromkeys(metric for run in runs.values() for metric in run["values"]))
    lines = ["| run | " + " | ".join(metrics) + " |", "|---" * (len(metrics) + 1) + "|"]
    for name, run in runs.items():
        cells = [_format_cell(metric, run["values"].get(metric, [])) for metric in metrics]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    seeds = ", ".join(map(str, results["seeds"]))
    shared = f", with {_quote(results['overrides'])}" if results["overrides"] else ""
    summary = f"Base `{results['base']}`{shared}; seeds {seeds}"
    lines += ["", f"{summary}; mean ± standard deviation over them."]
    if results.get("differences"):
        lines += ["", *_format_differences(results)]
    overrides = {name: run["overrides"] for name, run in runs.items() if run["overrides"]}
    if overrides:
        lines.append("")
    lines += [f"- **{name}**: {_quote(values)}" for name, values in overrides.items()]
    return "\n".join([*lines, ""])


def _format_differences(results: Mapping[str, Any]) -> list[str]:
    """Return a table with a row per run: the reference minus it, with 95 % intervals."""
    differences: Mapping[str, Any] = results["differences"]
    metrics = list(dict.fromkeys(metric for row in differences.values() for metric in row))
    lines = [f"| {results['reference']} minus | " + " | ".join(metrics) + " |"]
    lines.append("|---" * (len(metrics) + 1) + "|")
    for name, row in differences.items():
        cells = []
        for metric in metrics:
            value = row.get(metric, {})
            cells.append(
                f"{value['mean']:+.3f} [{value['low']:+.3f}, {value['high']:+.3f}]" if value else ""
            )
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return [*lines, "", "Paired 95 % bootstrap intervals over items; nats per token, or hit rates."]


def _quote(overrides: list[str]) -> str:
    """Return the overrides as Markdown code, separated by blanks."""
    return f"`{'` `'.join(overrides)}`"


def _format_cell(metric: str, values: list[float]) -> str:
    """Return ``mean ± standard deviation``, the mean alone for one value, and "" for none.

    A hit rate (``hit@`` in `metric`) is in per cent with one decimal, and ends in `` %``; any other
    metric has three decimals.
    """
    if not values:
        return ""
    is_rate = "hit@" in metric
    scale = 100 if is_rate else 1
    digits = 1 if is_rate else 3
    text = f"{scale * statistics.fmean(values):.{digits}f}"
    if len(values) > 1:
        text += f" ± {scale * statistics.stdev(values):.{digits}f}"
    return f"{text} %" if is_rate else text
