"""The public names can be imported, are documented, and cost nothing until they are used."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import vlduet
from helpers.processes import run_process

HEAVY_MODULES = (
    "torch",
    "transformers",
    "peft",
    "PIL",
    "lancedb",
    "pyarrow",
    "numpy",
    "matplotlib",
)


@pytest.mark.parametrize("name", sorted(set(vlduet.__all__) - {"__version__"}))
def test_a_public_name_is_documented(name: str) -> None:
    value = getattr(vlduet, name)
    assert (value.__doc__ or "").strip(), f"vlduet.{name} has no docstring"
    assert value.__module__.startswith("vlduet."), f"vlduet.{name} is not ours"
    for method, member in vars(value).items() if isinstance(value, type) else ():
        if callable(member) and not method.startswith("_"):
            assert (member.__doc__ or "").strip(), f"vlduet.{name}.{method} has no docstring"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = vlduet.no_such_name


def test_the_version_equals_that_of_the_package() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert vlduet.__version__ == project["version"]


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own and return its output."""
    return run_process([sys.executable, "-c", code])


HELP = (
    "import sys; sys.argv = ['vlduet', '--help']\n"
    "from vlduet.cli.main import main\n"
    "try:\n    main()\nexcept SystemExit:\n    pass"
)


@pytest.mark.parametrize("code", ["import vlduet", HELP], ids=["import", "help"])
def test_importing_and_help_load_nothing_heavy(code: str) -> None:
    names = f"set(sys.modules) & {set(HEAVY_MODULES)!r}"
    process = run_python(f"import sys\n{code}\nprint('loaded:', *sorted({names}))")
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines()[-1] == "loaded:", process.stdout.splitlines()[-1]


def test_help_prints_the_usage() -> None:
    process = run_python(HELP)
    assert process.returncode == 0, process.stderr
    assert "Usage" in process.stdout
