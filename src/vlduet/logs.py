"""Log messages, progress bars, and the metrics of training runs.

The library logs to the logger ``vlduet`` and never prints. A program that wants to see its messages
configures `logging`; the command line calls `install_log_handler`. Metrics go to ``metrics.jsonl``
and, where it is installed, to tensorboard.
"""

from __future__ import annotations

import json
import logging
import sys
import time
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sized
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from vlduet.files import read_json_lines, write_text_atomically

T = TypeVar("T")

PROGRESS_LINE_SECONDS = 10.0
"""Seconds between two progress messages when standard error is not a terminal."""

MIN_REPORTED_SECONDS = 2.0
"""Loops that took less time than this, in seconds, end without a message."""

CONTROL_CATEGORIES = frozenset({"Cc", "Zl", "Zp"})
"""Unicode categories of control characters and of separators of lines and paragraphs."""
BIDI_CONTROLS = frozenset(
    "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
)
"""Characters that change the direction of the text behind them."""

logger = logging.getLogger("vlduet")
"""Logger of the whole package. With several processes only the main one logs (`distributed`)."""


def strip_control_characters(text: str, keep: str = "") -> str:
    """Return `text` with blanks in place of control characters, except those in `keep`.

    Control characters are those of Unicode's category Cc, the line and paragraph separators, and
    `BIDI_CONTROLS`. Text from files must not be able to send escape sequences to the user's
    terminal, nor to reorder what is shown.
    """
    return "".join(
        " "
        if c not in keep and (unicodedata.category(c) in CONTROL_CATEGORIES or c in BIDI_CONTROLS)
        else c
        for c in text
    )


def format_bytes(num_bytes: float) -> str:
    """Return a size with three digits, such as ``2.36 MB``, in a unit from bytes to TB (1e12)."""
    size, unit = num_bytes, "bytes"
    for larger_unit in ("KB", "MB", "GB", "TB"):
        if size < 999.5:
            break
        size, unit = size / 1000, larger_unit
    return f"{size:,.0f} {unit}" if size >= 999.5 else f"{size:.3g} {unit}"


# --------------------------------------------------------------------- messages


class ConsoleHandler(logging.Handler):
    """Log handler that writes plain messages to standard error.

    On a terminal rich prints them, above a running progress bar and with warnings in yellow.
    Elsewhere (a pipe, a file) every message is written unwrapped.
    """

    def emit(self, record: logging.LogRecord) -> None:
        """Write one message and a newline to standard error.

        Control characters other than newlines and tabs become blanks. OSError and ValueError, such
        as those of a closed pipe, go to `logging.Handler.handleError`, which does not raise.
        """
        try:
            text = strip_control_characters(self.format(record), keep="\n\t")
            if sys.stderr.isatty():
                from rich.console import Console

                style = "yellow" if record.levelno >= logging.WARNING else ""
                console = Console(stderr=True, soft_wrap=True, markup=False, emoji=False)
                console.print(text, style=style, highlight=False)
            else:
                sys.stderr.write(f"{text}\n")
                sys.stderr.flush()
        except (OSError, ValueError):  # a closed pipe, a closed file
            self.handleError(record)


def install_log_handler() -> None:
    """Show the package's messages of level INFO and above on standard error.

    For programs such as the command line; libraries configure `logging` as they like. Calling it
    again changes nothing.
    """
    logger.setLevel(logging.INFO)
    if not any(isinstance(handler, ConsoleHandler) for handler in logger.handlers):
        logger.addHandler(ConsoleHandler())


# --------------------------------------------------------------------- progress


