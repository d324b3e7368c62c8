"""Every defence that the documentation lists names a test that exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
REFERENCE = re.compile(r"`(tests/[\w/]+\.py)(?:::(\w+))?`")
DOCUMENTS = ("threat-model.md", "reliability.md")


def read_references(document: str) -> list[tuple[str, str]]:
    """Return (file, test or "") of all tests that a document names."""
    return REFERENCE.findall((ROOT / "docs" / document).read_text(encoding="utf-8"))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_named_test_exists(document: str) -> None:
    missing = []
    for file, name in read_references(document):
        path = ROOT / file
        functions = set()
        if path.is_file():
            tree = ast.parse(path.read_text(encoding="utf-8"))
            functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        if not functions or (name and name not in functions):
            missing.append(f"{file}::{name}")
    assert not missing


def test_every_row_of_a_table_of_defences_names_its_test() -> None:
    text = (ROOT / "docs/threat-model.md").read_text(encoding="utf-8")
    defences = text.partition("## Defences")[2].partition("## Not defended")[0]
    rows = [line for line in defences.splitlines() if line.startswith("| ")]
    rows = [line for line in rows if not line.startswith("| Threat")]
    assert len(rows) > 15
    assert [row for row in rows if not REFERENCE.search(row)] == []
