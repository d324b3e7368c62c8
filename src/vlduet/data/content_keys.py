"""When two contents are the same one: the rule that losses mask by, that mining leaves out by, and that metrics count by."""

from __future__ import annotations

from vlduet.data import images
from vlduet.data.records import Parts


def text_key(text: str) -> str:
    """Names a text: those that differ only in case and white space have equal keys.

    Case is folded as Unicode says (STRASSE is straße); punctuation counts.
    """
    return " ".join(text.casefold().split())


def content_key(parts: Parts) -> str:
    """Names content: equal texts by `text_key`, and images of equal bytes, in the same order.

    Raises:
        ImageError: an image cannot be read.
    """
    return "|".join(
        text_key(part) if isinstance(part, str) else images.image_key(part) for part in parts
    )
