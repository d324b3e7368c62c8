"""How many things there are to know. Raising a number needs a line of reason beside it, in that commit."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "src" / "vlduet"

FILE_LINES = 400
FILE_LINES_BY_NAME = {"train/loop.py": 200}  # the story that everyone reads
FUNCTION_LINES = 60  # docstring not counted
PARAMETERS = 8
OPTIONS = 10  # of a verb: nobody writes them in a row, and with its --help's two they fit on half a screen
POSITIONAL = (
    3  # of public functions and constructors: search(index, model, query) reads well, four do not
)
CONFIG_FIELDS = 90
ENVIRONMENT = 3
PUBLIC_NAMES = 12
INHERITANCE = 2

# Set by torchrun as its protocol, not options of ours.
TORCHRUN = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def files() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def functions(path: Path) -> Iterator[tuple[Function, ast.ClassDef | None]]:
    """Every function with the class that it is a method of."""
    module = tree(path)
    owners = {
        id(item): node
        for node in ast.walk(module)
        if isinstance(node, ast.ClassDef)
        for item in node.body
    }
    for node in ast.walk(module):
        if isinstance(node, Function):
            yield node, owners.get(id(node))


def code_lines(function: Function) -> int:
    assert function.end_lineno is not None
    lines = function.end_lineno - function.lineno + 1
    first = function.body[0]
    if ast.get_docstring(function) is not None:
        assert first.end_lineno is not None
        lines -= first.end_lineno - first.lineno + 1
    return lines


def parameters(function: Function, owner: ast.ClassDef | None) -> tuple[list[str], list[str]]:
    """(positional, keyword-only), without the receiver."""
    positional = [arg.arg for arg in [*function.args.posonlyargs, *function.args.args]]
    if function.args.vararg:
        positional.append(f"*{function.args.vararg.arg}")
    if owner is not None and positional and positional[0] in ("self", "cls", "ctx"):
        positional = positional[1:]
    return positional, [arg.arg for arg in function.args.kwonlyargs]


def protocol(function: Function, owner: ast.ClassDef | None) -> bool:
    """Python, torch or triton calls it and has fixed its signature."""
    dunder = (
        function.name.startswith("__")
        and function.name.endswith("__")
        and function.name != "__init__"
    )
    autograd = owner is not None and any(
        ast.unparse(base).endswith("autograd.Function") for base in owner.bases
    )
    # A GPU kernel knows no objects: buffers and sizes are all that it can be given.
    kernel = any(ast.unparse(decorator) == "triton.jit" for decorator in function.decorator_list)
    return dunder or autograd or kernel


@pytest.mark.parametrize("path", files(), ids=name)
def test_file_lines(path: Path) -> None:
    budget = FILE_LINES_BY_NAME.get(name(path), FILE_LINES)
    lines = len(path.read_text().splitlines())
    assert lines <= budget, f"{name(path)}: {lines} lines, budget {budget}"


@pytest.mark.parametrize("path", files(), ids=name)
def test_functions(path: Path) -> None:
    wrong = []
    for function, owner in functions(path):
        place = f"{name(path)}:{function.lineno}: {function.name}"
        if (lines := code_lines(function)) > FUNCTION_LINES:
            wrong.append(f"{place}: {lines} lines, budget {FUNCTION_LINES}")
        if protocol(function, owner):
            continue
        positional, keywords = parameters(function, owner)
        most = OPTIONS if path.parent.name == "cli" else PARAMETERS
        if len(positional) + len(keywords) > most:
            wrong.append(f"{place}: {len(positional) + len(keywords)} parameters, budget {most}")
        helper = function.name.startswith("_") and function.name != "__init__"
        # typer calls verbs by keyword, whatever their signature.
        if len(positional) > POSITIONAL and not helper and path.parent.name != "cli":
            wrong.append(f"{place}: make {positional[POSITIONAL:]} keyword-only")
    assert not wrong, "\n" + "\n".join(wrong)


@pytest.mark.parametrize("path", files(), ids=name)
def test_no_bags_of_arguments(path: Path) -> None:
    """`**kwargs` hides what a function takes."""
    wrong = [
        f"{name(path)}:{function.lineno}: {function.name}(**{function.args.kwarg.arg})"
        for function, owner in functions(path)
        if function.args.kwarg is not None and not protocol(function, owner)
    ]
    assert not wrong, "\n" + "\n".join(wrong)


def test_config_fields() -> None:
    path = ROOT / "config.py"
    if not path.exists():
        pytest.skip("no config yet")
    classes = [node for node in ast.walk(tree(path)) if isinstance(node, ast.ClassDef)]
    ours = {node.name for node in classes}
    fields = [
        f"{node.name}.{item.target.id}"
        for node in classes
        for item in node.body
        if isinstance(item, ast.AnnAssign)
        and isinstance(item.target, ast.Name)
        and not item.target.id.startswith("_")
        and item.target.id != "model_config"
        and not ast.unparse(item.annotation).startswith("ClassVar")
        # A section of the config is not a thing to know; its fields are.
        and ast.unparse(item.annotation) not in ours
    ]
    assert len(fields) <= CONFIG_FIELDS, f"{len(fields)} fields, budget {CONFIG_FIELDS}: {fields}"


def test_environment_variables() -> None:
    found: dict[str, str] = {}
    for path in files():
        for node in ast.walk(tree(path)):
            if (key := environment_key(node)) is not None:
                place = f"{name(path)}:{node.lineno}"  # type: ignore[attr-defined]
                assert isinstance(key, ast.Constant), (
                    f"{place}: an environment variable whose name is computed"
                )
                found.setdefault(str(key.value), place)
    ours = {key: place for key, place in found.items() if key not in TORCHRUN}
    assert len(ours) <= ENVIRONMENT, (
        f"{len(ours)} environment variables, budget {ENVIRONMENT}: {ours}"
    )


def environment_key(node: ast.AST) -> ast.expr | None:
    """The key in os.environ[key], os.environ.get(key), os.getenv(key) and `key in os.environ`."""
    if isinstance(node, ast.Subscript) and ast.unparse(node.value).endswith("environ"):
        return node.slice
    if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(
        ("environ.get", "getenv", "environ.pop")
    ):
        return node.args[0]
    if isinstance(node, ast.Compare) and ast.unparse(node.comparators[0]).endswith("environ"):
        return node.left
    return None


def test_public_names() -> None:
    path = ROOT / "__init__.py"
    for node in tree(path).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names = ast.literal_eval(node.value)
            assert len(names) <= PUBLIC_NAMES, f"{len(names)} public names, budget {PUBLIC_NAMES}"
            return
    pytest.fail("vlduet/__init__.py has no literal __all__")


def test_inheritance_depth() -> None:
    bases: dict[str, list[str]] = {}
    for path in files():
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ClassDef):
                bases[node.name] = [
                    ast.unparse(base).split("[")[0].split(".")[-1] for base in node.bases
                ]

    def depth(kind: str) -> int:
        return 1 + max(
            (depth(base) for base in bases[kind] if base in bases and base != kind), default=0
        )

    # An error tree is a table of names, drawn in errors.py; it may go one deeper.
    errors = {kind for kind in bases if kind.endswith("Error")}
    deep = {kind: depth(kind) for kind in bases if depth(kind) > INHERITANCE + (kind in errors)}
    assert not deep, f"deeper than {INHERITANCE}: {deep}"
