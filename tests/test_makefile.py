"""`make setup` repairs an environment that a killed `make` left, and keeps a complete one."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from helpers.processes import run_process

MAKEFILE = Path(__file__).parents[1] / "Makefile"

PYTHON = """#!/bin/sh
echo "$*" >> calls
case "$*" in
  "-m venv --clear .venv") rm -rf .venv; mkdir -p .venv/bin; cp with-pip .venv/bin/python ;;
  *"pip"*"install"*) test ! -e no-network || exit 1 ;;
  *"pip"*) test {pip} = with ;;
esac
"""
"""Interpreter that records its arguments, and of whose commands venv, and pip's status, work."""


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with the Makefile and the interpreters `with-pip` and `without-pip`."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(MAKEFILE, tmp_path)
    (tmp_path / "requirements").mkdir()
    for name in ("requirements/lock.txt", "requirements/torch.txt", "pyproject.toml"):
        (tmp_path / name).touch()
    for pip in ("with", "without"):
        file = tmp_path / f"{pip}-pip"
        file.write_text(PYTHON.format(pip=pip))
        file.chmod(0o755)
    return tmp_path


def run_setup(folder: Path) -> tuple[int, int]:
    """Run ``make setup``; return its exit status, and how often it made the environment."""
    (folder / "calls").unlink(missing_ok=True)
    command = ["make", "setup", f"PYTHON={folder / 'with-pip'}"]
    # A make around the tests must not pass on its options.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
    status = run_process(command, env=environment).returncode
    calls = (folder / "calls").read_text() if (folder / "calls").exists() else ""
    return status, calls.count("-m venv")


@pytest.mark.parametrize("state", ["absent", "without pip", "killed in an installation"])
def test_an_incomplete_environment_is_made_anew(checkout: Path, state: str) -> None:
    bin_folder = checkout / ".venv" / "bin"
    if state != "absent":
        bin_folder.mkdir(parents=True)
        pip = "without" if state == "without pip" else "with"
        shutil.copy(checkout / f"{pip}-pip", bin_folder / "python")
    if state == "killed in an installation":
        (checkout / ".venv" / ".incomplete").touch()
    assert run_setup(checkout) == (0, 1)
    assert sorted(path.name for path in (checkout / ".venv").iterdir()) == [".ready", "bin"]
    assert run_setup(checkout) == (0, 0), "nothing is left to do"


def test_an_error_of_pip_keeps_the_environment(checkout: Path) -> None:
    (checkout / "no-network").touch()
    assert run_setup(checkout) == (2, 1)
    assert not (checkout / ".venv" / ".ready").exists()
    (checkout / "no-network").unlink()
    assert run_setup(checkout) == (0, 0)
    assert (checkout / ".venv" / ".ready").exists()
