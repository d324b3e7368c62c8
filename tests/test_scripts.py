"""Benchmarks and experiments, which `make test` does not run, import only names that exist.

Otherwise a renamed function would be noticed hours later.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from helpers.source_names import defined_names, is_name_of_package

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted([*ROOT.glob("benchmarks/*.py"), *ROOT.glob("experiments/**/*.py")])


def find_sibling(script: Path, module: str) -> Path | None:
    """Return the file of a module beside a script or in the folder above it, or None."""
    for folder in script.parents[:2]:
        path = folder / f"{module}.py"
        if path.is_file():
            return path
    return None


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
                exists = is_name_of_package(node.module, alias.name)
            elif sibling is not None:
                exists = alias.name in defined_names(sibling)
            if not exists:
                messages.append(f"{place}:{node.lineno}: {node.module} has no {alias.name}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            names = siblings.get(node.value.id)
            is_special = node.attr.startswith("__")  # such as __doc__, which every module has
            if names is not None and node.attr not in names and not is_special:
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
