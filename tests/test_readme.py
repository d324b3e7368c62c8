"""What the documents promise is there: commands, options, chores, configs, links and the tree."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SHELLS = ("bash", "sh", "shell", "console")
# Made by running things, or hidden: no part of the tree.
NOT_IN_TREE = {"runs", "data", "build", "dist", "requirements"}


@dataclass(frozen=True)
class Command:
    """One shell line of a document."""

    document: str
    line: int
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.document}:{self.line}: {shlex.join(self.words)}"


def blocks(text: str) -> list[tuple[int, str, str]]:
    """(line, language, content) of every fenced block."""
    found = re.finditer(r"^```(\w*)[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [(text[: m.start(2)].count("\n") + 1, m[1], m[2]) for m in found]


def commands() -> list[Command]:
    found = []
    for document in DOCUMENTS:
        for line, language, content in blocks(document.read_text()):
            if language not in SHELLS:
                continue
            # A backslash at the end goes on; blank the rest so that line numbers stay.
            for number, row in enumerate(content.replace("\\\n", " ").splitlines()):
                words = shlex.split(row.removeprefix("$ "), comments=True)
                if words:
                    found.append(Command(document.name, line + number, tuple(words)))
    return found


def ours(program: str) -> list[Command]:
    return [command for command in commands() if Path(command.words[0]).name == program]


def cli() -> Any:
    """The typer application as the command tree that it parses with."""
    import typer

    from vlduet.cli.main import app

    return typer.main.get_command(app)


def problem(root: Any, words: list[str]) -> str | None:
    """What the CLI would say about these words before running anything."""
    command, name = root, "vlduet"
    flags = {
        option
        for parameter in root.params
        if getattr(parameter, "is_flag", False)
        for option in parameter.opts
    }
    while words and words[0] in flags:
        words = words[1:]
    while hasattr(command, "commands"):
        if not words or words[0] not in command.commands:
            options = {option for parameter in command.params for option in parameter.opts}
            options |= {"--help", "--install-completion", "--show-completion"}
            return (
                None
                if words and words[0] in options
                else f"no verb '{' '.join(words[:1])}' in '{name}'"
            )
        name, words = words[0], words[1:]
        command = command.commands[name]
    if "--help" in words:
        return None
    try:
        command.make_context(name, list(words))
    except Exception as error:  # noqa: BLE001 - typer's parser has several error trees
        said = str(error) or type(error).__name__
        # The documents name files that a reader will have.
        return None if "does not exist" in said else said
    return None


@pytest.mark.parametrize("command", ours("vlduet"), ids=str)
def test_the_cli_takes_every_command_of_the_documents(command: Command) -> None:
    assert (said := problem(cli(), list(command.words[1:]))) is None, f"{command}: {said}"


def test_every_verb_is_shown_in_a_document() -> None:
    shown = {command.words[1:3] for command in ours("vlduet")}
    missing = []
    for verb, command in cli().commands.items():
        for sub in getattr(command, "commands", {}):
            if not any(words[:2] == (verb, sub) for words in shown):
                missing.append(f"{verb} {sub}")
        if not hasattr(command, "commands") and not any(words[:1] == (verb,) for words in shown):
            missing.append(verb)
    assert not missing, f"no document shows how to use: {missing}"


def test_the_readme_has_the_two_commands() -> None:
    lines = {
        shlex.join(command.words) for command in ours("make") if command.document == "README.md"
    }
    assert {"make demo", "make test"} <= lines


@pytest.mark.parametrize("command", ours("make"), ids=str)
def test_every_chore_is_in_the_makefile(command: Command) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for word in command.words[1:]:
        assert "=" in word or word in targets, f"{command}: the Makefile has no '{word}'"


@pytest.mark.parametrize("command", ours("vlduet"), ids=str)
def test_every_config_named_is_there(command: Command) -> None:
    for word in command.words:
        if word.startswith("configs/"):
            assert (ROOT / word).is_file(), f"{command}: no file {word}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_python_examples_import_public_names(document: Path) -> None:
    import vlduet

    for line, language, content in blocks(document.read_text()):
        for node in ast.walk(ast.parse(content)) if language == "python" else ():
            if isinstance(node, ast.ImportFrom) and node.module == "vlduet":
                missing = {alias.name for alias in node.names} - set(vlduet.__all__)
                assert not missing, f"{document.name}:{line}: vlduet has no {sorted(missing)}"


TRAINING = [command for command in ours("vlduet") if "train" in command.words[1:3]]


@pytest.mark.parametrize("command", TRAINING, ids=str)
def test_every_setting_named_is_one(command: Command) -> None:
    from vlduet.config import load_run_config

    config = next(word for word in command.words if word.endswith((".yaml", ".yml")))
    overrides = [word for word in command.words if "=" in word and not word.startswith("-")]
    if config.startswith("configs/"):
        load_run_config(ROOT / config, overrides)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_leads_somewhere(document: Path) -> None:
    prose = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", prose):
        if "://" not in target and not target.startswith("mailto:"):
            assert (document.parent / target).exists(), (
                f"{document.name} links to {target}, which is not there"
            )


def tree_paths() -> set[str]:
    """Paths of the README's drawing; folders end with a slash."""
    drawing = next(
        content for _, _, content in blocks((ROOT / "README.md").read_text()) if "├──" in content
    )
    found: set[str] = set()
    trail: list[str] = []
    for line in drawing.splitlines():
        if match := re.match(r"^([│ ]*)[├└]── (\S+)", line):
            depth = len(match[1]) // 4
            trail[depth:] = [match[2]]
            found.add("".join(trail))
    return found


def test_the_tree_is_true() -> None:
    drawn = tree_paths()
    for path in sorted(drawn):
        there = (ROOT / path).is_dir() if path.endswith("/") else (ROOT / path).is_file()
        assert there, f"README draws {path}, which is not there"


def test_the_tree_is_complete() -> None:
    drawn = tree_paths()
    folders = [
        p for p in ROOT.iterdir() if p.is_dir() and not p.name.startswith(".") and p.name != "src"
    ]
    for folder in folders:
        if folder.name not in NOT_IN_TREE:
            assert f"{folder.name}/" in drawn, f"README's tree lacks {folder.name}/"
    for path in (ROOT / "src" / "vlduet").iterdir():
        if (
            path.name != "__init__.py"
            and (path.suffix == ".py" or path.is_dir())
            and path.name != "__pycache__"
        ):
            name = f"src/vlduet/{path.name}" + ("/" if path.is_dir() else "")
            assert name in drawn, f"README's tree lacks {name}"


def test_ci_runs_what_the_readme_says() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    extract = next(line for line in script.splitlines() if line.startswith("test_command="))
    done = subprocess.run(
        ["bash", "-c", f'{extract}; printf "%s" "$test_command"'],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "make test"
