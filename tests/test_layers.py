"""Imports point downwards only. docs/design.md draws the layers; this file enforces them."""

from __future__ import annotations

import ast
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SRC = ROOT / "src"
PACKAGE = SRC / "vlduet"

BASE = {
    "errors",
    "config",
    "config_files",
    "distributed",
    "files",
    "hub",
    "integrity",
    "library_errors",
    "locks",
    "logs",
    "structured_files",
}

# The parts of the package that a part may import besides itself, from the bottom to the top.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "library_errors": {"errors"},
    "structured_files": {"errors"},
    "locks": {"errors"},
    "files": {"errors", "library_errors", "locks", "structured_files"},
    "integrity": {"errors", "files", "structured_files"},
    "logs": {"errors", "files"},
    "hub": {"errors", "logs", "structured_files"},
    "config_files": {"errors", "structured_files"},
    "config": {"errors", "files", "config_files"},
    "distributed": {"errors", "logs"},
    # Losses are functions of tensors; sums over processes are part of their arithmetic.
    "objectives": {"errors", "distributed"},
    # The image processor is passed in, so that data never needs a model.
    "data": BASE,
    "corpora": BASE | {"data"},
    # The default model is built from packages, which corpora.packages downloads.
    "model": BASE | {"data", "objectives", "corpora"},
    "encoders": BASE | {"data", "objectives", "model"},
    "recipes": BASE | {"data", "objectives", "model", "encoders"},
    "train": BASE | {"data", "objectives", "model", "encoders", "recipes"},
    "retrieval": BASE | {"data", "objectives", "model"},
    # Protocols receive functions, so that any model can be measured. The builtin suite asks
    # questions about the corpora.
    "eval": BASE | {"data", "corpora"},
    "serve": BASE | {"data", "model", "encoders", "retrieval"},
    "inspect": BASE | {"data", "objectives", "model", "encoders", "recipes", "train", "eval"},
    # Reports draw results and compute nothing.
    "reports": BASE | {"data", "eval", "inspect"},
    "harness": BASE | {"data", "corpora", "model", "encoders", "eval"},
    "workflows": BASE
    | {
        "data",
        "corpora",
        "objectives",
        "model",
        "encoders",
        "recipes",
        "train",
        "retrieval",
        "eval",
    },
}
MAY_IMPORT["demo"] = set(MAY_IMPORT)
MAY_IMPORT["cli"] = set(MAY_IMPORT)
# The public names, which are imported on first use.
MAY_IMPORT["__init__"] = set(MAY_IMPORT)
MAY_IMPORT["__main__"] = {"cli"}

# The only files that may import a heavy dependency: when it changes, few files change.
ENTRY_POINTS: dict[str, set[str]] = {
    "transformers": {
        "encoders/fluency.py",
        "encoders/loading.py",
        "model/backbone.py",
        "model/families/llava.py",
        "model/generation/continuous.py",
        "model/generation/kv_state.py",
        "model/nano.py",
        "model/processing.py",
    },
    "peft": {"model/adapters.py"},
    # Names on a model hub: all that may use the network for a model.
    "huggingface_hub": {"hub.py", "library_errors.py"},
    "PIL": {"data/images.py"},
    "pillow_heif": {"data/images.py"},
    "lancedb": {"retrieval/stores/lance.py"},
    "pyarrow": {
        "retrieval/stores/lance.py",
        "retrieval/stores/lancedb_import.py",
        "data/readers/arrow.py",
    },
    "numba": {"objectives/gak/cpu_numba.py"},
    "yaml": {"config.py", "config_files.py"},
    "filelock": {"corpora/packages.py", "locks.py"},
    "mteb": {"harness/mteb.py"},
    "lmms_eval": {"harness/lmms_eval.py"},
    "fastapi": {
        "serve/app.py",
        "serve/openapi.py",
        "serve/resources.py",
        "serve/routes/*",
        "serve/streaming.py",
    },
    "starlette": {"serve/app.py", "serve/limits.py", "serve/server.py"},
    "uvicorn": {"serve/connections.py", "serve/server.py"},
    "h11": {"serve/url_images.py"},
    "prometheus_client": {"serve/metrics.py"},
    "typer": {"cli/*"},
    "rich": {"cli/*", "logs.py"},
    "prompt_toolkit": {"cli/chat_terminal.py"},
    "torch.utils.tensorboard": {"logs.py"},
    "matplotlib": {"reports/charts.py"},
    # Chat templates are jinja templates, and their errors are reported as errors of ours.
    "jinja2": {"reports/pages.py", "model/chat_layout.py"},
    "markupsafe": {"reports/charts.py"},
    "openpyxl": {"eval/benchmarks/multiple_choice.py"},
    "tokenizers": {"model/generation/detokenize.py", "model/text_tokenizer.py"},
    "resvg_py": {"corpora/build.py"},
}
# Peers to compare with in tests and benchmarks, and packages that would pull in CUDA builds
# (docs/install.md).
NEVER_IMPORTED = {
    "sentence_transformers",
    "sklearn",
    "tslearn",
    "torchvision",
    "torchaudio",
    "timm",
    "triton",
}
# Names of modules whose distribution has another name.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "pillow_heif": "pillow-heif",
    "yaml": "pyyaml",
    "resvg_py": "resvg-py",
    "prompt_toolkit": "prompt-toolkit",
    "lmms_eval": "lmms-eval",
    # FastAPI is made of it; some names have no other module.
    "starlette": "fastapi",
    # uvicorn is made of it too.
    "h11": "uvicorn",
    "prometheus_client": "prometheus-client",
}


