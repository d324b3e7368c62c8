"""Benchmarks and experiments, which `make test` does not run, import only names that exist.

Otherwise a renamed function would be noticed hours later.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted([*ROOT.glob("benchmarks/*.py"), *ROOT.glob("experiments/**/*.py")])


def defined_names(path: Path) -> set[str]:
    """Return the names that a file binds at its top level."""
    names: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
        else:
            for child in ast.walk(node):
                if isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store):
                    names.add(child.id)
    return names


def find_sibling(script: Path, module: str) -> Path | None:
    """Return the file of a module beside a script or in the folder above it, or None."""
    for folder in script.parents[:2]:
        path = folder / f"{module}.py"
        if path.is_file():
            return path
    return None


def is_name_of_module(module: str, name: str) -> bool:
    """Return whether a module of the package has an attribute or a submodule of that name."""
    imported = importlib.import_module(module)
    if hasattr(imported, name):
        return True
    return hasattr(imported, "__path__") and bool(importlib.util.find_spec(f"{module}.{name}"))


def list_missing_names(script: Path, *, root: Path = ROOT) -> list[str]:
    """Return a message for every name that a script uses and that does not exist.

    Checked are names imported from the package, and names of other scripts, imported or used as an
    attribute of the script's module.
    """
    tree = ast.parse(script.read_text(encoding="utf-8"))
    place = script.relative_to(root)
    messages = []
    siblings: dict[str, set[str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                sibling = find_sibling(script, alias.name)
                if sibling is not None:
                    siblings[alias.asname or alias.name] = defined_names(sibling)
        if not isinstance(node, ast.ImportFrom) or not node.module:
            continue
        sibling = find_sibling(script, node.module)
        for alias in node.names:
            exists = True
            if node.module.split(".")[0] == "vlduet":
                exists = is_name_of_module(node.module, alias.name)
            elif sibling is not None:
                exists = alias.name in defined_names(sibling)
            if not exists:
                messages.append(f"{place}:{node.lineno}: {node.module} has no {alias.name}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            names = siblings.get(node.value.id)
            if names is not None and node.attr not in names:
                messages.append(f"{place}:{node.lineno}: {node.value.id} has no {node.attr}")
    return messages


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_script_uses_only_names_that_exist(script: Path) -> None:
    assert not list_missing_names(script)


def test_a_name_that_does_not_exist_is_reported(tmp_path: Path) -> None:
    (tmp_path / "near.py").write_text("present = 1\n")
    script = tmp_path / "script.py"
    script.write_text(
        "from near import present, absent\n"
        "from vlduet.model import nano\n"
        "from vlduet.model.duet import No\n"
        "import near\n"
        "near.absent_attribute\n"
    )
    assert list_missing_names(script, root=tmp_path) == [
        "script.py:1: near has no absent",
        "script.py:3: vlduet.model.duet has no No",
        "script.py:5: near has no absent_attribute",
    ]
