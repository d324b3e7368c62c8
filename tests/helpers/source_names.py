"""Find the names that a Python file or a module of the package defines, without importing it."""

from __future__ import annotations

import ast
from pathlib import Path

SRC = Path(__file__).parents[2] / "src"


def defined_names(path: Path) -> set[str]:
    """Return the names that a file binds at its top level, imports included."""
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


def is_name_of_package(module: str, name: str) -> bool:
    """Return whether a module such as `vlduet.data.records` has an attribute or a submodule.

    The public names of `vlduet` itself are those of its `__all__`.
    """
    path = SRC.joinpath(*module.split("."))
    if module == "vlduet":
        import vlduet

        is_part = (path / name).is_dir() or (path / f"{name}.py").is_file()
        return name in vlduet.__all__ or is_part
    if path.is_dir():
        if (path / name).is_dir() or (path / f"{name}.py").is_file():
            return True
        path = path / "__init__"
    return name in defined_names(path.with_suffix(".py"))
