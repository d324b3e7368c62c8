"""Length limits of a model, saved with it: tokens of a sequence, and tokens of one image in it.

`Limits` is what ``limits`` in vlduet.json holds. How a family keeps to `max_image_tokens` is said
by its `bounded_settings`; the resulting settings of the image processor are saved beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Self

from vlduet.errors import DataError
from vlduet.logs import logger

DEFAULT_MAX_TOKENS = 2048
"""Longest sequence where nothing else is configured or saved."""
DEFAULT_MAX_IMAGE_TOKENS = 1536
"""Most tokens of an image where nothing else is configured or saved: three quarters of
`DEFAULT_MAX_TOKENS`. SmolVLM and one tile of LLaVA-OneVision need up to 1,500."""


LIMIT_REMEDY = (
    "Give the record fewer images, or change the limits: data.max_tokens and "
    "model.max_image_tokens in training, 'vlduet model limit' for a model"
)
"""Remedy for images that do not fit, in a form that holds wherever a model is used."""
TRUNCATION_REMEDY = (
    "Shorten or split the text, or allow it to be cut; 'vlduet model limit' changes the limit"
)
"""Remedy for a text to embed that is longer than a model's limit."""
TOO_LONG = "longer than the limit of the model"
"""Cause of a text that is too long to embed; a quarantine counts such texts under it."""

TruncationCallback = Callable[[int, int], object]
"""Function that receives the position of an item that is cut, and its number of tokens before."""


def too_long_error(num_tokens: int, max_tokens: int, *, is_minimum: bool = False) -> DataError:
    """Return the error of a content to embed of `num_tokens` tokens, more than `max_tokens`.

    With `is_minimum`, it has at least `num_tokens`: it was not tokenised.
    """
    at_least = "at least " if is_minimum else ""
    counts = f"{at_least}{num_tokens} tokens, the limit is {max_tokens}"
    return DataError(f"{TOO_LONG} ({counts})", fix=TRUNCATION_REMEDY)


def accept_truncation(position: int, num_tokens: int) -> None:
    """Allow an item to be cut, and report nothing (a `TruncationCallback`)."""


@contextmanager
def log_truncation(subject: str) -> Iterator[TruncationCallback]:
    """Give a callback that allows items to be cut; after the block, log how many were cut.

    The log is one warning, with the number of tokens of the longest item, and none if no item was
    cut. It is for measurements, where texts beyond the limit are cut by convention.

    Args:
        subject: what is embedded, the begin of the warning.
    """
    lengths: list[int] = []

    def on_truncate(position: int, num_tokens: int) -> None:
        lengths.append(num_tokens)

    try:
        yield on_truncate
    finally:
        if lengths:
            longest = f"up to {max(lengths):,} tokens"
            logger.warning(f"{subject}: {format_truncation(len(lengths))}, {longest}")


def log_first_truncation(subject: str) -> TruncationCallback:
    """Return a callback that allows items to be cut, and logs the first of them as a warning.

    It is for functions that are called again and again, where `log_truncation` would repeat itself.

    Args:
        subject: what is embedded, the begin of the warning.
    """
    has_logged = False

    def on_truncate(position: int, num_tokens: int) -> None:
        nonlocal has_logged
        if not has_logged:
            has_logged = True
            logger.warning(
                f"{subject}: a text of {num_tokens:,} tokens is cut at the model's limit, and so "
                "are others that are too long (logged once)"
            )

    return on_truncate


def format_truncation(count: int, *, max_tokens: int | None = None) -> str:
    """Return that `count` texts were cut, at the limit of `max_tokens` tokens."""
    limit = "the model's limit" if max_tokens is None else f"{max_tokens:,} tokens"
    return f"{count:,} {'text was' if count == 1 else 'texts were'} cut at {limit}"


@dataclass(frozen=True, slots=True)
class Limits:
    """Length limits in tokens."""

    max_tokens: int = DEFAULT_MAX_TOKENS
    """Longest sequence; texts are cut to it, images never."""
    max_image_tokens: int | None = None
    """Most tokens of an image, which is downscaled to them; None: as many as the checkpoint's own
    image processor gives."""

    @classmethod
    def from_manifest(cls, manifest: Mapping[str, Any], *, max_tokens: int | None = None) -> Self:
        """Return the limits of a model by the content of its vlduet.json.

        A plain checkpoint (an empty manifest) gets the defaults, where an image takes three
        quarters of a sequence and DEFAULT_MAX_IMAGE_TOKENS at most. A manifest of an earlier
        version has no ``limits``: it gets DEFAULT_MAX_TOKENS and no limit of images.

        Args:
            manifest: the parsed file.
            max_tokens: longest sequence in place of the saved one or the default.
        """
        if "limits" in manifest:
            saved = cls(**manifest["limits"])
        elif manifest:
            saved = cls()
        else:
            longest = max_tokens or DEFAULT_MAX_TOKENS
            saved = cls(max_image_tokens=max(1, min(DEFAULT_MAX_IMAGE_TOKENS, longest * 3 // 4)))
        return cls(max_tokens or saved.max_tokens, saved.max_image_tokens)

    def to_dict(self) -> dict[str, int | None]:
        """Return the fields by name, as in vlduet.json."""
        return asdict(self)
