"""`vlduet train` and `vlduet compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the verbs."""
    app.command()(train)
    app.command()(compare)


def train(
    config: Annotated[Path, typer.Argument(help="A YAML config, see configs/.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings to change, as train.lr=1e-4.")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the run's last saved state.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as one JSON object.")
    ] = False,
) -> None:
    """Train a model on one or several losses; with torchrun, on any number of processes."""
    import json

    from vlduet import config as settings_of
    from vlduet.logs import logger, read_metrics

    settings = settings_of.load_run_config(config, overrides or [])
    from vlduet.workflows.validation import make_validator

    evaluate = (
        make_validator(settings.data.validation, seed=settings.seed)
        if settings.data.validation
        else None
    )
    if dry_run:
        from vlduet.train.plan import plan_run

        facts = plan_run(settings)
        typer.echo(
            json.dumps(facts)
            if as_json
            else "\n".join(f"{key:28} {value}" for key, value in facts.items())
        )
        return
    from vlduet import distributed
    from vlduet.train.loop import train as run

    folder = run(settings, evaluate=evaluate, resume=resume)
    if not distributed.is_main_process():
        return
    last = read_metrics(settings.out / "metrics.jsonl")[-1]
    if as_json:
        typer.echo(json.dumps({"model": str(folder), **last}))
    else:
        logger.info(f"trained: {folder} (metrics in {settings.out / 'metrics.jsonl'})")


def compare(
    config: Annotated[
        Path, typer.Argument(help="A YAML config of a comparison, see configs/compare-nano.yaml.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Its keys to change, as out=runs/other.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as one JSON object.")
    ] = False,
) -> None:
    """Train several recipes on the same data, steps and seeds, and write one table; started again, it goes on."""
    import json

    from vlduet import config as settings_of
    from vlduet import distributed
    from vlduet.logs import logger
    from vlduet.workflows import compare as comparison

    settings = settings_of.load_comparison_config(config, overrides or [])
    found = comparison.run_comparison(settings)
    if not distributed.is_main_process():
        return
    if as_json:
        typer.echo(json.dumps(found))
    else:
        typer.echo(comparison.format_table(found))
        logger.info(f"the same in {settings.out / 'table.md'} and table.json")
