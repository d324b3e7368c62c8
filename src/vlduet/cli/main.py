"""`vlduet`: every verb, and the one place where errors become a line and an exit status."""

from __future__ import annotations

import ctypes
import io
import os
import sys
from typing import Annotated

import typer

from vlduet import __version__
from vlduet.cli import (
    align,
    analyse,
    caption,
    data,
    demo,
    evaluation,
    mine,
    model,
    retrieval,
    serve,
    train,
)
from vlduet.errors import VLDuetError
from vlduet.logs import install_log_handler, strip_control_characters

app = typer.Typer(
    name="vlduet",
    help="One vision-language model that generates and embeds, and so retrieves for its own generation.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(data.app, name="data")
app.add_typer(model.app, name="model")
train.register(app)
retrieval.register(app)
evaluation.register(app)
demo.register(app)
mine.register(app)
caption.register(app)
analyse.register(app)
align.register(app)
serve.register(app)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"vlduet {__version__}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options that stand before the verb."""
    install_log_handler()


def main() -> None:
    """Entry point. Exit status: 0 done, 1 the user can mend it, 2 wrong usage, 130 interrupted."""
    # Nothing here reaches for a hub unless the user asked for it.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    keep_freed_memory()
    for stream in (sys.stdout, sys.stderr):  # a file's name may be bytes that no text is
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except VLDuetError as error:
        if "--debug" in sys.argv:
            raise
        typer.secho(f"error: {strip_control_characters(str(error))}", fg="red", err=True)
        raise SystemExit(1) from None
    except (KeyboardInterrupt, BrokenPipeError):
        raise SystemExit(130) from None
    except OSError as error:  # a path that cannot be read or written, a full disk
        if "--debug" in sys.argv or error.errno is None:
            raise
        place = f"{error.filename}: " if error.filename is not None else ""
        typer.secho(
            f"error: {place}{error.strerror}. Check the path, its permissions, and the room",
            fg="red",
            err=True,
        )
        raise SystemExit(1) from None


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


def keep_freed_memory() -> None:
    """Let glibc's malloc keep what is freed for the next tensor of that size; nothing where there is no glibc.

    By default every large tensor is mapped anew, and the kernel clears its pages: more than half of the time of a vision
    tower on a CPU.
    """
    mallopt = getattr(ctypes.CDLL(None) if os.name == "posix" else None, "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 1 << 30)
        mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


if __name__ == "__main__":
    main()
