"""Every error a user can meet.

    VLDuetError            one clear line: what is wrong, where, what to do
    ├── ConfigError        a key, a value or a combination in a config or an option
    ├── DataError          a record, an image or a corpus
    │   └── ImageError     one image that cannot or must not be decoded
    ├── ModelError         a checkpoint, an adapter, a backbone
    ├── TrainingError      a run that must stop (NaN, a checkpoint of another run)
    ├── RetrievalError     an index, a search
    ├── PackageError       a package that cannot be fetched or fails its hash
    └── MissingExtraError  an optional dependency that is not installed

The command line prints ``str(error)`` and exits with 1; ``--debug`` shows the traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class VLDuetError(Exception):
    """Base of all errors that a user can cause and mend.

    Args:
        message: what is wrong, with the value as the user wrote it.
        place: where, as ``file:line:field`` or the option's name.
        fix: what to do about it, as an imperative sentence.
    """

    def __init__(self, message: str, *, place: object | None = None, fix: str | None = None):
        self.message = message
        self.place = None if place is None else str(place)
        self.fix = fix
        text = f"{self.place}: {message}" if self.place else message
        super().__init__(f"{text}. {fix}" if fix else text)

    def __reduce__(self) -> tuple[Any, ...]:
        # Errors cross process borders (loader workers), and keyword arguments do not pickle by themselves.
        return (_rebuild_error, (type(self), self.message, self.place, self.fix))


def _rebuild_error(
    kind: type[VLDuetError], message: str, place: str | None, fix: str | None
) -> VLDuetError:
    return kind(message, place=place, fix=fix)


class ConfigError(VLDuetError):
    """A key, a value or a combination in a config file or an option."""


class DataError(VLDuetError):
    """A record, a file of records or a corpus."""


class ImageError(DataError):
    """One image that cannot or must not be decoded."""


class ModelError(VLDuetError):
    """A checkpoint, an adapter or a backbone."""


class TrainingError(VLDuetError):
    """A run that must stop: NaN, or a checkpoint that belongs to another run."""


class RetrievalError(VLDuetError):
    """An index or a search."""


class PackageError(VLDuetError):
    """A package that cannot be fetched, or whose content is not what was pinned."""


class MissingExtraError(VLDuetError):
    """An optional dependency that is not installed."""


def suggest_name(name: str, known: Iterable[str]) -> str:
    """The remedy for an unknown name: the closest known one, else all of them."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"Did you mean '{near[0]}'?" if near else f"Known: {', '.join(known) or 'none'}"
