"""Limits on the number of things that a reader must know.

Raising a limit needs a line of reason beside it, in the same commit.
"""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import pytest

from helpers.readability import Readability, measure_tree

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "vlduet"
TREES = ("src/vlduet", "tests", "benchmarks", "examples", "experiments")

MAX_FILE_LINES = 500
MAX_FILE_LINES_BY_NAME = {"train/loop.py": 200}  # everybody reads this file
MAX_FUNCTION_LINES = 60  # without the docstring
MAX_FUNCTION_STATEMENTS = 40
MAX_PARAMETERS = 8
# Of one command; more belong into a config or a subcommand. 12: `search` has seven ways to select
# hits, which are the same from Python and over HTTP.
MAX_COMMAND_OPTIONS = 12
# How a source is read. They do not count, because they are the same in every command with a source:
# who knows them once knows them everywhere, and what one command can read, all can.
SOURCE_OPTIONS = {"format", "root", "columns", "strict"}
# How a query of texts and images is given, and the context that has their order. They do not count
# for the same reason.
QUERY_OPTIONS = {"context", "texts", "images", "query_file"}
MAX_POSITIONAL = 3  # of public functions: search(index, model, query) reads well, four do not
MAX_CONFIG_FIELDS = 90
MAX_ENVIRONMENT_VARIABLES = 3
MAX_PUBLIC_NAMES = 17  # 17: `interleave` yields two types, and has options of a third
MAX_INHERITANCE_DEPTH = 2

MAX_VAGUE_NAMES_PER_1000 = 2.0
MAX_UNCLEAR_DOCSTRINGS_PERCENT = 1.0
MAX_LONG_LINES_PER_1000 = 5.0
MAX_NESTED_COMPREHENSIONS = 9

# torchrun sets these as its protocol; they are not options of ours.
TORCHRUN_VARIABLES = {
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "GROUP_WORLD_SIZE",
    "TORCHELASTIC_RESTART_COUNT",
}
# The desktop sets these for programs that show windows; they are not options of ours.
DESKTOP_VARIABLES = {"DISPLAY", "WAYLAND_DISPLAY"}

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


def package_files() -> list[Path]:
    """Return every Python file of the package, sorted."""
    return sorted(PACKAGE.rglob("*.py"))


def all_files() -> list[Path]:
    """Return every Python file of `TREES`."""
    paths: list[Path] = []
    for tree in TREES:
        paths += sorted((ROOT / tree).rglob("*.py"))
    return paths


def package_name(path: Path) -> str:
    """Return the path of a file of the package, such as `train/loop.py`."""
    return path.relative_to(PACKAGE).as_posix()


def repository_name(path: Path) -> str:
    """Return the path of a file relative to the repository."""
    return path.relative_to(ROOT).as_posix()


