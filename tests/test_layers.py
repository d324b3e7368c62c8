"""Imports go one way. The drawing is in docs/design.md; this file is what holds it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src"

LEAVES = {"errors", "config", "files", "logs", "distributed", "packages"}
ANYONE = {"errors"}

# What a room may import besides itself. A room that is not here may not exist.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "config": ANYONE,
    "files": ANYONE,
    # A metrics file is one of those that a kill may cut.
    "logs": ANYONE | {"files"},
    "distributed": ANYONE,
    "packages": ANYONE | {"logs"},
    # Losses are functions of tensors; sums over ranks are part of their arithmetic.
    "objectives": ANYONE | {"distributed"},
    "data": LEAVES,
    "model": LEAVES | {"data", "objectives"},
    "recipes": LEAVES | {"data", "model", "objectives"},
    "train": LEAVES | {"data", "model", "objectives", "recipes"},
    "retrieval": LEAVES | {"data", "model"},
    # Protocols get functions, so that any model can be measured.
    "eval": LEAVES | {"data"},
    "rag": LEAVES | {"data", "model", "retrieval"},
    # What `train` is handed to measure a model with: train itself knows no benchmark.
    "validation": LEAVES | {"data", "model", "objectives", "retrieval", "eval"},
    # Several runs and one table, for the cli.
    "compare": LEAVES | {"train", "validation"},
    # A model's functions for the benchmarks, which know no model.
    "evaluation": LEAVES | {"data", "model", "eval"},
    # Models in others' harnesses.
    "plugins": LEAVES | {"data", "model", "evaluation"},
    # A record as the model sees it, for the cli.
    "show": LEAVES | {"data", "model", "recipes", "train"},
    # Hard negatives are nearest neighbours, embedded and kept as an index's are, and told apart as the losses do.
    "mining": LEAVES | {"data", "model", "retrieval"},
    # Captions that a model writes: a records' file in, a records' file out.
    "captioning": LEAVES | {"data", "model"},
    # A model looked into, on a page like the report's.
    "analysis": LEAVES | {"data", "model", "eval"},
    # Two records beside each other, as a recipe's encoders or a model compare them.
    "align": LEAVES | {"data", "model", "objectives", "recipes", "train", "eval"},
    "serve": LEAVES | {"data", "model", "retrieval", "rag"},
}
EVERYTHING_BELOW = set(MAY_IMPORT)
MAY_IMPORT |= {
    "demo": EVERYTHING_BELOW,
    "cli": EVERYTHING_BELOW | {"demo"},
    # The public names, imported on first use.
    "__init__": EVERYTHING_BELOW,
}

# One door a heavy dependency: the only files that may name it.
DOORS: dict[str, set[str]] = {
    # encoders: frozen judges are any checkpoint of transformers, and none of them is a backbone.
    # bart: a judge of fluency, which is neither.
    "transformers": {
        "model/backbone.py",
        "encoders/fluency.py",
        "model/generation/continuous.py",
        "encoders/frozen.py",
        "model/families/llava.py",
        "model/generation/beam.py",
        "model/nano.py",
        "model/processing.py",
    },
    "peft": {"model/adapters.py"},
    "PIL": {"data/images.py"},
    "lancedb": {"retrieval/stores/lance.py"},
    "pyarrow": {"retrieval/stores/lance.py", "data/*"},
    "gguf": {"model/nano.py"},
    "numba": {"objectives/gak/cpu_numba.py"},
    "triton": {"objectives/fused.py"},
    "yaml": {"config.py"},
    "filelock": {"packages.py", "retrieval/build.py"},
    "mteb": {"harness/mteb.py"},
    "lmms_eval": {"harness/lmms_eval.py"},
    "starlette": {"serve/app.py"},
    "uvicorn": {"serve/app.py"},
    "typer": {"cli/*"},
    "rich": {"cli/*", "logs.py"},
    "tensorboard": {"logs.py"},
    "torch.utils.tensorboard": {"logs.py"},
}
# The same, where the file is its room's own choice: at most one.
ONE_FILE = {"datasets", "resvg_py"}
# Peers to compare with in tests and benchmarks, and what would pull CUDA builds (docs/install.md).
NEVER = {
    "sentence_transformers",
    "sklearn",
    "matplotlib",
    "tslearn",
    "torchvision",
    "torchaudio",
    "timm",
}


def files() -> list[Path]:
    return sorted((SRC / "vlduet").rglob("*.py"))


def name(path: Path) -> str:
    return path.relative_to(SRC / "vlduet").as_posix()


def room(path: Path) -> str:
    return path.relative_to(SRC / "vlduet").parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import, also in functions and under TYPE_CHECKING: those couple too."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}:{node.lineno}: write absolute imports"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def starts(dotted: str, prefix: str) -> bool:
    return dotted == prefix or dotted.startswith(f"{prefix}.")


@pytest.mark.parametrize("path", files(), ids=name)
def test_a_room_imports_only_what_lies_below(path: Path) -> None:
    here = room(path)
    assert here in MAY_IMPORT, (
        f"{name(path)} stands in no known room: add it to MAY_IMPORT and to docs/design.md"
    )
    for line, dotted in imports(path):
        if starts(dotted, "vlduet"):
            there = dotted.split(".")[1] if "." in dotted else "__init__"
            # `from vlduet import __version__` costs nothing and couples to nothing.
            allowed = MAY_IMPORT[here] | {here, "__version__"}
            assert there in allowed, f"{name(path)}:{line}: {here} may not import {dotted}"


@pytest.mark.parametrize("path", files(), ids=name)
def test_heavy_dependencies_come_in_by_one_door(path: Path) -> None:
    for line, dotted in imports(path):
        for package, doors in DOORS.items():
            inside = any(Path(name(path)).match(door) for door in doors)
            assert inside or not starts(dotted, package), (
                f"{name(path)}:{line}: {dotted} comes in by {sorted(doors)} only"
            )
        never = {package for package in NEVER if starts(dotted, package)}
        assert not never, f"{name(path)}:{line}: the library never imports {dotted}"


@pytest.mark.parametrize("package", sorted(ONE_FILE))
def test_one_file_a_dependency(package: str) -> None:
    users = {
        name(path) for path in files() for _, dotted in imports(path) if starts(dotted, package)
    }
    assert len(users) <= 1, f"{package} is imported by {sorted(users)}: pick one"


def test_metrics_are_plain_numpy() -> None:
    path = SRC / "vlduet" / "eval" / "metrics.py"
    if path.exists():
        found = [dotted for _, dotted in imports(path) if starts(dotted, "torch")]
        assert not found, "eval/metrics.py is the judge: numpy only, so that anyone can check it"


def test_no_import_cycles() -> None:
    modules = {
        ".".join(p.relative_to(SRC).with_suffix("").parts).removesuffix(".__init__"): p
        for p in files()
    }
    graph: dict[str, set[str]] = {}
    for module, path in modules.items():
        targets = set()
        for _, dotted in imports(path):
            owner = dotted if dotted in modules else dotted.rpartition(".")[0]
            # The package's own __init__ imports its public names on first use: no cycle at import time.
            if owner in modules and owner not in (module, "vlduet"):
                targets.add(owner)
        graph[module] = targets
    graph["vlduet"] = set()
    assert not (cycle := find_cycle(graph)), " -> ".join(cycle)


def find_cycle(graph: dict[str, set[str]]) -> list[str]:
    done: set[str] = set()

    def walk(node: str, trail: list[str]) -> list[str]:
        if node in trail:
            return [*trail[trail.index(node) :], node]
        if node in done:
            return []
        for target in sorted(graph.get(node, ())):
            if found := walk(target, [*trail, node]):
                return found
        done.add(node)
        return []

    return next((found for node in sorted(graph) if (found := walk(node, []))), [])


def test_find_cycle_finds_one() -> None:
    assert find_cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert find_cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


@pytest.mark.parametrize("path", [p for p in files() if p.name == "__init__.py"], ids=name)
def test_a_room_s_init_holds_one_docstring_line(path: Path) -> None:
    if room(path) == "__init__":
        return
    body = ast.parse(path.read_text()).body
    only_docstring = len(body) == 1 and ast.get_docstring(ast.Module(body, [])) is not None
    assert only_docstring, f"{name(path)} re-exports nothing: one docstring line only"
    assert len(path.read_text().strip().splitlines()) == 1, f"{name(path)}: one line"


@pytest.mark.parametrize("folder", sorted({p.parent for p in files()}), ids=lambda p: p.name)
def test_a_folder_has_three_files_or_more(folder: Path) -> None:
    content = [p for p in folder.iterdir() if p.name != "__pycache__"]
    assert len(content) >= 3, f"{name(folder)}/ holds {len(content)}: one file would do"
