"""Run one test with the package of one folder: ``python run_test.py FOLDER NODE_ID``.

The exit status is one of STATUSES; any other means that the test did not run.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import vlduet

STATUSES = {"passed": 10, "failed": 11, "skipped": 12}
"""Exit statuses by outcome. Python itself exits with 1, for example if the package is broken."""


class PassCounter:
    """Plugin of pytest that counts the tests that pass."""

    def __init__(self) -> None:
        self.count = 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count a test whose body has passed."""
        self.count += report.when == "call" and report.passed


def main(folder: str, test: str) -> int:
    """Run the test and return the exit status."""
    # An editable installation of the package must not come first.
    assert Path(vlduet.__file__).parent == Path(folder).resolve() / "vlduet", vlduet.__file__
    counter = PassCounter()
    options = ["-q", "-x", "-p", "no:cacheprovider", "--hypothesis-seed=0"]
    status = pytest.main([*options, test], plugins=[counter])
    if status == pytest.ExitCode.TESTS_FAILED:
        return STATUSES["failed"]
    if status == pytest.ExitCode.OK:
        return STATUSES["passed" if counter.count else "skipped"]
    return int(status)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
