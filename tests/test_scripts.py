"""Benchmarks and studies, which no test runs, import what there is: a renamed function would be found hours later."""

from __future__ import annotations

import ast
import importlib
import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted([*ROOT.glob("benchmarks/*.py"), *ROOT.glob("experiments/**/*.py")])


def defined(path: Path) -> set[str]:
    """Names that a file has at its top."""
    found: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {alias.asname or alias.name for alias in node.names}
        else:
            found |= {
                n.id
                for n in ast.walk(node)
                if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
            }
    return found


def missing(script: Path) -> list[str]:
    """What a script imports from the package, or from a script beside or above it, that is not there."""
    lost = []
    for node in ast.walk(ast.parse(script.read_text())):
        if not isinstance(node, ast.ImportFrom) or not node.module:
            continue
        beside = [
            f
            for f in (folder / f"{node.module}.py" for folder in script.parents[:2])
            if f.is_file()
        ]
        for name in (alias.name for alias in node.names):
            if node.module.split(".")[0] == "vlduet":
                module = importlib.import_module(node.module)
                inside = hasattr(module, "__path__") and importlib.util.find_spec(
                    f"{node.module}.{name}"
                )
                there = hasattr(module, name) or inside
            else:
                there = not beside or name in defined(beside[0])
            if not there:
                lost.append(
                    f"{script.relative_to(ROOT)}:{node.lineno}: {node.module} has no {name}"
                )
    return lost


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_script_imports_what_there_is(script: Path) -> None:
    assert not missing(script)


def test_a_lost_name_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(missing.__globals__, "ROOT", tmp_path)
    (tmp_path / "near.py").write_text("here = 1\n")
    (tmp_path / "script.py").write_text(
        "from near import here, gone\nfrom vlduet.model import nano\nfrom vlduet.model.duet import No\n"
    )
    assert missing(tmp_path / "script.py") == [
        "script.py:1: near has no gone",
        "script.py:3: vlduet.model.duet has no No",
    ]
