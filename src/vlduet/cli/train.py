"""`vlduet train` and `vlduet compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperCommand

from vlduet.cli._common import Json, print_json, print_text
from vlduet.logs import logger

PRESET = "A preset (see 'vlduet config list') or a YAML file"
RESUME = "Continue from the run's last saved state; with auto, start if there is none."

Overrides = Annotated[
    list[str] | None, typer.Argument(help="Keys of the config to change, such as train.lr=1e-4.")
]


class TrainCommand(TyperCommand):
    """Command with an option ``--resume`` whose value may be left out."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the words of the command line after ``--resume`` has got its value.

        Without ``auto`` behind it, it is ``state``: a parser would take the next word.
        """
        words = []
        is_value = False
        for word, following in zip(args, [*args[1:], ""], strict=True):
            if word == "--resume":
                word = "--resume=auto" if following == "auto" else "--resume=state"
            if not is_value:
                words.append(word)
            is_value = word == "--resume=auto" and following == "auto"
        return super().parse_args(ctx, words)


def train(
    config: Annotated[str, typer.Argument(help=f"{PRESET}.")],
    overrides: Overrides = None,
    resume: Annotated[
        Literal["auto", "state"] | None, typer.Option(metavar="[auto]", help=RESUME)
    ] = None,
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

    validator = None
    if run_config.data.validation is not None:
        validator = make_config_validator(run_config, seed=run_config.seed)
    if dry_run:
        from vlduet.train.plan import plan_run

        plan = plan_run(run_config)
        if as_json:
            print_json(plan)
            return
        risks = plan.pop("warnings")
        for key, value in plan.items():
            print_text(f"{key:28} {value}")
        for risk in risks:
            print_text(f"warning: {risk}")
        return
    from vlduet.distributed import is_main_process
    from vlduet.logs import read_metrics
    from vlduet.train import loop
    from vlduet.train.checkpointing import ResumeMode

    mode: ResumeMode = "auto" if resume == "auto" else resume is not None
    calibrate = validator.calibrate if validator else None
    folder = loop.train(run_config, evaluate=validator, calibrate=calibrate, resume=mode)
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
    error. With `reference` or `benchmarks` in the config, the trained models are measured too.
    """
    from vlduet.config import load_comparison_config
    from vlduet.distributed import is_main_process
    from vlduet.eval.benchmarks.registry import get_benchmark
    from vlduet.eval.plain_questions import PLAIN_QUESTIONS
    from vlduet.harness.builtin import EvaluationSettings, evaluate_model
    from vlduet.workflows.compare import format_table, run_comparison
    from vlduet.workflows.comparison_measures import ComparisonMeasures

    comparison = load_comparison_config(config, overrides or [])

    def run_benchmarks(model: Path, folder: Path) -> None:
        """Measure a model on the benchmarks of the comparison, and write the scores to a folder."""
        benchmarks = [get_benchmark(name) for name in comparison.benchmarks]
        if benchmarks:
            data = comparison.benchmark_data
            settings = EvaluationSettings()
            evaluate_model(model, benchmarks, data=data, runs=folder, settings=settings)

    measures = ComparisonMeasures(PLAIN_QUESTIONS, run_benchmarks)
    results = run_comparison(comparison, measures=measures)
    if not is_main_process():
        return
    if as_json:
        print_json(results)
    else:
        print_text(format_table(results))
        logger.info(f"also written to {comparison.out / 'table.md'} and table.json")
