"""Encoding of text files: UTF-8, or what a byte order mark says."""

from __future__ import annotations

import codecs
from pathlib import Path

from vlduet.errors import DataError

_ENCODINGS = {
    # The mark of UTF-32 starts with that of UTF-16.
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def detect_encoding(source: Path) -> str:
    """Return ``utf-8-sig``, ``utf-16`` or ``utf-32`` by the first bytes of a file.

    Text without a byte order mark is taken for UTF-8, and is not checked further.

    Raises:
        DataError: there are null bytes but no mark, as in UTF-16 without one, or in binary files.
        OSError: the file cannot be read.
    """
    with source.open("rb") as file:
        head = file.read(1024)
    for mark, encoding in _ENCODINGS.items():
        if head.startswith(mark):
            return encoding
    if b"\0" in head:
        message = "null bytes: no text, or UTF-16 without a byte order mark"
        raise DataError(message, place=source, fix="Save the file as UTF-8")
    return "utf-8-sig"
