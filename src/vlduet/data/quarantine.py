"""Where bad records go: a run never dies of one, and never hides that it dropped it."""

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

_PARTICULAR = re.compile(r"'[^']*'|\([^()]*\)|\d[\d.,]*")


QUARANTINE_SUFFIX = ".quarantine.jsonl"


def quarantine_path(out: Path) -> Path:
    """Where the drops of a run that writes `out` are listed."""
    return out.with_suffix(QUARANTINE_SUFFIX)


def bisect_failures(
    function: Callable[[list[T]], Iterable[U]],
    items: list[T],
    *,
    on_error: Callable[[T, DataError], object],
) -> list[U | None]:
    """`function` of all items at once, one result an item; None for an item that it cannot read, told to `on_error`.

    A batch that fails is halved until the broken item stands alone.
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
    return [
        found
        for half in (items[:middle], items[middle:])
        for found in bisect_failures(function, half, on_error=on_error)
    ]


class Quarantine:
    """Dropped records, one JSON line each: ``{"id", "place", "cause", "message", "fix"}``.

    Lines hold no times and come in the order of the drops, so that equal runs write equal files. The same drop is
    written once, however many epochs or restarts meet it: a file that already exists is read first and continued.

    Args:
        path: the file, made at the first drop; None keeps the drops in memory.
    """

    def __init__(self, path: Path | None = None):
        self.path = path
        self._lock = threading.Lock()
        self._seen: set[tuple[str | None, str | None, str]] = set()
        self._causes: Counter[str] = Counter()
        for row in (
            read_json_lines(path) if path else ()
        ):  # of a line that was cut short, the record is dropped again
            try:
                self._note(row["id"], row["place"], row["message"], row["cause"])
            except (KeyError, TypeError):
                continue  # not a line of ours

    @classmethod
    def create(cls, path: Path) -> Self:
        """One that tells of this run alone: what an earlier run listed in the file goes."""
        path.unlink(missing_ok=True)
        return cls(path)

    def add(self, what: Record | Place | str | None, error: Exception) -> bool:
        """Drop one record.

        Args:
            what: the record, or its place where it could not even be read.
            error: why. Its own place (an image's path, say) goes before the message.

        Returns:
            False when this very drop is known already.
        """
        identity = what.id if isinstance(what, Record) else None
        where = what.place if isinstance(what, Record) else what
        place = None if where is None else str(where)
        message, inner, fix = str(error) or type(error).__name__, None, None
        if isinstance(error, VLDuetError):
            message, inner, fix = error.message, error.place, error.fix
        cause = _PARTICULAR.sub("", message)
        cause = (
            re.sub(r"\s+([:,;.]|$)", r"\1", re.sub(r"\s+", " ", cause)).strip(" :,;.")
            or type(error).__name__
        )
        place = place or inner
        message = f"{inner}: {message}" if inner and inner != place else message
        with self._lock:
            if not self._note(identity, place, message, cause):
                return False
            if self.path is not None:
                row = {
                    "id": identity,
                    "place": place,
                    "cause": cause,
                    "message": message,
                    "fix": fix,
                }
                self.path.parent.mkdir(parents=True, exist_ok=True)
                # One write in append mode: processes that share the file never mix their lines.
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")  # ASCII: what is wrong may be its letters
        return True

    def _note(self, identity: str | None, place: str | None, message: str, cause: str) -> bool:
        key = (identity, place, message)
        if key in self._seen:
            return False
        self._seen.add(key)
        self._causes[cause] += 1
        return True

    @property
    def count(self) -> int:
        """How many drops there were, those found in the file included."""
        return len(self._seen)

    def count_by_cause(self) -> dict[str, int]:
        """Drops by cause, names and numbers left out of it, the most frequent first."""
        return dict(sorted(self._causes.items(), key=lambda item: (-item[1], item[0])))

    def __str__(self) -> str:
        if not self.count:
            return "nothing dropped"
        causes = ", ".join(f"{count} x {cause}" for cause, count in self.count_by_cause().items())
        return f"{self.count} dropped ({causes})" + (
            f", listed in {self.path}" if self.path else ""
        )
