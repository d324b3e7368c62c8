"""A group of the mutants, another one for every commit, and the form of all of them.

``VLDUET_MUTANTS=3 make test ARGS=tests/mutants`` runs group 3; ``make mutants`` runs all of them.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from mutants.mutation import (
    PACKAGE,
    ROOT,
    Mutant,
    MutantError,
    apply_mutant,
    count_groups,
    current_group,
    load_mutants,
    select_group,
)
from mutants.processes import Outcome, run_test

MUTANTS = load_mutants()
GROUP = current_group(MUTANTS)
MIN_MUTANTS = 60
MIN_MUTANTS_PER_AREA = 2


@pytest.mark.parametrize("mutant", select_group(MUTANTS, GROUP), ids=str)
def test_the_test_of_a_mutant_detects_it(mutant: Mutant, tmp_path: Path) -> None:
    run = run_test(mutant.test, apply_mutant(mutant, tmp_path))
    assert run.outcome is Outcome.FAILED, f"group {GROUP}: {mutant.test}\n{run.output}"


def test_every_mutant_fits_the_sources_and_names_a_test() -> None:
    for mutant in MUTANTS:
        source = mutant.change_source((PACKAGE / mutant.file).read_text(encoding="utf-8"))
        compile(source, mutant.file, "exec")
        test_file, _, name = mutant.test.partition("::")
        functions = (ROOT / test_file).read_text(encoding="utf-8")
        assert f"def {name.partition('[')[0]}(" in functions, mutant


def test_there_are_sixty_mutants_and_two_of_every_area() -> None:
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    counts = Counter(mutant.area for mutant in MUTANTS)
    assert counts.keys() == folders | {"base"}
    assert min(counts.values()) >= MIN_MUTANTS_PER_AREA
    assert len(MUTANTS) >= MIN_MUTANTS
    for mutant in MUTANTS:
        folder = mutant.file.partition("/")[0] if "/" in mutant.file else "base"
        assert folder == mutant.area, mutant


def test_the_groups_are_all_mutants_once() -> None:
    groups = [select_group(MUTANTS, number) for number in range(count_groups(MUTANTS))]
    mutants = [mutant for group in groups for mutant in group]
    assert sorted(map(str, mutants)) == sorted(map(str, MUTANTS))
    assert all(5 <= len(group) <= 7 for group in groups)


def test_the_variable_selects_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLDUET_MUTANTS", "1")
    assert current_group(MUTANTS) == 1


def test_a_mutant_is_applied_to_a_copy(tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "optim.py").write_text("rate = new or old\n")
    mutant = Mutant("train", "An error.", "optim.py", "new or old", "old", test="")
    copy = apply_mutant(mutant, tmp_path / "copy", package=package)
    assert (copy / "vlduet" / "optim.py").read_text() == "rate = old\n"
    assert (package / "optim.py").read_text() == "rate = new or old\n"


@pytest.mark.parametrize("old", ["missing", "e"])
def test_a_text_that_is_missing_or_repeated_names_the_file_to_update(old: str) -> None:
    mutant = Mutant("train", "An error.", "optim.py", old, "", test="")
    with pytest.raises(MutantError, match=r"update this mutant in tests/mutants/train\.yaml"):
        mutant.change_source("here and there")


def test_a_mutant_that_a_test_does_not_detect_survives(tmp_path: Path) -> None:
    mutant = next(mutant for mutant in MUTANTS if mutant.file == "train/optim.py")
    source_folder = apply_mutant(mutant, tmp_path)
    test = "tests/unit/test_errors.py"
    assert run_test(test, source_folder).outcome is Outcome.PASSED
    assert run_test(f"{test}::test_of_no_name", source_folder).outcome is Outcome.NOT_RUN
