"""Quarantine: the list of dropped records. A run does not stop at a bad record, nor hide it."""

from __future__ import annotations

import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Self, TypeVar

from vlduet.data.records import Place, Record
from vlduet.errors import DataError, VLDuetError
from vlduet.files import read_json_lines

T = TypeVar("T")
U = TypeVar("U")

_PARTICULARS = re.compile(r"'[^']*'|\([^()]*\)|(?<![A-Za-z]-)\d[\d.,]*")  # but not the 8 of UTF-8

QUARANTINE_SUFFIX = ".quarantine.jsonl"
"""End of the name of every quarantine file."""


def quarantine_path(output: Path) -> Path:
    """Return the path of the quarantine file of a run that writes `output`."""
    return output.with_suffix(QUARANTINE_SUFFIX)


def generalize_cause(message: str) -> str:
    """Return a message without quoted names, remarks in parentheses and numbers; it may be empty.

    Messages of errors with one cause differ in these only.
    """
    cause = _PARTICULARS.sub("", message)
    return re.sub(r"\s+([:,;.]|$)", r"\1", re.sub(r"\s+", " ", cause)).strip(" :,;.")


def bisect_failures(
    function: Callable[[list[T]], Iterable[U]],
    items: list[T],
    *,
    on_error: Callable[[T, DataError], object],
) -> list[U | None]:
    """Apply a batch function to all items at once, and isolate the items that it cannot handle.

    A batch that raises DataError is halved until the broken item is alone. Other exceptions, and
    those of `on_error`, propagate.

    Args:
        function: returns one result per item, in order. It may get an item several times, and is
            not called for no items.
        on_error: receives every broken item with its error, in order.

    Returns:
        One result per item; None for a broken one, [] for no items.
    """
    if not items:
        return []
    try:
        return list(function(items))
    except DataError as error:
        if len(items) == 1:
            on_error(items[0], error)
            return [None]
    middle = len(items) // 2
    first_half = bisect_failures(function, items[:middle], on_error=on_error)
    return first_half + bisect_failures(function, items[middle:], on_error=on_error)


class Quarantine:
    """List of dropped records, one JSON line each: ``{"id", "place", "cause", "message", "fix"}``.

    A drop is listed once, however many epochs or restarts meet it: an existing file is read first
    and continued. Lines hold no times, so that equal runs write equal files. Thread-safe.
    """

    def __init__(self, path: Path | None = None):
        """Read the drops that an earlier run listed at `path`; incomplete lines are ignored.

        Args:
            path: the file, not created before the first drop; None keeps the list in memory only.
        """
        self.path = path
        self._lock = threading.Lock()
        self._drops: set[tuple[str | None, str | None, str]] = set()  # id, place, message
        self._causes: Counter[str] = Counter()
        for row in read_json_lines(path) if path else ():
            try:
                self._register(row["id"], row["place"], row["message"], row["cause"])
            except (KeyError, TypeError):
                continue  # not a line of ours, or one that a killed process left incomplete

    @classmethod
    def create(cls, path: Path) -> Self:
        """Return an empty quarantine; the file of an earlier run at `path` is deleted."""
        path.unlink(missing_ok=True)
        return cls(path)

    def add(self, dropped: Record | Place | str | None, error: Exception) -> bool:
        """List one dropped record, and append it to the file, whose folder is created if missing.

        Args:
            dropped: the record, or its place if it could not even be parsed.
            error: the reason, of any type. Its own place, such as an image's path, precedes the
                message, or stands in for the place if `dropped` has none.

        Returns:
            True if the drop is new; False, and nothing is written, if one with the same id, place
            and message is listed already.
        """
        record_id = dropped.id if isinstance(dropped, Record) else None
        position = dropped.place if isinstance(dropped, Record) else dropped
        place = None if position is None else str(position)
        message = str(error) or type(error).__name__
        fix = None
        if isinstance(error, VLDuetError):
            message, fix = error.message, error.fix
        cause = generalize_cause(message) or type(error).__name__
        if isinstance(error, VLDuetError) and error.place:
            place = place or error.place
            message = message if error.place == place else f"{error.place}: {message}"
        with self._lock:
            if not self._register(record_id, place, message, cause):
                return False
            if self.path is not None:
                row = {"id": record_id, "place": place, "cause": cause, "message": message}
                self.path.parent.mkdir(parents=True, exist_ok=True)
                # One write in append mode: processes that share the file never mix their lines.
                # ASCII, because the letters themselves may be what is wrong.
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row | {"fix": fix}) + "\n")
        return True

    def _register(self, record_id: str | None, place: str | None, message: str, cause: str) -> bool:
        """Count a drop in memory and return True; return False, and do nothing, if it is known."""
        drop = (record_id, place, message)
        if drop in self._drops:
            return False
        self._drops.add(drop)
        self._causes[cause] += 1
        return True

    @property
    def count(self) -> int:
        """Number of drops, those of an earlier run in the same file included."""
        return len(self._drops)

    def count_by_cause(self) -> dict[str, int]:
        """Return the number of drops by cause, the most frequent first.

        The cause is that of `generalize_cause`.
        """
        return dict(sorted(self._causes.items(), key=lambda item: (-item[1], item[0])))

    def __str__(self) -> str:
        """Return the number of drops, in all and by cause, and the path of the file if it has one.

        Without drops, return ``nothing dropped``.
        """
        if not self.count:
            return "nothing dropped"
        causes = ", ".join(f"{count} x {cause}" for cause, count in self.count_by_cause().items())
        listing = f", listed in {self.path}" if self.path else ""
        return f"{self.count} dropped ({causes}){listing}"
