"""Container reader of folders of images, with files of captions beside the images or without."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from vlduet.data.images import IMAGE_SUFFIXES
from vlduet.data.readers.rows import UTF8_FIX, ReadContext, SourceRow, split_caption_lines
from vlduet.data.records import Place, is_utf8_encodable
from vlduet.errors import DataError
from vlduet.structured_files import read_json_object, require_regular_file

CAPTION_SUFFIXES = (".txt", ".caption")
"""Endings of the file beside an image that holds its captions; the first that exists is read."""
SIDECAR_SUFFIXES = (*CAPTION_SUFFIXES, ".json")
"""Endings of the files beside an image that are read: captions, and an object of other columns."""


def read_image_folder_rows(source: Path, context: ReadContext) -> Iterator[SourceRow]:
    """Yield the row of every image file below a folder, recursively, as `read_image_rows` does.

    Files are sorted, and those of a folder precede those of its subfolders. Names that start with a
    dot, linked folders and unreadable folders are skipped. Relative paths start from `source`,
    whatever the root of `context` is.
    """
    context = replace(context, root=source)
    for folder, subfolders, files in os.walk(source):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        images = [
            name
            for name in sorted(files)
            if Path(name).suffix.lower() in IMAGE_SUFFIXES and not name.startswith(".")
        ]
        yield from read_image_rows(Path(folder), images, context, files=set(files))


def read_image_rows(
    folder: Path, images: list[str], context: ReadContext, *, files: Collection[str]
) -> Iterator[SourceRow]:
    """Yield a row with ``image`` for every image file of a folder.

    The path below the root of `context` is ``image`` and the default id. Of files with the same
    name, one of `CAPTION_SUFFIXES` gives ``captions``, one per line, and a ``.json`` with an object
    gives other columns, as in a webdataset. If one of them cannot be read, the row has an error.

    Args:
        images: names of the image files.
        files: names of all files of the folder.
    """
    for name in images:
        path = folder / name
        image = path.relative_to(context.root).as_posix()
        place = Place(str(path))
        if not is_utf8_encodable(image):
            message = "a file name that is not UTF-8"
            place = Place(ascii(str(path)))
            yield SourceRow.broken(place, context, ascii(image), message=message, fix="Rename it")
            continue
        try:
            value = {**_read_sidecars(path, files), "image": image}
        except DataError as error:
            yield SourceRow(place, context, image, error=error)
        else:
            yield SourceRow(place, context, image, value)


def _read_sidecars(path: Path, files: Collection[str]) -> dict[str, Any]:
    """Return the columns that the files beside an image hold; {} without such files.

    Captions of a text file replace a ``caption`` of the object, which img2dataset writes into both.

    Raises:
        DataError: a file is not UTF-8, no JSON object, or cannot be read.
    """
    names = {suffix: path.stem + suffix for suffix in SIDECAR_SUFFIXES}
    value: dict[str, Any] = {}
    if names[".json"] in files:
        sidecar = path.with_name(names[".json"])
        fix = "Write {...}, or rename it"
        value = read_json_object(sidecar, error_class=DataError, fix=fix)
    for suffix in CAPTION_SUFFIXES:
        if names[suffix] in files:
            value.pop("caption", None)
            value["captions"] = split_caption_lines(_read_text(path.with_name(names[suffix])))
            break
    return value


def _read_text(path: Path) -> str:
    """Return the content of a text file. Raise DataError if it is not UTF-8 or cannot be read."""
    require_regular_file(path, error_class=DataError)
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise DataError("not UTF-8", place=path, fix=UTF8_FIX) from None
    except OSError as error:
        message = f"cannot be read ({error.strerror})"
        raise DataError(message, place=path, fix="Check its permissions") from None
