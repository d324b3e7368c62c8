"""Container reader of webdataset archives. A broken row is yielded with its error."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from vlduet.data.images import IMAGE_SUFFIXES
from vlduet.data.readers.rows import ReadContext, SourceRow, split_caption_lines
from vlduet.data.records import Place
from vlduet.errors import DataError

MAX_MEMBER_BYTES = 256 * 2**20
"""Largest size of one archive member: a compressed archive may unpack to any size."""


def read_tar_rows(source: Path, context: ReadContext) -> Iterator[SourceRow]:
    """Yield the rows of a webdataset ``.tar``, which may be compressed.

    The archive is streamed and never unpacked. Neighbouring members whose paths agree up to the
    first dot of the name form one row, with the value of `_parse_members` and ``ARCHIVE/PATH`` as
    default id. A member that is a link, a device, too large or malformed makes its row an error. A
    missing or broken archive yields the complete rows before the break, and one error.
    """
    key = ""
    members: dict[str, bytes] = {}
    row_error: DataError | None = None
    try:
        with tarfile.open(source, "r|*") as archive:
            for member in archive:
                if member.isdir():
                    continue
                path = PurePosixPath(member.name)
                stem, _, extension = path.name.partition(".")
                member_key = str(path.parent / stem)
                if member_key != key and (members or row_error):
                    yield _make_tar_row(key, members, row_error, source=source, context=context)
                    members, row_error = {}, None
                key = member_key
                try:
                    members[extension.lower()] = _read_member(archive, member, source)
                except DataError as error:
                    row_error = error
    except (tarfile.TarError, EOFError, OSError) as error:
        message = f"truncated or broken archive ({error})"
        fix = "Copy or download the shard again; what follows in it was not read"
        row_error = DataError(message, place=Place(str(source), None, key or None), fix=fix)
    if members or row_error:
        yield _make_tar_row(key, members, row_error, source=source, context=context)


def _read_member(archive: tarfile.TarFile, member: tarfile.TarInfo, source: Path) -> bytes:
    """Return the content of one member of an archive that is read as a stream.

    Raises:
        DataError: the member is no regular file, or larger than `MAX_MEMBER_BYTES`.
        tarfile.TarError, EOFError, OSError: the archive is broken.
    """
    place = Place(str(source), None, member.name)
    if not member.isreg():
        message = "a link or device in an archive, which is refused"
        raise DataError(message, place=place, fix="Pack the file itself")
    if member.size > MAX_MEMBER_BYTES:
        message = f"{member.size / 2**20:.0f} MiB in one member"
        fix = f"Keep members below {MAX_MEMBER_BYTES // 2**20} MiB"
        raise DataError(message, place=place, fix=fix)
    file = archive.extractfile(member)
    assert file is not None
    return file.read()


def _make_tar_row(
    key: str,
    members: dict[str, bytes],
    error: DataError | None,
    *,
    source: Path,
    context: ReadContext,
) -> SourceRow:
    """Return the row of the members with one key, with ``ARCHIVE/KEY`` as default id.

    Args:
        members: contents by extension.
        error: error of a member, which the row has instead of a value. An error of
            `_parse_members` is treated in the same manner, not raised.
    """
    place = Place(str(source), None, key)
    name = f"{source.name.partition('.')[0]}/{key}"
    if error is not None:
        return SourceRow(place, context, name, error=error)
    try:
        return SourceRow(place, context, name, _parse_members(members, place))
    except DataError as row_error:
        return SourceRow(place, context, name, error=row_error)


def _parse_members(members: dict[str, bytes], place: Place) -> dict[str, Any]:
    """Return the value of a row: the object in the member ``json``, if any, and the other members.

    Non-blank lines of ``txt``, ``text`` and ``caption`` become ``captions`` (and ``caption`` is
    dropped), ``cls`` the text ``cls``. One image becomes ``image``, several the list ``images``,
    each ``{"bytes": ...}``; they replace both of these keys. Other members are ignored.

    Raises:
        DataError: ``json`` is broken or no object, or a text is not UTF-8.
    """
    value: dict[str, Any] = {}
    try:
        if "json" in members:
            value = json.loads(members["json"].decode("utf-8-sig"))
            if not isinstance(value, dict):
                json_place = place.with_field("json")
                raise DataError("not a JSON object", place=json_place, fix="Write {...}")
        captions: list[str] = []
        for extension in ("txt", "text", "caption"):
            text = members.get(extension, b"").decode("utf-8-sig")
            captions += split_caption_lines(text)
        if "cls" in members:
            value["cls"] = members["cls"].decode().strip()
    except (ValueError, RecursionError) as error:  # bytes, JSON, or numbers in it
        message = f"broken text or JSON ({error})"
        fix = "Write UTF-8, and one JSON object"
        raise DataError(message, place=place, fix=fix) from None
    if captions:
        value.pop("caption", None)  # img2dataset writes the same text into both
        value["captions"] = captions
    pictures = [
        {"bytes": data}
        for extension, data in members.items()
        if f".{extension.rpartition('.')[2]}" in IMAGE_SUFFIXES
    ]
    if len(pictures) == 1:
        value["image"] = pictures[0]
        value.pop("images", None)
    elif pictures:
        value["images"] = pictures
        value.pop("image", None)
    return value
