"""Container reader of folders of images, with a text file beside each image or without."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from vlduet.data.images import IMAGE_SUFFIXES
from vlduet.data.readers.rows import UTF8_FIX, ReadContext, SourceRow, split_caption_lines
from vlduet.data.records import Place, is_utf8_encodable
from vlduet.errors import DataError


def read_image_folder_rows(source: Path, context: ReadContext) -> Iterator[SourceRow]:
    """Yield a row with ``image`` for every image file below a folder, recursively.

    Files are sorted, and those of a folder precede those of its subfolders. A ``.txt`` file of the
    same name gives ``captions``, one per line; if it cannot be read, the row has an error. The path
    below `source` is ``image`` and the default id. Names that start with a dot, linked folders and
    unreadable folders are skipped. Relative paths start from `source`, whatever
    the root of `context` is.
    """
    for folder, subfolders, files in os.walk(source):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in sorted(files):
            path = Path(folder, name)
            if path.suffix.lower() in IMAGE_SUFFIXES and not name.startswith("."):
                yield _read_image_row(path, replace(context, root=source))


def _read_image_row(path: Path, context: ReadContext) -> SourceRow:
    """Return the row of one image below the root: ``image``, and ``captions`` of a ``.txt`` file.

    The row has an error instead if the name of the image is not UTF-8, or its ``.txt`` file is not
    or cannot be read. The image is not opened; nothing is raised.
    """
    name = path.relative_to(context.root).as_posix()
    if not is_utf8_encodable(name):
        place = Place(ascii(str(path)))
        message = "a file name that is not UTF-8"
        return SourceRow.broken(place, context, ascii(name), message=message, fix="Rename it")
    value: dict[str, Any] = {"image": name}
    sidecar = path.with_suffix(".txt")
    try:
        if sidecar.is_file():
            value["captions"] = split_caption_lines(sidecar.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        message = "not UTF-8"
    except OSError as os_error:
        message = f"cannot be read ({os_error.strerror})"
    else:
        return SourceRow(Place(str(path)), context, name, value)
    error = DataError(message, place=sidecar, fix=UTF8_FIX)
    return SourceRow(Place(str(path)), context, name, error=error)
