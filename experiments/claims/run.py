"""Train and measure the rows of the protocol: one JSON file per row and seed.

    vlduet model nano models/nano && vlduet model minilm models/minilm
    vlduet data fetch stamps emoji gimp-help campaigns --to data
    python experiments/claims/run.py --work runs/claims --plan
    python experiments/claims/run.py --work runs/claims --minutes 60
    python experiments/claims/report.py

It can be stopped at any time and started again, on several days or machines: rows with results are
skipped, an interrupted training resumes, and results of other settings are refused. Rows are run in
the order of the protocol, the most informative first, seed by seed.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pilot import run_pilot
from protocol import Protocol, StudyPaths, load_protocol
from results import list_missing_measures, result_path
from rows import RowRun, describe_settings, run_row

from vlduet.cli.main import keep_freed_memory
from vlduet.errors import ConfigError
from vlduet.logs import install_log_handler, logger

MEASURE_MINUTES = 4.0
"""Estimated minutes of one core to measure further groups of a trained row."""
RESULTS_FOLDER = Path(__file__).parents[2] / "docs" / "results" / "claims"


@dataclass(frozen=True)
class PlannedRun:
    """A row and seed, and whether its results exist."""

    run: RowRun
    missing: list[str]
    """Groups of measures to run."""
    has_results: bool
    """A file has results of other groups."""

    @property
    def is_done(self) -> bool:
        """Whether there is nothing to run."""
        return not self.missing

    @property
    def minutes(self) -> float:
        """Estimated minutes that are left."""
        if self.is_done:
            return 0.0
        is_trained = self.has_results and (self.run.folder / "model").exists()
        return MEASURE_MINUTES if is_trained else self.run.row.minutes


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, then plan, pilot, or train and measure."""
    options = _parse_options(arguments)
    install_log_handler()
    protocol = load_protocol(options.protocol)
    paths = StudyPaths(options.data, options.model, options.minilm, options.work, options.results)
    if options.pilot is not None:
        torch.set_num_threads(options.threads)
        run_pilot(protocol, options.pilot, paths)
        return
    plan = make_plan(protocol, paths, options)
    if options.plan:
        print(format_plan(protocol, plan))
        return
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    run_plan(protocol, plan, minutes=options.minutes)


def _parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of the command line; wrong options end the process with a message."""
    parser = argparse.ArgumentParser(description="Train and measure the rows of the claims.")
    parser.add_argument("--work", type=Path, required=True, help="trained models and features")
    parser.add_argument("--data", type=Path, default=Path("data"), help="fetched corpora")
    parser.add_argument("--model", type=Path, default=Path("models/nano"), help="base model")
    parser.add_argument("--minilm", type=Path, default=Path("models/minilm"))
    parser.add_argument("--results", type=Path, default=RESULTS_FOLDER, help="folder of the JSON")
    parser.add_argument("--protocol", type=Path, default=Path(__file__).parent / "protocol.yaml")
    parser.add_argument("--plan", action="store_true", help="print what is left, and run nothing")
    parser.add_argument("--pilot", metavar="TRACK", help="determine the number of steps of a track")
    parser.add_argument("--claims", type=int, nargs="+", help="only rows of these claims")
    parser.add_argument("--rows", nargs="+", help="only these rows")
    parser.add_argument("--seeds", type=int, nargs="+", help="only these seeds")
    parser.add_argument("--without", nargs="+", default=[], help="leave these measures for later")
    parser.add_argument("--minutes", type=float, help="start no row that would end later")
    parser.add_argument("--threads", type=int, default=1, choices=(1, 2))
    return parser.parse_args(arguments)


def make_plan(
    protocol: Protocol, paths: StudyPaths, options: argparse.Namespace
) -> list[PlannedRun]:
    """Return the selected rows with their seeds: all rows of the first seed, then of the next.

    Args:
        options: `claims`, `rows` and `seeds`, where None selects all; `without`, groups of measures
            that are not run.

    Raises:
        ConfigError: an unknown claim, row or seed, or results of other settings.
    """
    names = select_rows(protocol, options.claims, options.rows)
    seeds = protocol.seeds if options.seeds is None else options.seeds
    if unknown := [seed for seed in seeds if seed not in protocol.seeds]:
        raise ConfigError(
            f"seeds {unknown} are not in the protocol", place="--seeds", fix="Name others"
        )
    plan = []
    for seed in seeds:
        for name in names:
            row = protocol.rows[name]
            if seed in protocol.get_seeds(row):
                run = RowRun(name, row, seed, paths)
                settings = describe_settings(protocol, run)
                path = result_path(paths.results, name, seed)
                measures = protocol.get_measures(row)
                missing = list_missing_measures(path, settings, measures)
                missing = [name for name in missing if name not in options.without]
                plan.append(PlannedRun(run, missing, path.exists()))
    return plan


def select_rows(
    protocol: Protocol, claims: Sequence[int] | None, rows: Sequence[str] | None
) -> list[str]:
    """Return the names of the rows of some claims, or some rows, in the order of the protocol.

    Raises ConfigError for an unknown claim or row.
    """
    rows_of_claims = {claim.id: protocol.list_claim_rows(claim) for claim in protocol.claims}
    selected = set(protocol.rows)
    if claims is not None:
        _require_known(claims, list(rows_of_claims), option="--claims")
        selected = set(itertools.chain.from_iterable(rows_of_claims[claim] for claim in claims))
    if rows is not None:
        _require_known(rows, list(protocol.rows), option="--rows")
        selected &= set(rows)
    return [name for name in protocol.rows if name in selected]


def _require_known(values: Sequence[object], names: Sequence[object], *, option: str) -> None:
    """Raise ConfigError for the first value that is not among the names."""
    for value in values:
        if value not in names:
            fix = f"Name some of {', '.join(map(str, names))}"
            raise ConfigError(f"unknown: {value}", place=option, fix=fix)


def format_plan(protocol: Protocol, plan: Sequence[PlannedRun]) -> str:
    """Return the plan as text: every row with its seeds and minutes, and the sum."""
    lines = []
    for name in dict.fromkeys(planned.run.name for planned in plan):
        runs = [planned for planned in plan if planned.run.name == name]
        num_done = sum(planned.is_done for planned in runs)
        minutes = sum(planned.minutes for planned in runs)
        lines.append(f"{name:40} {num_done}/{len(runs)} seeds done, {minutes:6.1f} minutes left")
    total = sum(planned.minutes for planned in plan)
    lines.append(
        f"{total:.0f} minutes of one core left, of {protocol.core_minutes:.0f} in the protocol"
    )
    return "\n".join(lines)


def run_plan(protocol: Protocol, plan: Sequence[PlannedRun], *, minutes: float | None) -> None:
    """Run what is left of a plan; stop before a row that would end after `minutes`."""
    start = time.monotonic()
    for planned in plan:
        if planned.is_done:
            continue
        elapsed = (time.monotonic() - start) / 60
        if minutes is not None and elapsed + planned.minutes > minutes:
            logger.info(f"stopped after {elapsed:.1f} minutes, before {planned.run.label}")
            return
        logger.info(f"{planned.run.label}, after {elapsed:.1f} minutes")
        run_row(protocol, planned.run, measures=planned.missing)


if __name__ == "__main__":
    main()