def package_files() -> list[Path]:
    """Return every Python file of the package, sorted."""
    return sorted(PACKAGE.rglob("*.py"))


def package_name(path: Path) -> str:
    """Return the path of a file of the package, such as `train/loop.py`."""
    return path.relative_to(PACKAGE).as_posix()


def find_part(path: Path) -> str:
    """Return the sub-package or base module that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def iterate_imports(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted name) of every import of a file.

    Imports in functions and under TYPE_CHECKING are included: those couple files too.
    """
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write absolute imports"
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"


def iterate_runtime_imports(path: Path) -> Iterator[str]:
    """Yield the dotted name of every import that happens when the program runs.

    Imports under `if TYPE_CHECKING:` are left out: they cannot form a cycle.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_inside(dotted: str, package: str) -> bool:
    """Return whether a dotted name is a package or something inside it."""
    return dotted == package or dotted.startswith(f"{package}.")


def test_the_layers_are_those_of_the_package() -> None:
    parts = {find_part(path) for path in package_files()}
    assert parts == set(MAY_IMPORT), "name every part here and in docs/design.md, and no other"


@pytest.mark.parametrize("path", package_files(), ids=package_name)
def test_a_part_imports_only_parts_below_it(path: Path) -> None:
    part = find_part(path)
    # `from vlduet import __version__` costs nothing and couples to nothing.
    allowed = MAY_IMPORT[part] | {part, "__version__"}
    for line, dotted in iterate_imports(path):
        if is_inside(dotted, "vlduet"):
            imported = dotted.split(".")[1] if "." in dotted else "__init__"
            assert imported in allowed, (
                f"{package_name(path)}:{line}: {part} may not import {dotted}"
            )


@pytest.mark.parametrize("path", package_files(), ids=package_name)
def test_a_heavy_dependency_is_imported_at_its_entry_point(path: Path) -> None:
    for line, dotted in iterate_imports(path):
        place = f"{package_name(path)}:{line}"
        for package, patterns in ENTRY_POINTS.items():
            if is_inside(dotted, package):
                is_entry = any(Path(package_name(path)).match(pattern) for pattern in patterns)
                assert is_entry, f"{place}: only {sorted(patterns)} may import {dotted}"
        for package in NEVER_IMPORTED:
            assert not is_inside(dotted, package), f"{place}: the library never imports {dotted}"


def test_every_entry_point_is_used() -> None:
    imported = {
        (package_name(path), dotted)
        for path in package_files()
        for _, dotted in iterate_imports(path)
    }
    for package, patterns in ENTRY_POINTS.items():
        for pattern in patterns:
            is_used = any(
                Path(name).match(pattern) and is_inside(dotted, package)
                for name, dotted in imported
            )
            assert is_used, f"no file {pattern} imports {package}: remove the entry point"


def test_every_import_is_a_declared_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements = [*project["dependencies"]]
    for extra in project["optional-dependencies"].values():
        requirements += extra
    declared = {split_requirement(requirement) for requirement in requirements}
    for path in package_files():
        for line, dotted in iterate_imports(path):
            module = dotted.split(".")[0]
            if module == "vlduet" or module in sys.stdlib_module_names:
                continue
            distribution = DISTRIBUTIONS.get(module, module)
            assert distribution in declared, (
                f"{package_name(path)}:{line}: pyproject.toml does not declare {distribution}"
            )


def split_requirement(requirement: str) -> str:
    """Return the name of the distribution in a requirement such as `torch>=2.9`."""
    for position, character in enumerate(requirement):
        if not (character.isalnum() or character in "-_."):
            return requirement[:position].lower()
    return requirement.lower()


def test_metrics_are_plain_numpy() -> None:
    imported = [dotted for _, dotted in iterate_imports(PACKAGE / "eval" / "metrics.py")]
    assert any(is_inside(dotted, "numpy") for dotted in imported)
    assert not any(is_inside(dotted, "torch") for dotted in imported)


def test_no_module_imports_itself_through_others() -> None:
    modules = {}
    for path in package_files():
        dotted = ".".join(path.relative_to(SRC).with_suffix("").parts)
        modules[dotted.removesuffix(".__init__")] = path
    graph: dict[str, set[str]] = {}
    for module, path in modules.items():
        targets = set()
        for dotted in iterate_runtime_imports(path):
            owner = dotted if dotted in modules else dotted.rpartition(".")[0]
            # The package's own __init__ imports its public names on first use.
            if owner in modules and owner not in (module, "vlduet"):
                targets.add(owner)
        graph[module] = targets
    graph["vlduet"] = set()
    cycle = find_cycle(graph)
    assert not cycle, " -> ".join(cycle)


def find_cycle(graph: dict[str, set[str]]) -> list[str]:
    """Return the nodes of one cycle of a directed graph, its start repeated; [] without one."""
    finished: set[str] = set()

    def visit(node: str, trail: list[str]) -> list[str]:
        """Return a cycle that can be reached from a node, or []."""
        if node in trail:
            return [*trail[trail.index(node) :], node]
        if node in finished:
            return []
        for target in sorted(graph.get(node, ())):
            if cycle := visit(target, [*trail, node]):
                return cycle
        finished.add(node)
        return []

    for node in sorted(graph):
        if cycle := visit(node, []):
            return cycle
    return []


def test_find_cycle_reports_a_cycle_and_only_a_cycle() -> None:
    assert find_cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert find_cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def imported_modules(body: list[ast.stmt]) -> set[str | None]:
    """Return the modules from which the statements of a file import names."""
    return {statement.module for statement in body if isinstance(statement, ast.ImportFrom)}


INIT_FILES = [path for path in package_files() if path.name == "__init__.py"]


@pytest.mark.parametrize("path", INIT_FILES, ids=package_name)
def test_a_sub_package_exports_nothing_but_its_docstring(path: Path) -> None:
    if path.parent in (PACKAGE, PACKAGE / "objectives"):
        # The public API, and the four losses for users with a training loop of their own.
        pytest.skip("the public API")
    body = ast.parse(path.read_text(encoding="utf-8")).body
    assert ast.get_docstring(ast.Module(body, [])) is not None, "write one docstring"
    if path.parent == PACKAGE / "serve":
        # Refuses the import of the whole package without its extra, in one place.
        assert imported_modules(body) == {"importlib.util", "vlduet.errors"}
        return
    assert len(body) == 1, f"{package_name(path)} re-exports nothing"


def test_objectives_export_the_four_losses_of_the_public_api() -> None:
    body = ast.parse((PACKAGE / "objectives" / "__init__.py").read_text(encoding="utf-8")).body
    names = [
        alias.name for node in body if isinstance(node, ast.ImportFrom) for alias in node.names
    ]
    losses = ["contrastive_loss", "gak_matrix", "structure_loss", "sugar_targets"]
    assert sorted(names) == losses


@pytest.mark.parametrize(
    "folder", sorted({p.parent for p in package_files()}), ids=lambda p: p.name
)
def test_a_folder_has_at_least_three_files(folder: Path) -> None:
    entries = [path for path in folder.iterdir() if path.name != "__pycache__"]
    assert len(entries) >= 3, f"{package_name(folder)}/ has {len(entries)} entries"
