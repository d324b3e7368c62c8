"""Run one test with one copy of the package, in a process of its own.

The processes are forked from a server that has imported torch and other large packages, but not
vlduet: importing them again would take longer than most tests.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

ROOT = Path(__file__).parents[2]
TEST_SECONDS = 240
"""Seconds after which a test is stopped; it then counts as an error, not as a detection."""
PRELOADED_MODULES = (
    "torch",
    "transformers.generation",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "peft",
    "hypothesis",
    "pytest",
    "pydantic",
    "PIL.Image",
    "mutants.processes",
)


class Outcome(Enum):
    """Result of one test."""

    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"
    NOT_RUN = "did not run"
    """There is no such test, the package cannot be imported, or the time is over."""


EXIT_STATUSES = {Outcome.PASSED: 10, Outcome.FAILED: 11, Outcome.SKIPPED: 12}
"""Exit status of the process by outcome; any other status means that the test did not run."""


@dataclass(frozen=True)
class PytestRun:
    """Outcome of one test with the output of pytest."""

    outcome: Outcome
    output: str


class PassCounter:
    """Plugin of pytest that counts the tests that pass."""

    def __init__(self) -> None:
        self.count = 0

    def pytest_runtest_logreport(self, report: object) -> None:
        """Count a test whose body has passed."""
        is_body = getattr(report, "when", "") == "call"
        self.count += is_body and getattr(report, "outcome", "") == "passed"


def run_test(test: str, source_folder: Path) -> PytestRun:
    """Run one test alone in a process that imports the package in `source_folder`.

    Args:
        test: node id; without parameters in brackets, the test runs with each of them.
        source_folder: folder that contains the package, such as `src`.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED_MODULES))
    with tempfile.NamedTemporaryFile("r", errors="replace") as output:
        arguments = (test, str(source_folder.resolve()), output.name)
        process = context.Process(target=_run_and_exit, args=arguments)
        process.start()
        process.join(TEST_SECONDS)
        if process.is_alive():
            process.kill()
            process.join(10)
            return PytestRun(Outcome.NOT_RUN, f"stopped after {TEST_SECONDS} s")
        outcomes = {status: outcome for outcome, status in EXIT_STATUSES.items()}
        outcome = outcomes.get(process.exitcode or 0, Outcome.NOT_RUN)
        return PytestRun(outcome, output.read())


def _run_and_exit(test: str, source_folder: str, output: str) -> None:
    """Run a test in this process, with standard output and error in a file, and exit."""
    with open(output, "w", encoding="utf-8") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    os.chdir(ROOT)
    for name in [name for name in os.environ if name.startswith("PYTEST_")]:
        del os.environ[name]
    os.environ |= {
        "PYTHONPATH": source_folder,
        "OMP_NUM_THREADS": "1",
        # Examples that an earlier run stored must not decide what is detected.
        "HYPOTHESIS_STORAGE_DIRECTORY": f"{source_folder}/hypothesis",
    }
    sys.path.insert(0, source_folder)
    import pytest

    import vlduet

    # An editable installation of the package must not come first.
    assert Path(vlduet.__file__).parent == Path(source_folder) / "vlduet", vlduet.__file__
    counter = PassCounter()
    options = ["-q", "-x", "-p", "no:cacheprovider", "--hypothesis-seed=0"]
    status = pytest.main([*options, test], plugins=[counter])
    sys.stdout.flush()
    if status == pytest.ExitCode.TESTS_FAILED:
        status = EXIT_STATUSES[Outcome.FAILED]
    elif status == pytest.ExitCode.OK:
        status = EXIT_STATUSES[Outcome.PASSED if counter.count else Outcome.SKIPPED]
    sys.exit(int(status))
