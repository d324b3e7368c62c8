"""`vlduet compare`: several recipes on the same data, steps and seeds, and one table of what became of them.

1. check     the configs, models and records of all runs, before the first one costs anything
2. train     every run with every seed, one after the other; finished ones are left as they are, stopped ones go on
3. tell      the last validation of every run, mean and spread over the seeds: table.md, table.json
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from functools import cache
from itertools import pairwise
from typing import Any

from vlduet import config, distributed
from vlduet.config import ComparisonConfig, RunConfig
from vlduet.errors import ConfigError
from vlduet.files import recover_folder, write_text_atomically
from vlduet.logs import logger, read_metrics
from vlduet.train import checkpointing, setup
from vlduet.train.loop import train
from vlduet.workflows.validation import make_validator

VALIDATION = "validation/"
UNTRAINED = "before training"
PACE = "seconds a step"


def run_comparison(settings: ComparisonConfig) -> dict[str, Any]:
    """Make every run that is not finished, and the table of all.

    Returns:
        The content of `table.json`: name -> what it changed, and per metric the values of all seeds, in their order.

    Raises:
        ConfigError: a setting that is wrong, validation records that are not the same for all, or a run's folder that
            holds one with other settings. TrainingError and the rest: as a run does.
    """
    distributed.init_process_group()
    plans = {
        name: [_plan(settings, name, seed) for seed in settings.seeds] for name in settings.runs
    }
    every = [plan for runs in plans.values() for plan in runs]
    measured = {plan.data.validation for plan in every}
    if len(measured) != 1 or None in measured:
        raise ConfigError(
            "the runs must be measured on the same records",
            place="data.validation",
            fix="Name one file",
        )
    finished = {plan.out: _is_finished(plan) for plan in every}
    for first, *others in plans.values():
        if not all(finished[plan.out] for plan in (first, *others)):
            setup.prepare_run(
                first, write_files=False
            )  # seeds differ in nothing that could be wrong
    evaluate = cache(make_validator)
    for number, plan in enumerate(every, 1):
        done = finished[plan.out]
        logger.info(f"[{number}/{len(every)}] {plan.out}{' is finished' if done else ''}")
        if not done:
            assert plan.data.validation is not None
            stopped = recover_folder(plan.out / checkpointing.STATE_FOLDER).exists()
            # Seed 0 for all: the same wrong image beside each caption, so the same question.
            train(plan, evaluate=evaluate(plan.data.validation, seed=0), resume=stopped)
    found = _told(settings, plans)
    if distributed.is_main_process():
        write_text_atomically(settings.out / "table.json", json.dumps(found, indent=1) + "\n")
        write_text_atomically(settings.out / "table.md", format_table(found))
    return found


def _plan(settings: ComparisonConfig, name: str, seed: int) -> RunConfig:
    """The config of one run. Vision features are shared by all: the tower is frozen."""
    run = config.load_run_config(settings.base, [*settings.overrides, *settings.runs[name]])
    cache = settings.out / "features" if run.data.cache is None else run.data.cache
    data = run.data.model_copy(update={"cache": cache})
    return run.model_copy(
        update={"out": settings.out / name / f"seed-{seed}", "seed": seed, "data": data}
    )


def _is_finished(plan: RunConfig) -> bool:
    """Whether the run's folder holds its trained model. Raises ConfigError where that is of a run with other settings."""
    saved = plan.out / "config.yaml"
    if not saved.is_file():
        return False
    if differs := checkpointing.describe_difference(
        checkpointing.decisive_settings(config.load_run_config(saved)),
        checkpointing.decisive_settings(plan),
    ):
        raise ConfigError(differs, place=plan.out, fix="Give another out=, or remove that folder")
    return (plan.out / "model").is_dir()  # a model folder is there whole or not at all


def _told(settings: ComparisonConfig, plans: Mapping[str, list[RunConfig]]) -> dict[str, Any]:
    rows = {
        name: [read_metrics(plan.out / "metrics.jsonl") for plan in runs]
        for name, runs in plans.items()
    }
    values: dict[str, list[dict[str, float]]] = {
        UNTRAINED: [_measured(one)[0] for one in next(iter(rows.values()))],
        **{
            name: [_measured(one)[-1] | {PACE: _pace(one)} for one in many]
            for name, many in rows.items()
        },
    }
    return {
        "base": str(settings.base),
        "overrides": settings.overrides,
        "seeds": settings.seeds,
        "runs": {
            name: {
                "overrides": settings.runs.get(name, []),
                "values": {metric: [one[metric] for one in many] for metric in many[0]},
            }
            for name, many in values.items()
        },
    }


def _measured(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    """The validations of a run, in order, without the prefix of their names."""
    found = [
        {k.removeprefix(VALIDATION): v for k, v in row.items() if k.startswith(VALIDATION)}
        for row in rows
    ]
    return [row for row in found if row]


def _pace(rows: list[dict[str, float]]) -> float:
    """Median seconds of a step, so that what came between (validation, a stop, another load) does not count."""
    logged = [row for row in rows if "loss" in row]
    each = [
        (b["seconds"] - a["seconds"]) / (b["step"] - a["step"])
        for a, b in pairwise(logged)
        if b["seconds"] > a["seconds"]
    ]
    return statistics.median(each) if each else float("nan")


def format_table(found: Mapping[str, Any]) -> str:
    """The comparison as Markdown: a row a run, mean ± standard deviation over the seeds."""
    runs: Mapping[str, Any] = found["runs"]
    metrics = list(dict.fromkeys(metric for run in runs.values() for metric in run["values"]))
    lines = ["| run | " + " | ".join(metrics) + " |", "|---" * (len(metrics) + 1) + "|"]
    for name, run in runs.items():
        cells = [_cell(metric, run["values"].get(metric, [])) for metric in metrics]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    seeds = ", ".join(map(str, found["seeds"]))
    changed = [
        f"- **{name}**: `{'` `'.join(run['overrides'])}`"
        for name, run in runs.items()
        if run["overrides"]
    ]
    shared = f", with `{'` `'.join(found['overrides'])}`" if found["overrides"] else ""
    told = f"Base `{found['base']}`{shared}; seeds {seeds}; mean ± standard deviation over them."
    return "\n".join([*lines, "", told, *([""] if changed else []), *changed, ""])


def _cell(metric: str, values: list[float]) -> str:
    if not values:
        return ""
    percent = "hit@" in metric
    scale, digits = (100, 1) if percent else (1, 3)
    spread = f" ± {scale * statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{scale * statistics.fmean(values):.{digits}f}{spread}{' %' if percent else ''}"
