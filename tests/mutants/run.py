"""Apply every mutant and run the test that must detect it: ``make mutants``.

    PYTHONPATH=tests python -m mutants.run [--only AREA[,AREA]] [--group NUMBER] [--workers 2]

1. Every test that a mutant names must pass with the package as it is.
2. Every mutant must make its test fail.

The exit status is 1 if a mutant survives, or if a mutant or a test does not fit the sources.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from mutants.mutation import Mutant, MutantError, apply_mutant, load_mutants, select_group
from mutants.processes import Outcome, PytestRun, run_test


@dataclass(frozen=True)
class Verdict:
    """Result of one mutant."""

    mutant: Mutant
    name: str
    """`detected`, `SURVIVED` or `ERROR`."""
    reason: str = ""
    """Explanation of an error."""


def run_unchanged(test: str) -> PytestRun:
    """Run a test with a copy of the package as it is."""
    with tempfile.TemporaryDirectory() as folder:
        return run_test(test, apply_mutant(None, Path(folder)))


def run_mutant(mutant: Mutant) -> Verdict:
    """Apply one mutant to a copy of the package and run its test."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            source_folder = apply_mutant(mutant, Path(folder))
        except MutantError as error:
            return Verdict(mutant, "ERROR", str(error))
        run = run_test(mutant.test, source_folder)
    if run.outcome is Outcome.FAILED:
        return Verdict(mutant, "detected")
    if run.outcome is Outcome.PASSED:
        return Verdict(mutant, "SURVIVED")
    return Verdict(mutant, "ERROR", f"{run.outcome.value}\n{run.output}")


def select_mutants(areas: str | None, group: int | None) -> list[Mutant]:
    """Return the mutants of some areas (separated by commas), or of one group, or all."""
    mutants = load_mutants()
    if areas is not None:
        mutants = [mutant for mutant in mutants if mutant.area in areas.split(",")]
    return mutants if group is None else select_group(mutants, group)


def print_table(verdicts: Iterable[Verdict]) -> None:
    """Print the number of detected mutants by area."""
    counts = Counter((verdict.mutant.area, verdict.name == "detected") for verdict in verdicts)
    areas = sorted({area for area, _ in counts})
    print(f"\n{'area':12} {'detected':>8} {'not':>4}")
    for area in areas:
        print(f"{area:12} {counts[area, True]:8} {counts[area, False]:4}")


def main() -> int:
    """Run the mutants of the command line and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--only", metavar="AREAS", help="areas, such as train,model")
    parser.add_argument("--group", type=int, help="only one group, numbered from 0")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    mutants = select_mutants(options.only, options.group)
    tests = sorted({mutant.test for mutant in mutants})
    start = time.monotonic()
    print(f"{len(mutants)} mutants; first their {len(tests)} tests without any error", flush=True)
    is_sound = bool(mutants)
    with ThreadPoolExecutor(options.workers) as executor:
        for test, run in zip(tests, executor.map(run_unchanged, tests), strict=True):
            if run.outcome is not Outcome.PASSED:
                is_sound = False
                print(f"ERROR     {test}: {run.outcome.value}\n{run.output}", flush=True)
        print(f"{time.monotonic() - start:.0f} s; now with the errors", flush=True)
        verdicts = []
        for verdict in executor.map(run_mutant, mutants):
            verdicts.append(verdict)
            print(f"{verdict.name:9} {verdict.mutant}", flush=True)
            if verdict.name != "detected":
                print(f"          {verdict.mutant.test}\n{verdict.reason}", flush=True)
    print_table(verdicts)
    num_detected = sum(verdict.name == "detected" for verdict in verdicts)
    print(f"{num_detected} of {len(mutants)} detected in {time.monotonic() - start:.0f} s")
    return 0 if is_sound and num_detected == len(mutants) else 1


if __name__ == "__main__":
    sys.exit(main())
