"""Counts of what makes Python code hard to read, so that a test can keep them low.

For one tree of files, `measure_tree` counts filler names, unclear docstrings, private words in
identifiers, class names that are defined twice, long lines and nested comprehensions. The counts
are a lower bound: a tree without any of them can still be unclear.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

VAGUE_WORDS = (
    "found told made some one given each asked kept seen wanted here there several whole every "
    "shown beside mine ours both others rest what who known said had taken own way thing things "
    "lot bit it us them any most few all_of"
)
VAGUE_NAMES = frozenset(VAGUE_WORDS.split())
UNCLEAR_OPENING = re.compile(r"^(What|Who|Whose|Of|That|Those|Which|How|Where|By|In|Such|Said)\b")
PRIVATE_WORDS = re.compile(
    r"(?:^|_)(talks?|told|guests?|welcome|habits|lay|laid|mend|words|beside|grown|shown|players?|"
    r"judges|furniture|house|room|speaks|silent|gone|moved?|lanes|sweeps|piece|prompted|written|"
    r"forbidden|held)(?:_|$)",
    re.IGNORECASE,
)
MAX_COLUMNS = 100
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass
class Readability:
    """Places of one tree that count, and the totals that they are divided by."""

    num_bindings: int = 0
    """Number of assigned names and arguments."""
    num_docstrings: int = 0
    """Number of strings that stand alone as a statement, which includes those under fields."""
    num_lines: int = 0
    """Number of lines of all files."""
    vague_names: list[str] = field(default_factory=list)
    """Bindings that are a filler word, each as `FILE:LINE NAME`; the same form in all lists."""
    unclear_docstrings: list[str] = field(default_factory=list)
    """Docstrings that open with a word such as "That", which needs the line above."""
    private_words: list[str] = field(default_factory=list)
    """Files, functions and classes that are named with a word of a private vocabulary."""
    repeated_classes: list[str] = field(default_factory=list)
    """Class names that more than one file defines."""
    long_lines: list[str] = field(default_factory=list)
    """Lines of more than 100 columns."""
    nested_comprehensions: list[str] = field(default_factory=list)
    """Comprehensions that contain a comprehension."""


def measure_tree(root: Path) -> Readability:
    """Count the places of every Python file under `root`, in the order of the file names."""
    result = Readability()
    class_files: dict[str, set[str]] = {}
    for path in sorted(root.rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        name = path.relative_to(root).as_posix()
        if PRIVATE_WORDS.search(path.stem):
            result.private_words.append(f"{name}:1 {path.name}")
        lines = source.splitlines()
        result.num_lines += len(lines)
        for number, line in enumerate(lines, 1):
            if len(line) > MAX_COLUMNS:
                result.long_lines.append(f"{name}:{number} {len(line)} columns")
        for node in ast.walk(ast.parse(source)):
            _count_node(result, node, file_name=name)
            if isinstance(node, ast.ClassDef):
                class_files.setdefault(node.name, set()).add(name)
    for class_name, file_names in sorted(class_files.items()):
        if len(file_names) > 1:
            result.repeated_classes.append(f"{class_name} in {', '.join(sorted(file_names))}")
    return result


def _count_node(result: Readability, node: ast.AST, *, file_name: str) -> None:
    """Add what one syntax node contributes to the counts of `result`."""
    binding = _bound_name(node)
    if binding is not None:
        result.num_bindings += 1
        if binding.strip("_") in VAGUE_NAMES:
            result.vague_names.append(f"{file_name}:{_line(node)} {binding}")
    for docstring in _standalone_strings(node):
        result.num_docstrings += 1
        text = str(ast.literal_eval(docstring)).strip()
        if UNCLEAR_OPENING.match(text):
            first_line = text.splitlines()[0]
            result.unclear_docstrings.append(f"{file_name}:{docstring.lineno} {first_line}")
    if isinstance(node, DOCUMENTED) and not isinstance(node, ast.Module):
        separated = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", node.name)
        if PRIVATE_WORDS.search(separated):
            result.private_words.append(f"{file_name}:{node.lineno} {node.name}")
    if isinstance(node, COMPREHENSIONS):
        inner = (child for child in ast.walk(node) if child is not node)
        if any(isinstance(child, COMPREHENSIONS) for child in inner):
            result.nested_comprehensions.append(f"{file_name}:{node.lineno}")


def _bound_name(node: ast.AST) -> str | None:
    """Return the name that a node binds, or None."""
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        return node.id
    if isinstance(node, ast.arg):
        return node.arg
    return None


def _standalone_strings(node: ast.AST) -> Iterator[ast.expr]:
    """Yield the strings in the body of a node that stand alone as a statement."""
    body = getattr(node, "body", None)
    if not isinstance(body, list):
        return
    for statement in body:
        if (
            isinstance(statement, ast.Expr)
            and isinstance(statement.value, ast.Constant)
            and isinstance(statement.value.value, str)
        ):
            yield statement.value


def _line(node: ast.AST) -> int:
    """Return the line number of a node that has one."""
    return int(getattr(node, "lineno", 0))