@functools.cache
def parse(path: Path) -> ast.Module:
    """Return the syntax tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


@functools.cache
def list_functions(path: Path) -> list[tuple[FunctionNode, ast.ClassDef | None]]:
    """Return every function of a file with the class that it is a method of, or None."""
    nodes = list(ast.walk(parse(path)))
    owners: dict[int, ast.ClassDef] = {}
    for node in nodes:
        if isinstance(node, ast.ClassDef):
            owners |= {id(item): node for item in node.body}
    return [(node, owners.get(id(node))) for node in nodes if isinstance(node, FunctionNode)]


def count_lines(function: FunctionNode) -> int:
    """Return the number of lines of a function without its docstring."""
    assert function.end_lineno is not None
    num_lines = function.end_lineno - function.lineno + 1
    first = function.body[0]
    if ast.get_docstring(function) is not None:
        assert first.end_lineno is not None
        num_lines -= first.end_lineno - first.lineno + 1
    return num_lines


def count_statements(function: FunctionNode) -> int:
    """Return the number of statements of a function, those of nested functions included."""
    return sum(isinstance(node, ast.stmt) for node in ast.walk(function)) - 1


def list_parameters(
    function: FunctionNode, owner: ast.ClassDef | None
) -> tuple[list[str], list[str]]:
    """Return the positional and the keyword-only parameters, without the receiver."""
    positional = [argument.arg for argument in [*function.args.posonlyargs, *function.args.args]]
    if function.args.vararg:
        positional.append(f"*{function.args.vararg.arg}")
    if owner is not None and positional and positional[0] in ("self", "cls", "ctx"):
        positional = positional[1:]
    return positional, [argument.arg for argument in function.args.kwonlyargs]


def has_fixed_signature(function: FunctionNode, owner: ast.ClassDef | None) -> bool:
    """Return whether Python or torch calls the function and has fixed its signature."""
    is_dunder = function.name.startswith("__") and function.name.endswith("__")
    is_autograd = owner is not None and any(
        ast.unparse(base).endswith("autograd.Function") for base in owner.bases
    )
    return (is_dunder and function.name != "__init__") or is_autograd


@pytest.mark.parametrize("path", all_files(), ids=repository_name)
def test_a_file_has_at_most_500_lines(path: Path) -> None:
    limit = MAX_FILE_LINES
    if path.is_relative_to(PACKAGE):
        limit = MAX_FILE_LINES_BY_NAME.get(package_name(path), MAX_FILE_LINES)
    num_lines = len(path.read_text(encoding="utf-8").splitlines())
    assert num_lines <= limit, f"{repository_name(path)}: {num_lines} lines, limit {limit}"


@pytest.mark.parametrize("path", all_files(), ids=repository_name)
def test_a_function_is_short(path: Path) -> None:
    problems = []
    for function, _ in list_functions(path):
        place = f"{repository_name(path)}:{function.lineno}: {function.name}"
        if (num_lines := count_lines(function)) > MAX_FUNCTION_LINES:
            problems.append(f"{place}: {num_lines} lines, limit {MAX_FUNCTION_LINES}")
        if (num_statements := count_statements(function)) > MAX_FUNCTION_STATEMENTS:
            problems.append(
                f"{place}: {num_statements} statements, limit {MAX_FUNCTION_STATEMENTS}"
            )
    assert not problems, "\n" + "\n".join(problems)


@pytest.mark.parametrize("path", package_files(), ids=package_name)
def test_a_function_has_few_parameters(path: Path) -> None:
    problems = []
    is_command_file = path.parent.name == "cli"
    limit = MAX_COMMAND_OPTIONS if is_command_file else MAX_PARAMETERS
    for function, owner in list_functions(path):
        if has_fixed_signature(function, owner):
            continue
        place = f"{package_name(path)}:{function.lineno}: {function.name}"
        positional, keyword_only = list_parameters(function, owner)
        names = {*positional, *keyword_only}
        num_parameters = len(names - SOURCE_OPTIONS - QUERY_OPTIONS if is_command_file else names)
        if num_parameters > limit:
            problems.append(f"{place}: {num_parameters} parameters, limit {limit}")
        is_private = function.name.startswith("_") and function.name != "__init__"
        # typer calls commands by keyword, whatever their signature.
        if len(positional) > MAX_POSITIONAL and not is_private and not is_command_file:
            problems.append(f"{place}: make {positional[MAX_POSITIONAL:]} keyword-only")
    assert not problems, "\n" + "\n".join(problems)


@pytest.mark.parametrize("path", package_files(), ids=package_name)
def test_no_function_takes_arbitrary_keyword_arguments(path: Path) -> None:
    problems = []
    for function, owner in list_functions(path):
        if function.args.kwarg is not None and not has_fixed_signature(function, owner):
            problems.append(f"{package_name(path)}:{function.lineno}: {function.name}")
    assert not problems, "these functions hide their parameters in **kwargs: " + str(problems)


def test_the_config_has_at_most_90_fields() -> None:
    nodes = ast.walk(parse(PACKAGE / "config.py"))
    classes = [node for node in nodes if isinstance(node, ast.ClassDef)]
    class_names = {node.name for node in classes}
    fields = []
    for node in classes:
        for item in node.body:
            if not isinstance(item, ast.AnnAssign) or not isinstance(item.target, ast.Name):
                continue
            annotation = ast.unparse(item.annotation)
            # A section of the config is not a thing to know; its fields are.
            is_section = annotation in class_names or annotation.startswith("ClassVar")
            if not is_section and item.target.id != "model_config":
                fields.append(f"{node.name}.{item.target.id}")
    assert 0 < len(fields) <= MAX_CONFIG_FIELDS, f"{len(fields)} fields: {fields}"


def test_at_most_3_environment_variables_are_read() -> None:
    places: dict[str, str] = {}
    for path in package_files():
        for node in ast.walk(parse(path)):
            key = environment_key(node)
            if key is None:
                continue
            place = f"{package_name(path)}:{getattr(node, 'lineno', 0)}"
            assert isinstance(key, ast.Constant), f"{place}: the variable's name is computed"
            places.setdefault(str(key.value), place)
    protocols = TORCHRUN_VARIABLES | DESKTOP_VARIABLES
    options = {key: place for key, place in places.items() if key not in protocols}
    assert len(options) <= MAX_ENVIRONMENT_VARIABLES, options


def environment_key(node: ast.AST) -> ast.expr | None:
    """Return the key of a read from os.environ or os.getenv, or None for any other node."""
    if isinstance(node, ast.Subscript) and ast.unparse(node.value).endswith("environ"):
        return node.slice
    if isinstance(node, ast.Call):
        function = ast.unparse(node.func)
        if function.endswith(("environ.get", "getenv", "environ.pop")):
            return node.args[0]
    if isinstance(node, ast.Compare) and ast.unparse(node.comparators[0]).endswith("environ"):
        return node.left
    return None


def test_the_package_exports_at_most_16_names() -> None:
    for node in parse(PACKAGE / "__init__.py").body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names = ast.literal_eval(node.value)
            assert 0 < len(names) <= MAX_PUBLIC_NAMES, names
            return
    pytest.fail("vlduet/__init__.py has no literal __all__")


def test_classes_inherit_at_most_twice_from_classes_of_ours() -> None:
    bases: dict[str, list[str]] = {}
    for path in package_files():
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.ClassDef):
                bases[node.name] = [ast.unparse(base).split(".")[-1] for base in node.bases]

    def depth(name: str) -> int:
        """Return the number of classes of ours above a class."""
        parents = [base for base in bases.get(name, []) if base in bases]
        return max((1 + depth(base) for base in parents), default=0)

    deep = [name for name in bases if depth(name) > MAX_INHERITANCE_DEPTH]
    assert not deep, f"more than {MAX_INHERITANCE_DEPTH} classes of ours above: {deep}"


@pytest.fixture(scope="module", params=TREES)
def readability(request: pytest.FixtureRequest) -> Readability:
    """Return the counts of one tree of the repository."""
    return measure_tree(ROOT / request.param)


def test_names_are_nouns_of_the_field(readability: Readability) -> None:
    per_1000 = 1000 * len(readability.vague_names) / readability.num_bindings
    assert per_1000 < MAX_VAGUE_NAMES_PER_1000, readability.vague_names


def test_docstrings_are_clear_without_the_line_above(readability: Readability) -> None:
    percent = 100 * len(readability.unclear_docstrings) / readability.num_docstrings
    assert percent < MAX_UNCLEAR_DOCSTRINGS_PERCENT, readability.unclear_docstrings


def test_identifiers_use_the_vocabulary_of_the_field(readability: Readability) -> None:
    assert not readability.private_words


def test_a_class_name_is_defined_in_one_file(readability: Readability) -> None:
    assert not readability.repeated_classes


def test_lines_have_at_most_100_columns(readability: Readability) -> None:
    per_1000 = 1000 * len(readability.long_lines) / readability.num_lines
    assert per_1000 < MAX_LONG_LINES_PER_1000, readability.long_lines


def test_comprehensions_are_not_nested(readability: Readability) -> None:
    places = readability.nested_comprehensions
    assert len(places) <= MAX_NESTED_COMPREHENSIONS, places
