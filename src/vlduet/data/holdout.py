"""Share of a data set that is held out for validation, selected by a hash of the content.

The choice depends on each record alone: sorting the file or adding records changes it for no other
record, and records of one image are on the same side. Near-duplicates are not looked for:
``vlduet data split`` does that.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from vlduet.data.records import ImageRef, Record, iter_labelled_parts

HASHED_BYTES = 65536
"""Number of bytes at the start of an image that are hashed, so that large files need not be read.
"""


def is_in_holdout(record: Record, share: float) -> bool:
    """Return whether a record belongs to the share that is held out.

    Args:
        record: the start of its first image is read; without images, its texts decide.
        share: expected share of images (or texts) that are held out, from 0 to 1.
    """
    images = record.images()
    if images:
        content = _read_start(images[0])
    else:
        texts = [part for _, part in iter_labelled_parts(record) if isinstance(part, str)]
        content = "\n".join(texts).encode("utf-8", "surrogatepass")
    digest = hashlib.sha256(b"held out:" + content).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def _read_start(image: ImageRef) -> bytes:
    """Return up to HASHED_BYTES bytes of an image; of an unreadable one, its name."""
    if image.data is not None:
        return image.data[:HASHED_BYTES]
    path, offset, size = image.path, 0, HASHED_BYTES
    if image.byte_range is not None:
        path, offset = image.byte_range.file, image.byte_range.offset
        size = min(size, image.byte_range.size)
    assert isinstance(path, Path)
    try:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(size)
    except (OSError, ValueError):  # ValueError: a path with a null byte
        return image.name.encode("utf-8", "surrogatepass")