def track_progress(items: Iterable[T], *, total: int | None = None, label: str = "") -> Iterator[T]:
    """Yield `items` one by one while a `ProgressBar` shows or logs how many are finished.

    Args:
        items: The items to pass through, unchanged. One counts as finished when the next is asked
            for.
        total: Number of items; by default ``len(items)``, or unknown for an iterator.
        label: Text in front of the bar.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    with ProgressBar(total=total, label=label) as bar:
        for item in items:
            yield item
            bar.advance()


class ProgressBar:
    """Progress of a loop, as a context manager whose `advance` is called by hand.

    On a terminal it is a bar on standard error. Elsewhere it is a log message every
    `PROGRESS_LINE_SECONDS`, and one at the end of a loop that took a while.
    """

    def __init__(self, *, total: int | None, label: str = ""):
        """Start the clock. The bar itself appears when the ``with`` block begins.

        Args:
            total: Number of items, or None if it is unknown.
            label: Text in front of the bar.
        """
        self.total = total
        self.label = label
        self.count = 0
        """Number of finished items."""
        self.note = ""
        """Text behind the bar, such as the current loss."""
        self._bar: Any = None
        self._started = time.monotonic()
        self._last_logged = self._started

    def __enter__(self) -> Self:
        """Show the bar if standard error is a terminal; return the object itself."""
        if sys.stderr.isatty():
            from rich import progress as rich
            from rich.console import Console

            columns = (
                rich.TextColumn("{task.description}"),
                rich.BarColumn(),
                rich.MofNCompleteColumn(),
                rich.TimeElapsedColumn(),
                rich.TimeRemainingColumn(),
                rich.TextColumn("{task.fields[note]}"),
            )
            self._bar = rich.Progress(*columns, console=Console(stderr=True), transient=True)
            self._bar.start()
            self._task = self._bar.add_task(self.label, total=self.total, note="")
        return self

    def advance(self, count: int = 1, note: str | None = None) -> None:
        """Count `count` more finished items, and update the bar.

        Without a bar, log the progress if the last log line is `PROGRESS_LINE_SECONDS` old.

        Args:
            count: Number of items finished since the last call.
            note: New text behind the bar; None keeps the present one.
        """
        self.count += count
        if note is not None:
            self.note = note
        if self._bar is not None:
            self._bar.update(self._task, advance=count, note=self.note)
        elif time.monotonic() - self._last_logged > PROGRESS_LINE_SECONDS:
            self._last_logged = time.monotonic()
            logger.info(self._format_line())

    def _format_line(self) -> str:
        """Return the progress as text: ``LABEL: 3/10 after 12 s NOTE``."""
        count = f"{self.count}/{self.total}" if self.total else str(self.count)
        seconds = time.monotonic() - self._started
        return f"{self.label}: {count} after {seconds:.0f} s {self.note}".rstrip()

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Remove the bar; log a last line unless an error ended a loop or it was short.

        Short is at most `MIN_REPORTED_SECONDS`. Exceptions propagate.
        """
        if self._bar is not None:
            self._bar.stop()
        if exception_type is None and time.monotonic() - self._started > MIN_REPORTED_SECONDS:
            logger.info(self._format_line())


# --------------------------------------------------------------------- metrics


class MetricsLog:
    """Writer of a run's ``metrics.jsonl``, and of tensorboard's files where it is installed."""

    def __init__(self, folder: Path, *, resume_at: int = 0):
        """Open ``folder/metrics.jsonl``, and ``folder/tensorboard`` where it is installed.

        Args:
            folder: Existing folder of the run.
            resume_at: First step that will be written. Existing rows of this and later steps are
                deleted from the file, because a resumed run writes them again; 0 deletes all. Lines
                that are not JSON are deleted too. The file is replaced at once, so that an error
                (OSError, such as a full disk) leaves it as it was.
        """
        self.path = folder / "metrics.jsonl"
        rows = [row for row in read_metrics(self.path) if row["step"] < resume_at]
        write_text_atomically(self.path, "".join(json.dumps(row) + "\n" for row in rows))
        self._file = self.path.open("a")
        self._board: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:  # tensorboard is optional; metrics.jsonl always holds everything
            return
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_at)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append the row ``{"step": step, **values}``, and add each value to tensorboard if open.

        The file is flushed, so that the row outlives a killed process.
        """
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Close the file and tensorboard's writer."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Return the rows of a ``metrics.jsonl``, each with its ``step``, in file order.

    An incomplete last line (from a killed process) is skipped. A missing file gives an empty list.
    """
    return read_json_lines(path)
