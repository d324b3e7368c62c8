"""Container reader of folders of images, with files of captions beside the images or without."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from vlduet.data.image_formats import HEIC_FIX, HEIC_MESSAGE, HEIC_SUFFIXES, needs_heic_extra
from vlduet.data.readers.folder_scan import iter_folders
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

    Files are sorted, and those of a folder precede those of its subfolders. What `scan_folder`
    leaves out is counted; a folder that cannot be read is a row with an error. Relative paths start
    from `source`, whatever the root of `context` is.
    """
    context = replace(context, root=source)
    errors: list[tuple[Path, OSError]] = []
    for folder, content in iter_folders(source, context.ignored, errors=errors):
        yield from read_image_rows(folder, content.images, context, files={*content.files})
    for folder, error in errors:
        yield make_unreadable_folder_row(folder, error, context)


def make_unreadable_folder_row(folder: Path, error: OSError, context: ReadContext) -> SourceRow:
    """Return a row with the error of a folder: what cannot be read must not look deleted."""
    message = f"the folder cannot be read ({error.strerror})"
    fix = "Check its permissions"
    return SourceRow.broken(Place(str(folder)), context, "", message=message, fix=fix)


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
        if path.suffix.lower() in HEIC_SUFFIXES and needs_heic_extra(path):
            yield SourceRow.broken(place, context, image, message=HEIC_MESSAGE, fix=HEIC_FIX)
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
