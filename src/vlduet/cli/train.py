"""`vlduet train` and `vlduet compare`."""

from __future__ import annotations

from typing import Annotated

import typer

from vlduet.cli._common import Json, print_json
from vlduet.logs import logger

PRESET = "A preset (see 'vlduet config list') or a YAML file"

Overrides = Annotated[
    list[str] | None, typer.Argument(help="Keys of the config to change, such as train.lr=1e-4.")
]


def train(
    config: Annotated[str, typer.Argument(help=f"{PRESET}.")],
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option(help="Continue from the run's last saved state.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    as_json: Json = False,
) -> None:
    """Train a model on one or several losses; with torchrun, on any number of processes.

    Config, metrics, saved state and model are written to the folder `out` of the config; one that
    holds a run already is an error without --resume. If the config names validation data, the model
    is measured on it. With --dry-run, nothing is written.
    """
    from vlduet.config import load_run_config

    run_config = load_run_config(config, overrides or [])
    from vlduet.workflows.validation import make_config_validator

    evaluate = None
    if run_config.data.validation is not None:
        evaluate = make_config_validator(run_config, seed=run_config.seed)
    if dry_run:
        from vlduet.train.plan import plan_run

        plan = plan_run(run_config)
        if as_json:
            print_json(plan)
            return
        risks = plan.pop("warnings")
        for key, value in plan.items():
            print(f"{key:28} {value}")
        for risk in risks:
            print(f"warning: {risk}")
        return
    from vlduet.distributed import is_main_process
    from vlduet.logs import read_metrics
    from vlduet.train import loop

    folder = loop.train(run_config, evaluate=evaluate, resume=resume)
    if not is_main_process():
        return
    metrics = run_config.out / "metrics.jsonl"
    if as_json:
        print_json({"model": str(folder), **read_metrics(metrics)[-1]})
    else:
        logger.info(f"trained: {folder} (metrics in {metrics})")


def compare(
    config: Annotated[str, typer.Argument(help=f"{PRESET} of a comparison.")],
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Train several recipes on the same data, steps and seeds; print one table, and write it.

    All runs, table.md and table.json are written to the folder `out` of the config. An interrupted
    comparison continues when it is started again. Runs without a common validation file are an
    error.
    """
    from vlduet.config import load_comparison_config
    from vlduet.distributed import is_main_process
    from vlduet.workflows.compare import format_table, run_comparison

    comparison = load_comparison_config(config, overrides or [])
    results = run_comparison(comparison)
    if not is_main_process():
        return
    if as_json:
        print_json(results)
    else:
        print(format_table(results))
        logger.info(f"also written to {comparison.out / 'table.md'} and table.json")
