"""The documentation names only commands, options, presets, make targets and files that exist."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path
from typing import Any

import pytest

from helpers.documents import DocumentedCommand, read_code_blocks, read_commands
from helpers.processes import run_process
from helpers.source_names import is_name_of_package

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
RESULTS = [*sorted((ROOT / "docs/results").glob("*.md")), *ROOT.glob("experiments/*/*.md")]
COMMANDS = read_commands(DOCUMENTS, program="vlduet")
MAKE_COMMANDS = read_commands(DOCUMENTS, program="make")


@functools.cache
def command_tree() -> Any:
    """Return the typer application as the command tree that it parses with."""
    import typer

    from vlduet.cli.main import app

    return typer.main.get_command(app)


def find_problem(root: Any, arguments: list[str]) -> str | None:
    """Return what is wrong with the arguments of a vlduet command, or None if it parses."""
    command, name = root, "vlduet"
    flags = set()
    for parameter in root.params:
        if getattr(parameter, "is_flag", False):
            flags |= set(parameter.opts)
    while arguments and arguments[0] in flags:
        arguments = arguments[1:]
    while hasattr(command, "commands"):
        if not arguments or arguments[0] not in command.commands:
            options = {"--help", "--install-completion", "--show-completion"}
            for parameter in command.params:
                options |= set(parameter.opts)
            if arguments and arguments[0] in options:
                return None
            return f"no command '{' '.join(arguments[:1])}' in '{name}'"
        name = arguments[0]
        arguments = arguments[1:]
        command = command.commands[name]
    if "--help" in arguments:
        return None
    try:
        command.make_context(name, list(arguments))
    except Exception as error:  # noqa: BLE001 - typer's parser has several error classes
        message = str(error) or type(error).__name__
        # The documents name files that a reader will have.
        return None if "does not exist" in message else message
    return None


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_the_cli_parses_every_documented_command(command: DocumentedCommand) -> None:
    problem = find_problem(command_tree(), list(command.arguments[1:]))
    assert problem is None, f"{command}: {problem}"


def test_an_unknown_option_is_a_problem() -> None:
    assert find_problem(command_tree(), ["train", "vladva", "--no-such-option"]) is not None
    assert find_problem(command_tree(), ["no-such-command"]) is not None


def test_every_command_is_documented() -> None:
    documented = {command.arguments[1:3] for command in COMMANDS}
    missing = []
    for name, command in command_tree().commands.items():
        subcommands = getattr(command, "commands", {})
        for subcommand in subcommands:
            if (name, subcommand) not in documented:
                missing.append(f"{name} {subcommand}")
        if not subcommands and not any(arguments[:1] == (name,) for arguments in documented):
            missing.append(name)
    assert not missing, f"no document uses: {missing}"


@pytest.mark.parametrize("command", MAKE_COMMANDS, ids=str)
def test_every_documented_make_target_exists(command: DocumentedCommand) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    for argument in command.arguments[1:]:
        assert "=" in argument or argument in targets, f"{command}: no target '{argument}'"


TRAIN_COMMANDS = [command for command in COMMANDS if command.arguments[1] == "train"]


@pytest.mark.parametrize("command", TRAIN_COMMANDS, ids=str)
def test_documented_overrides_are_valid(command: DocumentedCommand) -> None:
    from vlduet.config import list_presets, load_run_config

    overrides = [
        argument
        for argument in command.arguments[2:]
        if "=" in argument and not argument.startswith("-")
    ]
    preset = command.arguments[2]
    if preset in list_presets():
        assert load_run_config(preset, overrides).recipe["name"]
    else:
        # A file that the reader writes, or a flag such as --help.
        assert preset.endswith(".yaml") or preset.startswith("-"), f"{command}: no such preset"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_python_examples_import_existing_names(document: Path) -> None:
    for block in read_code_blocks(document):
        if block.language != "python":
            continue
        for node in ast.walk(ast.parse(block.code)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vlduet"):
                for alias in node.names:
                    exists = is_name_of_package(str(node.module), alias.name)
                    assert exists, f"{block}: no {node.module}.{alias.name}"


@pytest.mark.parametrize("document", [*DOCUMENTS, *RESULTS], ids=lambda path: path.name)
def test_every_link_leads_to_a_file(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", prose):
        if "://" not in target and not target.startswith("mailto:"):
            assert (document.parent / target).exists(), f"{document.name}: no file {target}"


def test_the_design_page_lists_every_part_of_the_package() -> None:
    design = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    package = ROOT / "src" / "vlduet"
    parts = [path.name for path in package.iterdir() if (path / "__init__.py").exists()]
    assert len(parts) > 10
    missing = [part for part in parts if not re.search(rf"^{part} +\w", design, re.MULTILINE)]
    assert not missing, f"docs/design.md does not describe {missing}"


def test_paths_named_in_the_documents_exist() -> None:
    missing = []
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        folders = "src|tests|benchmarks|examples|experiments|docs"
        for path in re.findall(rf"`((?:{folders})/[\w./-]+)`", text):
            if not (ROOT / path).exists():
                missing.append(f"{document.name}: {path}")
    assert not missing


def test_ci_runs_the_test_command_of_the_readme() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    extraction = next(line for line in script.splitlines() if line.startswith("test_command="))
    command = ["bash", "-c", f'{extraction}; printf "%s" "$test_command"']
    process = run_process(command, cwd=ROOT, check=True)
    assert process.stdout == "make test"


def test_the_figure_is_the_one_that_its_script_draws() -> None:
    import sys

    script = ROOT / "docs" / "figures" / "draw_forward_pass.py"
    process = run_process([sys.executable, str(script), "--check"])
    assert process.returncode == 0, process.stderr
