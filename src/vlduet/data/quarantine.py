"""Where bad records go: a run never dies of one, and never hides that it dropped it."""

from __future__ import annotations

import json
import re
import threading
from collections import Counter
from pathlib import Path

from vlduet.data.records import Place, Record
from vlduet.errors import VLDuetError

_PARTICULAR = re.compile(r"'[^']*'|\([^()]*\)|\d[\d.,]*")


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
        for line in path.read_text(encoding="utf-8").splitlines() if path and path.exists() else ():
            try:
                row = json.loads(line)
                self._note(row["id"], row["place"], row["message"], row["cause"])
            except (json.JSONDecodeError, KeyError, TypeError):
                continue  # a line cut short by kill -9: its record is dropped, and written, again

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
        cause = re.sub(r"\s+([:,;.]|$)", r"\1", re.sub(r"\s+", " ", cause)).strip(" :,;.") or type(error).__name__
        place = place or inner
        message = f"{inner}: {message}" if inner and inner != place else message
        with self._lock:
            if not self._note(identity, place, message, cause):
                return False
            if self.path is not None:
                row = {"id": identity, "place": place, "cause": cause, "message": message, "fix": fix}
                self.path.parent.mkdir(parents=True, exist_ok=True)
                # One write in append mode: processes that share the file never mix their lines.
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
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

    def by_cause(self) -> dict[str, int]:
        """Drops by cause, names and numbers left out of it, the most frequent first."""
        return dict(sorted(self._causes.items(), key=lambda item: (-item[1], item[0])))

    def __str__(self) -> str:
        if not self.count:
            return "nothing dropped"
        causes = ", ".join(f"{count} x {cause}" for cause, count in self.by_cause().items())
        return f"{self.count} dropped ({causes})" + (f", listed in {self.path}" if self.path else "")
