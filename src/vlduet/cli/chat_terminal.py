"""Input of a conversation: lines of a terminal with history and completion, or lines of a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TextIO

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.history import InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

from vlduet.cli.chat_commands import USAGE, ChatCommands
from vlduet.cli.chat_output import print_error, print_notice
from vlduet.errors import DataError, VLDuetError
from vlduet.library_errors import describe_library_error

CHOICES = {
    "/retrieve": ("on", "off", "context", "interleave"),
    "/scope": ("last", "dialog"),
}
"""Arguments that complete a command."""


class CommandCompleter(Completer):
    """Completion of the names of commands and of their arguments; messages have none."""

    def __init__(self) -> None:
        """Prepare the completion of paths."""
        self._paths = PathCompleter(expanduser=True)

    def get_completions(
        self, document: Document, complete_event: CompleteEvent
    ) -> Iterable[Completion]:
        """Yield what may follow the text before the cursor."""
        text = document.text_before_cursor
        if not text.startswith("/") or "\n" in text:
            return
        name, blank, argument = text.partition(" ")
        if not blank:
            for command, (_, purpose) in USAGE.items():
                if command.startswith(name):
                    yield Completion(command, -len(name), display_meta=purpose)
        elif name == "/image":
            path = Document(argument, len(argument))
            yield from self._paths.get_completions(path, complete_event)
        else:
            for choice in CHOICES.get(name, ()):
                if choice.startswith(argument):
                    yield Completion(choice, -len(argument))


def make_key_bindings() -> KeyBindings:
    """Return the keys: Enter sends, Alt-Enter and Ctrl-J begin a new line.

    A pasted text is inserted as a whole, line ends included, by terminals that mark it as pasted.
    """
    bindings = KeyBindings()

    @bindings.add("enter")
    def send(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @bindings.add("escape", "enter")
    @bindings.add("c-j")
    def begin_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return bindings


def run_terminal(commands: ChatCommands) -> None:
    """Read and run lines from the terminal until Ctrl-D or ``/quit``; errors are printed.

    Ctrl-C empties the line, or ends the running answer. Lines are remembered in memory alone.
    Exceptions that no file, memory or user has caused, and with ``--debug`` all, are raised.
    """
    prompt: PromptSession[str] = PromptSession(
        history=InMemoryHistory(),
        completer=CommandCompleter(),
        complete_while_typing=False,
        multiline=True,
        prompt_continuation="  ",
        key_bindings=make_key_bindings(),
    )
    while True:
        count = len(commands.session.attached)
        label = "" if not count else "[1 image] " if count == 1 else f"[{count} images] "
        try:
            line = prompt.prompt(f"{label}> ")
        except KeyboardInterrupt:
            print_notice("Ctrl-D ends the conversation.")
            continue
        except EOFError:
            return
        try:
            if not commands.run(line):
                return
        except KeyboardInterrupt:
            print_notice("Interrupted.")
        except Exception as error:
            if "--debug" in sys.argv:
                raise
            print_error(_describe_error(error))


def _describe_error(error: Exception) -> str:
    """Return the text of an error that a user can repair; raise any other again."""
    if isinstance(error, VLDuetError):
        return str(error)
    described = describe_library_error(error)
    if described is not None:
        return ". ".join(described)
    if isinstance(error, OSError) and error.errno is not None:
        place = f"{error.filename}: " if error.filename is not None else ""
        return f"{place}{error.strerror}"
    raise error


def run_lines(commands: ChatCommands, lines: TextIO) -> None:
    """Run lines of a file or pipe until its end or ``/quit``.

    Raises:
        VLDuetError: the first line that cannot be run; later ones are not read.
    """
    try:
        for line in lines:
            if not commands.run(line.rstrip("\r\n")):
                return
    except UnicodeDecodeError:
        raise DataError("the input is not valid UTF-8", fix="Convert it to UTF-8") from None
