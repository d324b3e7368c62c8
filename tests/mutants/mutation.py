"""Deliberate errors in copies of the package, and the tests that must detect them.

1. `load_mutants`  the errors, entries of the YAML files beside this one
2. `apply_mutant`  a copy of the package with one error; the sources themselves are never changed
3. `run_test`      one test alone, in a process that imports the copy       (processes.py)
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
PACKAGE = ROOT / "src" / "vlduet"
MUTANTS_PER_GROUP = 6


class MutantError(Exception):
    """Error about an entry that does not fit the sources or the tests any more."""


@dataclass(frozen=True)
class Mutant:
    """One plausible wrong edit of one line of the package."""

    area: str
    """Sub-package, or `base` for the modules of the package itself; name of the YAML file."""
    error: str
    """Sentence that says what goes wrong."""
    file: str
    """File of the package, such as `train/optim.py`."""
    old: str
    """Text that occurs exactly once in the file."""
    new: str
    """Text that replaces it."""
    test: str
    """Node id of the test that detects the error."""

    def __str__(self) -> str:
        return f"{self.area}: {self.error}"

    def change_source(self, source: str) -> str:
        """Return the text of the file with the error. Raise MutantError if `old` is not unique."""
        count = source.count(self.old)
        if count != 1:
            raise MutantError(
                f"src/vlduet/{self.file} has {count} times {self.old!r}, not once: "
                f"update this mutant in tests/mutants/{self.area}.yaml"
            )
        return source.replace(self.old, self.new)


def load_mutants(folder: Path = FOLDER) -> list[Mutant]:
    """Return all mutants, file by file in the order of the file names."""
    mutants = []
    for path in sorted(folder.glob("*.yaml")):
        entries: list[dict[str, Any]] = yaml.safe_load(path.read_text(encoding="utf-8"))
        mutants += [Mutant(area=path.stem, **entry) for entry in entries]
    return mutants


def apply_mutant(mutant: Mutant | None, folder: Path, *, package: Path = PACKAGE) -> Path:
    """Copy the package to ``folder/vlduet``, with the error unless it is None; return `folder`.

    Raises:
        MutantError: the text to replace does not occur exactly once; nothing is copied then.
    """
    source = ""
    if mutant is not None:
        source = mutant.change_source((package / mutant.file).read_text(encoding="utf-8"))
    # Compiled files are copied too: compiling the package again would take longer than most tests.
    copy = shutil.copytree(package, folder / "vlduet")
    if mutant is not None:
        path = copy / mutant.file
        path.write_text(source, encoding="utf-8")
        for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*"):
            compiled.unlink()
    return folder


def count_groups(mutants: list[Mutant]) -> int:
    """Return the number of groups of about MUTANTS_PER_GROUP mutants; at least 1."""
    return max(1, round(len(mutants) / MUTANTS_PER_GROUP))


def select_group(mutants: list[Mutant], number: int) -> list[Mutant]:
    """Return every n-th mutant from `number` on, n being the number of groups.

    Neighbours are of one area, so that a group has mutants of nearly all areas.
    """
    return mutants[number :: count_groups(mutants)]


def current_group(mutants: list[Mutant]) -> int:
    """Return the number of the group that ``make test`` runs, from 0.

    It is VLDUET_MUTANTS if that is set, else the hash of the checked-out commit, modulo the number
    of groups; 0 outside of a git repository.
    """
    variable = os.environ.get("VLDUET_MUTANTS")
    if variable is not None:
        return int(variable) % count_groups(mutants)
    command = ["git", "rev-parse", "HEAD"]
    try:
        process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return 0
    return int(process.stdout or "0", 16) % count_groups(mutants)
