"""Lines of a conversation at the terminal: messages, and commands that begin with a slash."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from vlduet.cli.chat_output import AnswerPrinter, print_hits, print_line, print_notice
from vlduet.cli.viewer import find_viewer, open_in_viewer
from vlduet.data.records import is_utf8_encodable
from vlduet.errors import ConfigError, DataError, suggest_name

if TYPE_CHECKING:
    from vlduet.data.records import Message
    from vlduet.workflows.chat_session import ChatSession

USAGE = {
    "/image": ("FILE", "attach an image to the next message"),
    "/search": ("[TEXT]", "search the index with a text and the attached images"),
    "/retrieve": ("[on|off|context|interleave]", "retrieve for answers; on means context"),
    "/scope": ("[last|dialog]", "search with the last message, or with the whole conversation"),
    "/open": ("NUMBER", "open an image in the system's viewer"),
    "/clear": ("", "begin a new conversation"),
    "/help": ("", "list the commands"),
    "/quit": ("", "end, as Ctrl-D does"),
}
"""Arguments and purpose of every command."""
SWITCHED_ON = "context"
"""Mode of retrieval that ``/retrieve on`` means, as over HTTP."""


class ChatCommands:
    """Commands and messages of one conversation, whose results are printed.

    Attributes:
        session: the conversation.
    """

    def __init__(self, session: ChatSession, *, is_interactive: bool = False):
        """Store the arguments.

        Args:
            session: conversation that the lines belong to.
            is_interactive: an interruption ends the answer and not the program.
        """
        self.session = session
        self._is_interactive = is_interactive
        self._commands: dict[str, Callable[[str], None]] = {
            "/image": self._attach_image,
            "/search": self._search,
            "/retrieve": self._set_retrieval,
            "/scope": self._set_scope,
            "/open": self._open_image,
            "/clear": self._clear,
            "/help": self._print_help,
        }

    def run(self, line: str) -> bool:
        """Run a command, or answer a message; return False for ``/quit``.

        A line that begins with a slash is a command, a blank one is ignored, and any other is a
        message.

        Raises:
            VLDuetError: an unknown command, a wrong argument, or what a command or answer raises.
            KeyboardInterrupt: an answer was interrupted, unless the conversation is interactive.
        """
        if not line.strip():
            return True
        if not is_utf8_encodable(line):
            raise DataError("the line is not valid UTF-8", fix="Write it anew")
        if not line.startswith("/"):
            self._print_answer(line)
            return True
        name, *arguments = line.split(maxsplit=1)
        argument = arguments[0].strip() if arguments else ""
        if name not in USAGE:
            fix = f"{suggest_name(name, USAGE)} A space before the slash makes it a message"
            raise ConfigError(f"unknown command {name}", fix=fix)
        if argument and not USAGE[name][0]:
            raise ConfigError(f"{name} takes no argument", fix=f"Write {name}")
        if name == "/quit":
            return False
        self._commands[name](argument)
        return True

    def _print_answer(self, text: str) -> None:
        """Print the answer to a message while it is generated, then the documents it quotes."""
        printer = AnswerPrinter(self.session)
        previous_turn = self._last_turn()
        is_interrupted = False
        try:
            with closing(cast(Any, self.session.answer(text))) as events:
                for event in events:
                    printer.print_event(event)
        except KeyboardInterrupt:
            if not self._is_interactive:
                raise
            is_interrupted = True
        finally:
            printer.end_line()
        is_kept = self._last_turn() is not previous_turn
        if is_interrupted:
            outcome = "is" if is_kept else "was nothing, and your message is not"
            print_notice(f"Interrupted: what was answered {outcome} part of the conversation.")
        elif not is_kept:
            print_notice("The model answered nothing: your message is not kept.")
        if is_kept:
            printer.print_sources()

    def _last_turn(self) -> Message | None:
        return self.session.turns[-1] if self.session.turns else None

    def _attach_image(self, argument: str) -> None:
        number = self.session.attach(parse_path(argument))
        count = len(self.session.attached)
        others = "" if count == 1 else f", which has {count} images"
        print_line(f"image {number} is attached to the next message{others}")

    def _search(self, argument: str) -> None:
        hits = self.session.search(argument)
        if hits:
            print_hits(self.session, hits)
        else:
            print_notice("Nothing in the index matches.")

    def _set_retrieval(self, argument: str) -> None:
        if argument:
            mode = SWITCHED_ON if argument == "on" else argument
            self.session.change(retrieval=cast(Any, mode))
        print_line(f"retrieval: {self.session.settings.retrieval}")

    def _set_scope(self, argument: str) -> None:
        if argument:
            self.session.change(scope=cast(Any, argument))
        print_line(f"scope: {self.session.settings.scope}")

    def _open_image(self, argument: str) -> None:
        if not (argument.isascii() and argument.isdigit()) or len(argument) > 9:
            raise ConfigError("/open takes the number of an image", fix="Write, say, /open 1")
        number = int(argument)
        file = self.session.locate_image(number)
        viewer = find_viewer()
        if viewer is None:
            print_notice("There is no display to open it on.")
        elif not open_in_viewer(viewer, file):
            print_notice(f"The viewer {viewer} failed.")
        print_line(f"image {number}: {file}")

    def _clear(self, argument: str) -> None:
        self.session.clear()
        print_line("A new conversation begins.")

    def _print_help(self, argument: str) -> None:
        for name, (arguments, purpose) in USAGE.items():
            print_line(f"{f'{name} {arguments}':38} {purpose}")
        print_line("Any other text is a message. Ctrl-C ends an answer, Ctrl-D the conversation.")


def parse_path(text: str) -> Path:
    """Return the path that a user has typed, pasted or dropped on the terminal.

    It may be quoted, or have blanks after backslashes, as in a shell; blanks without either are
    part of it, too. ``~`` is the user's home folder.

    Raises:
        ConfigError: an empty text, or a home folder of an unknown user.
    """
    try:
        if not Path(text).exists():
            words = shlex.split(text)
            text = words[0] if len(words) == 1 else text
    except (OSError, ValueError):  # a name that is too long, a null byte, a quote without its end
        pass
    if not text:
        raise ConfigError("/image takes a file", fix="Write, say, /image photo.jpg")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        fix = "Write the whole path"
        raise ConfigError("the home folder of this user is unknown", place=text, fix=fix) from None
