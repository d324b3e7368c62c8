"""What a person sees while something runs, and what is kept of it: progress, one-line messages, metrics and trackers."""

from __future__ import annotations

import json
import sys
import time
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sized
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from vlduet.files import read_json_lines

T = TypeVar("T")

PROGRESS_LINE_SECONDS = 10.0
"""Seconds between two progress lines when the output is not a terminal."""


def strip_control_characters(text: str, keep: str = "") -> str:
    """Without control characters: what stands in a file must not steer the terminal."""
    return "".join(c if c in keep or unicodedata.category(c) != "Cc" else " " for c in text)


def say(text: str) -> None:
    """One line to standard error, where messages never mix with printed results."""
    print(strip_control_characters(text, keep="\n\t"), file=sys.stderr, flush=True)


def track_progress(items: Iterable[T], *, total: int | None = None, label: str = "") -> Iterator[T]:
    """Yield `items` under a progress bar on standard error; plain lines now and then when that is not a terminal."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with ProgressBar(total=total, label=label) as bar:
        for item in items:
            yield item
            bar.advance()


class ProgressBar:
    """A progress bar that is advanced by hand, with a note beside it (a loss, an item's name)."""

    def __init__(self, *, total: int | None, label: str = ""):
        self.total, self.label, self.count, self.note = total, label, 0, ""
        self._bar: Any = None
        self._started = self._spoke = time.monotonic()

    def __enter__(self) -> Self:
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
        """`count` more items are done."""
        self.count += count
        self.note = self.note if note is None else note
        if self._bar is not None:
            self._bar.update(self._task, advance=count, note=self.note)
        elif time.monotonic() - self._spoke > PROGRESS_LINE_SECONDS:
            self._spoke = time.monotonic()
            say(self._line())

    def _line(self) -> str:
        of = f"{self.count}/{self.total}" if self.total else str(self.count)
        return f"{self.label}: {of} after {time.monotonic() - self._started:.0f} s {self.note}".rstrip()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        if kind is None and time.monotonic() - self._started > 2.0:
            say(self._line())


class MetricsLog:
    """`metrics.jsonl`, one object a line, and tensorboard where it is installed.

    Lines at or past `resume_at` are dropped on opening: a resumed run writes them again.
    """

    def __init__(self, folder: Path, *, resume_at: int = 0):
        self.path = folder / "metrics.jsonl"
        kept = [row for row in read_metrics(self.path) if row["step"] < resume_at]
        self.path.write_text("".join(json.dumps(row) + "\n" for row in kept))
        self._file = self.path.open("a")
        self._board: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:  # tensorboard is an extra; metrics.jsonl always holds everything
            return
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_at)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Values of one step, flushed at once so that a killed run keeps them."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Close both."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a `metrics.jsonl`; a half-written last line (kill -9) is left out."""
    return read_json_lines(path)
