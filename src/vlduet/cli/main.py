"""Entry point of `vlduet`: registers the commands, turns errors into a line and an exit status."""

from __future__ import annotations

import ctypes
import io
import os
import sys
import threading
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from vlduet import __version__
from vlduet.cli import (
    chat,
    classification,
    config,
    data,
    demo,
    evaluation,
    indexing,
    inspect,
    interleave,
    model,
    retrieval,
    serve,
    train,
    workflows,
)
from vlduet.cli.queries import QueryCommand
from vlduet.errors import VLDuetError
from vlduet.library_errors import describe_library_error
from vlduet.logs import install_log_handler, logger, strip_control_characters


class TranslatingGroup(TyperGroup):
    """Group of commands that turns exceptions which files have caused into errors of ours.

    Here, not in `main`: click takes an EOFError for the end of the user's input.
    """

    def invoke(self, ctx: Any) -> Any:
        """Run the command, and return what it returns.

        Raises:
            VLDuetError: for an exception that `describe_library_error` describes, without
                ``--debug``.
        """
        try:
            return super().invoke(ctx)
        except VLDuetError:
            raise
        except Exception as error:
            described = None if "--debug" in sys.argv else describe_library_error(error)
            if described is None:
                raise
            message, fix = described
            place = getattr(error, "filename", None)
            raise VLDuetError(message, place=place, fix=fix) from error


app = typer.Typer(
    cls=TranslatingGroup,
    name="vlduet",
    help="One vision-language model that generates and embeds, and retrieves for its answers.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(data.app, name="data")
app.add_typer(model.app, name="model")
app.add_typer(config.app, name="config")
app.command(cls=train.TrainCommand)(train.train)
app.command()(train.compare)
app.command(cls=retrieval.IndexCommand)(indexing.index)
app.command(cls=QueryCommand)(retrieval.search)
app.command(cls=QueryCommand)(retrieval.ask)
for command in (
    interleave.interleave,
    chat.chat,
    indexing.encode,
    classification.classify,
    evaluation.score,
    evaluation.certify,
    evaluation.report,
    demo.demo,
    workflows.mine,
    workflows.caption,
    inspect.analyse,
    inspect.align,
    serve.serve,
):
    app.command()(command)
app.command("eval")(evaluation.evaluate)


def _print_version(requested: bool) -> None:
    if requested:
        print(f"vlduet {__version__}")
        raise typer.Exit


@app.callback()
def common_options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Options that stand before the command."""
    install_log_handler()


def main() -> None:
    """Run the command line of `sys.argv` and exit; print errors of the user in one line.

    Such errors are VLDuetError, OSError, and those of `TranslatingGroup`. The exit status is 0 for
    success, 1 for such an error, 2 for wrong usage, and 130 after an interruption. Our own
    mistakes, and with --debug all errors, are raised. Sets TOKENIZERS_PARALLELISM, unless it is
    set, and changes how the process keeps memory, how errors of threads are reported
    (`log_thread_error`), and how its output replaces characters that cannot be encoded.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    keep_freed_memory()
    threading.excepthook = log_thread_error
    for stream in (sys.stdout, sys.stderr):
        # File names may hold bytes that are not valid text.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except VLDuetError as error:
        if "--debug" in sys.argv:
            raise
        _print_error(strip_control_characters(str(error)))
        raise SystemExit(1) from None
    except (KeyboardInterrupt, BrokenPipeError):
        raise SystemExit(130) from None
    except OSError as error:  # a path that cannot be read or written, or a full disk
        if "--debug" in sys.argv or error.errno is None:
            raise
        place = f"{error.filename}: " if error.filename is not None else ""
        fix = "Check the path, its permissions, and the free space"
        _print_error(f"{place}{error.strerror}. {fix}")
        raise SystemExit(1) from None


def log_thread_error(error: threading.ExceptHookArgs) -> None:
    """Log the exception that ended a thread of a library, such as a writer's on a full disk.

    One that `describe_library_error` does not describe, and every one with ``--debug``, is printed
    with its traceback.
    """
    described = None
    if error.exc_value is not None and "--debug" not in sys.argv:
        described = describe_library_error(error.exc_value)
    if described is None:
        threading.__excepthook__(error)
    else:
        logger.warning(f"warning: a thread has ended: {described[0]}")


def _print_error(message: str) -> None:
    typer.secho(f"error: {message}", fg="red", err=True)


# Parameter numbers of mallopt, from malloc.h.
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3


def keep_freed_memory() -> None:
    """Make glibc's malloc, for the whole process, keep freed memory for the next tensor.

    Nothing is done with other C libraries. By default every large tensor is mapped anew and the
    kernel clears its pages, which takes more than half of the time of a vision tower on a CPU.
    """
    libc = ctypes.CDLL(None) if os.name == "posix" else None
    mallopt = getattr(libc, "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 1 << 30)
        mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


if __name__ == "__main__":
    main()
