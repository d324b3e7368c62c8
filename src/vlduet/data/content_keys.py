"""Keys of contents. Equal keys mean equal content, for losses, mining and metrics alike."""

from __future__ import annotations

from vlduet.data import images
from vlduet.data.records import Parts


def text_key(text: str) -> str:
    """Return `text` case-folded and with single blanks: equal for texts that differ only in that.

    Case is folded as Unicode defines (STRASSE is straße); punctuation counts.
    """
    return " ".join(text.casefold().split())


def content_key(parts: Parts) -> str:
    """Return the `text_key` of each text and the SHA-256 of each image, in order, joined by ``|``.

    Raises:
        ImageError: an image cannot be read.
    """
    return "|".join(
        text_key(part) if isinstance(part, str) else images.image_key(part) for part in parts
    )
