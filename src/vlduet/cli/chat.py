"""`vlduet chat`."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from vlduet.cli._common import ModelFolder
from vlduet.cli.retrieval import Filters

INDEX = "An index of this model; enables search and retrieval."
RETRIEVE = (
    "How answers use the index: off, context (references before the answer) or interleave (images "
    "while it is generated). Default: context with an index."
)
SCOPE = "What references are searched for with: last (the last message) or dialog (all of them)."
THRESHOLD = "Lowest score of an image in interleaved answers, by default one for every sentence."
FEED_BACK = "Let the model read the images of interleaved answers, also in later turns."
TEMPERATURE = "0 takes the likeliest token; higher values sample."
SYSTEM = "Instruction for the whole conversation."
END_SIGNALS = (signal.SIGTERM, signal.SIGHUP)


def chat(
    model: ModelFolder,
    *,
    index: Annotated[Path | None, typer.Option(metavar="INDEX", help=INDEX)] = None,
    retrieve: Annotated[str | None, typer.Option(metavar="MODE", help=RETRIEVE)] = None,
    scope: Annotated[str, typer.Option(metavar="SCOPE", help=SCOPE)] = "last",
    where: Filters = None,
    k: Annotated[int, typer.Option("-k", min=1, help="References put in the prompt.")] = 3,
    threshold: Annotated[float | None, typer.Option(help=THRESHOLD)] = None,
    feed_back: Annotated[bool, typer.Option("--feed-back", help=FEED_BACK)] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length limit of an answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help=TEMPERATURE)] = 0.0,
    system: Annotated[str, typer.Option(metavar="TEXT", help=SYSTEM)] = "",
) -> None:
    """Converse with a model about texts and images, with retrieval from an index.

    Lines that begin with a slash are commands; /help lists them. Without a terminal, lines are read
    from the input as messages and commands, and the first error ends the program. A model that
    cannot generate or has no chat template, and an index of another model, are errors.
    """
    import tempfile
    from contextlib import ExitStack
    from typing import Any, cast

    from vlduet.cli.chat_commands import ChatCommands
    from vlduet.cli.chat_output import print_notice
    from vlduet.cli.chat_terminal import run_lines, run_terminal
    from vlduet.cli.retrieval import open_index
    from vlduet.model.duet import DuetModel
    from vlduet.workflows.chat_session import ChatSession, ChatSettings

    settings = ChatSettings(
        retrieval=cast(Any, retrieve or ("off" if index is None else "context")),
        scope=cast(Any, scope),
        where=where,
        k=k,
        threshold=threshold,
        feed_back=feed_back,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        system=system,
    )
    is_interactive = sys.stdin.isatty() and sys.stdout.isatty()
    with ExitStack() as stack:
        for number in END_SIGNALS:
            # Closing the terminal must delete the copies of images, too.
            stack.callback(signal.signal, number, signal.signal(number, _exit_by_signal))
        opened = None if index is None else stack.enter_context(open_index(index))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vlduet-chat-")))
        loaded = DuetModel.from_pretrained(model)
        session = ChatSession(loaded, opened, folder=folder, settings=settings)
        commands = ChatCommands(session, is_interactive=is_interactive)
        if not is_interactive:
            run_lines(commands, sys.stdin)
            return
        documents = "" if opened is None else f", {opened.count():,} documents"
        mode = f", retrieval: {session.settings.retrieval}" if opened is not None else ""
        print_notice(f"{model}{documents}{mode}. /help lists the commands, Ctrl-D ends.")
        run_terminal(commands)


def _exit_by_signal(number: int, frame: object) -> None:
    """End the program with the exit status that shells give to a signal.

    Further signals, such as those of a terminal that is closed, do not interrupt its cleanup.
    """
    for end_signal in END_SIGNALS:
        signal.signal(end_signal, signal.SIG_IGN)
    raise SystemExit(128 + number)
