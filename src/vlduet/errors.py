"""Define every error that a user can cause.

    VLDuetError            base class: one line that says what is wrong, where, and what to do
    ├── ConfigError        an invalid key, value or combination in a config file or an option
    ├── DataError          an unusable record, file of records or corpus
    │   └── ImageError     an image that cannot or must not be decoded
    ├── ModelError         an unusable checkpoint, adapter or backbone
    ├── TrainingError      a run that must stop (NaN, or a checkpoint of another run)
    ├── RetrievalError     an unusable index, or an impossible search
    ├── LockError          a folder or file that another process is writing
    ├── PackageError       a package that cannot be downloaded or whose hash is wrong
    └── MissingExtraError  an optional dependency that is not installed

The command line prints ``str(error)`` and exits with status 1; ``--debug`` shows the traceback.
Mistakes of the program itself are assertions, not one of these errors.
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable
from functools import partial
from typing import Any

MAX_VALUE_CHARS = 80
"""Number of characters of a value that an error quotes (`quote_value`)."""
MAX_MESSAGE_CHARS = 600
"""Number of characters of each part of an error (message, place, remedy)."""


class VLDuetError(Exception):
    """Base class of all errors that a user can cause and repair.

    Its arguments are the attributes `message`, `place` and `fix`.
    """

    def __init__(self, message: str, *, place: object | None = None, fix: str | None = None):
        """Set ``str(error)`` to ``PLACE: MESSAGE. FIX``, without the parts that are missing.

        Args:
            message: What is wrong, with the value as the user wrote it.
            place: Location of the mistake, as ``file:line:field`` or the name of an option; stored
                as ``str(place)``.
            fix: What the user can do about it, as an imperative sentence.

        Each of them is shortened to `MAX_MESSAGE_CHARS`.
        """
        message = self.message = shorten(message, MAX_MESSAGE_CHARS)
        self.place = None if place is None else shorten(str(place), MAX_MESSAGE_CHARS)
        fix = self.fix = None if fix is None else shorten(fix, MAX_MESSAGE_CHARS)
        text = f"{self.place}: {message}" if self.place else message
        super().__init__(f"{text}. {fix}" if fix else text)

    def __reduce__(self) -> tuple[Any, ...]:
        # Loader workers send errors to the main process, and exceptions do not pickle their
        # keyword arguments by themselves.
        return partial(type(self), place=self.place, fix=self.fix), (self.message,)


class ConfigError(VLDuetError):
    """Error about an invalid key, value or combination in a config file or a command option."""


class DataError(VLDuetError):
    """Error about an unusable record, file of records or corpus."""


class ImageError(DataError):
    """Error about one image that cannot be decoded, or must not be (too large, unsafe format)."""


class ModelError(VLDuetError):
    """Error about an unusable checkpoint, adapter or backbone."""


class TrainingError(VLDuetError):
    """Error about a run that must stop: a loss of NaN, or a checkpoint of a different run."""


class RetrievalError(VLDuetError):
    """Error about an unusable index or an impossible search."""


class LockError(VLDuetError):
    """Error about a folder or file that another process is writing."""


class PackageError(VLDuetError):
    """Error about a package that cannot be downloaded, or whose content is not the pinned one."""


class MissingExtraError(VLDuetError):
    """Error about an optional dependency that is not installed."""


def suggest_name(name: str, known_names: Iterable[str]) -> str:
    """Return the sentence that helps after an unknown name, for the `fix` of an error.

    Args:
        name: The name that the user wrote.
        known_names: All valid names, in any order.

    Returns:
        ``Did you mean 'x'?`` with the single most similar known name. If none is similar (ratio
        below 0.6), ``Known: a, b, c`` with all of them, sorted; ``Known: none`` if there are none.
    """
    candidates = sorted(known_names)
    matches = difflib.get_close_matches(name, candidates, n=1, cutoff=0.6)
    if matches:
        return f"Did you mean '{matches[0]}'?"
    return f"Known: {', '.join(candidates) or 'none'}"


def shorten(text: str, max_chars: int) -> str:
    """Return a text of at most `max_chars` >= 5 characters, with ``...`` in place of its middle."""
    if len(text) <= max_chars:
        return text
    num_last = (max_chars - 3) // 2
    return f"{text[: max_chars - 3 - num_last]}...{text[-num_last:]}"


def _make_short_repr() -> reprlib.Repr:
    """Return a formatter that looks at a bounded number of the items of nested values."""
    short_repr = reprlib.Repr()
    short_repr.maxlevel = 3
    short_repr.maxlist = short_repr.maxtuple = short_repr.maxdict = short_repr.maxset = 12
    short_repr.maxstring = short_repr.maxlong = short_repr.maxother = MAX_VALUE_CHARS
    return short_repr


_SHORT_REPR = _make_short_repr()


def quote_value(value: object) -> str:
    """Return ``repr(value)`` shortened to `MAX_VALUE_CHARS`, for the message of an error.

    Time and memory are bounded for nested lists and dicts of any size.
    """
    try:
        return shorten(_SHORT_REPR.repr(value), MAX_VALUE_CHARS)
    except ValueError:  # an integer of thousands of digits has no text
        return "an integer of thousands of digits"
