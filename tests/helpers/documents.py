"""Read the commands and code blocks of the documentation."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

SHELL_LANGUAGES = ("bash", "sh", "shell", "console")
BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<reason>[^\n]*?) -->\n)?```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^```",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class CodeBlock:
    """A fenced block of a Markdown document."""

    document: str
    """Name of the document."""
    line: int
    """Line of the first line of code, from 1."""
    language: str
    """Language after the opening fence; empty without one."""
    code: str
    """Text between the fences."""
    reason_not_run: str | None
    """Reason in the comment `<!-- not run: REASON -->` above the block; None without one."""

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"


@dataclass(frozen=True)
class DocumentedCommand:
    """A shell command of a document."""

    document: str
    """Name of the document."""
    line: int
    """Line of the command, from 1."""
    arguments: tuple[str, ...]
    """Program and arguments, split as a shell splits them, without comments."""

    def __str__(self) -> str:
        return f"{self.document}:{self.line}: {shlex.join(self.arguments)}"


def read_code_blocks(path: Path) -> list[CodeBlock]:
    """Return every fenced block of a document, in order."""
    text = path.read_text(encoding="utf-8")
    blocks = []
    for match in BLOCK.finditer(text):
        line = text[: match.start("code")].count("\n") + 1
        blocks.append(CodeBlock(path.name, line, match["language"], match["code"], match["reason"]))
    return blocks


def split_commands(block: CodeBlock) -> list[DocumentedCommand]:
    """Return the commands of a shell block; [] for a block in another language.

    A command in a loop ``for NAME in A B; do``, which ends with a line ``done``, is returned for
    every value of its variable.
    """
    if block.language not in SHELL_LANGUAGES:
        return []
    commands = []
    variable, values = "", [""]
    # A backslash at the end of a line continues the command on the next line.
    for offset, row in enumerate(block.code.replace("\\\n", " ").splitlines()):
        arguments = shlex.split(row.removeprefix("$ "), comments=True)
        if arguments[:1] == ["for"]:
            variable, values = f"${arguments[1]}", [word.rstrip(";") for word in arguments[3:-1]]
        elif arguments == ["done"]:
            variable, values = "", [""]
        elif arguments:
            for value in values:
                words = [word.replace(variable, value) if variable else word for word in arguments]
                place = (block.document, block.line + offset)
                commands.append(DocumentedCommand(*place, tuple(words)))
    return commands


def read_commands(paths: list[Path], *, program: str) -> list[DocumentedCommand]:
    """Return the commands of several documents that call a program, such as `vlduet`."""
    commands = []
    for path in paths:
        for block in read_code_blocks(path):
            for command in split_commands(block):
                if Path(command.arguments[0]).name == program:
                    commands.append(command)
    return commands
