"""Container readers: a file -> its rows, lazily. A broken row is yielded with its error."""

from __future__ import annotations

import csv
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from vlduet.data.images import IMAGE_SUFFIXES
from vlduet.data.readers.rows import SourceRow, split_caption_lines
from vlduet.data.records import Place, is_utf8_encodable
from vlduet.errors import DataError

MAX_MEMBER_BYTES = 256 * 2**20
"""Largest size of one archive member: a compressed archive may unpack to any size."""
UTF8_FIX = "Save the file as UTF-8"


def read_jsonl_rows(source: Path, root: Path) -> Iterator[SourceRow]:
    """Yield the rows of a ``.jsonl`` file, one JSON value per line; blank lines are skipped."""
    with source.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield _parse_json_line(line, Place(str(source), number), root)


def _parse_json_line(data: bytes, place: Place, root: Path) -> SourceRow:
    """Return the row of one line of JSON (any value), with ``FILE NAME:LINE`` as default id.

    A line that is not UTF-8 or not JSON gives a row with a DataError; nothing is raised.
    """
    name = f"{Path(place.file).name}:{place.line}"
    try:
        return SourceRow(place, root, name, json.loads(data.decode("utf-8-sig")))
    except (ValueError, RecursionError) as error:
        fix = UTF8_FIX if isinstance(error, UnicodeDecodeError) else "Correct the line"
        return SourceRow.broken(place, root, name, message=_describe_json_error(error), fix=fix)


def _describe_json_error(error: Exception) -> str:
    """Return a message, without place, for an exception of decoding bytes or text as JSON."""
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 at byte {error.start}"
    if isinstance(error, json.JSONDecodeError):
        return f"broken JSON at column {error.colno} ({error.msg})"
    return f"JSON that cannot be held ({error})"  # thousands of digits, or of nested lists


def read_json_list_rows(source: Path, root: Path) -> Iterator[SourceRow]:
    """Yield the rows of a ``.json`` file: the items of one list, decoded one by one.

    An item has the line where it starts, and ``FILE NAME:LINE`` as default id. A file that starts
    with ``{`` is read as JSON lines. A syntax error gives a last row with the error; what follows
    it is not read. An empty file or list yields nothing.

    Raises:
        DataError: before the first row, if the file is not UTF-8, or is neither a list nor lines
            of objects.
    """
    blanks = " \t\r\n"
    try:
        text = source.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(_describe_json_error(error), place=source, fix=UTF8_FIX) from None
    position = _skip(text, 0, blanks)
    if text[position : position + 1] == "{":
        yield from read_jsonl_rows(source, root)
        return
    if text[position : position + 1] != "[":
        if text.strip():
            fix = "Write [{...}, {...}]"
            raise DataError("neither a list nor lines of objects", place=source, fix=fix)
        return
    decoder = json.JSONDecoder()
    line = 1  # of `position`
    counted = 0  # characters whose line ends are in `line`
    position = _skip(text, position + 1, blanks)
    while text[position : position + 1] != "]":
        line += text.count("\n", counted, position)
        counted = position
        place = Place(str(source), line)
        name = f"{source.name}:{line}"
        try:
            value, position = decoder.raw_decode(text, position)
            position = _skip(text, position, blanks)
            if text[position : position + 1] not in (",", "]"):
                raise json.JSONDecodeError("expected , or ]", text, position)
        except (ValueError, RecursionError) as error:
            if isinstance(error, json.JSONDecodeError):
                place = Place(str(source), error.lineno)
            fix = "Correct the line; what follows it in the list was not read"
            yield SourceRow.broken(place, root, name, message=_describe_json_error(error), fix=fix)
            return
        yield SourceRow(place, root, name, value)
        position = _skip(text, position, "," + blanks)


def _skip(text: str, position: int, characters: str) -> int:
    """Return the first position from `position` on that holds none of `characters`."""
    while position < len(text) and text[position] in characters:
        position += 1
    return position


def read_table_rows(source: Path, root: Path) -> Iterator[SourceRow]:
    """Yield the rows of a ``.csv`` or ``.tsv`` file with a header line, without empty cells.

    A CSV may be separated by commas, semicolons or tabs: the most frequent one in the header. A
    value maps column names to texts. Blank lines are skipped. Broken quotes, more cells than
    columns, and cells that are not UTF-8 give a row with an error. An empty file yields nothing.

    Raises:
        DataError: before the first row, if the header is broken or names a column twice.
    """
    with source.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
        header = lines.readline()
        lines.seek(0)
        delimiters = "\t,;" if source.suffix.lower() == ".csv" else "\t"
        reader = csv.reader(lines, delimiter=max(delimiters, key=header.count), strict=True)
        place = Place(str(source), 1)
        try:
            columns = [name.strip() for name in next(reader, [])]
        except csv.Error as error:
            message = f"broken header ({error})"
            raise DataError(message, place=place, fix="Correct the quotes") from None
        if len(set(columns)) != len(columns):
            message = f"a column twice: {', '.join(columns)}"
            raise DataError(message, place=place, fix="Rename one")
        while True:
            place = Place(str(source), reader.line_num + 1)
            name = f"{source.name}:{place.line}"
            try:
                cells = next(reader)
                if cells:
                    yield SourceRow(place, root, name, _label_cells(columns, cells, place))
            except StopIteration:
                return
            except csv.Error as error:
                fix = "Double the quotes inside a quoted cell, and close it"
                yield SourceRow.broken(place, root, name, message=f"broken row ({error})", fix=fix)
            except DataError as error:
                yield SourceRow(place, root, name, error=error)


def _label_cells(columns: list[str], cells: list[str], place: Place) -> dict[str, str]:
    """Return the cells of a row that are not blank, unstripped, by column.

    Columns without a cell are left out.

    Raises:
        DataError: there are more cells than columns, or a cell is not UTF-8.
    """
    if len(cells) > len(columns):
        message = f"{len(cells)} cells for {len(columns)} columns"
        first_extra = place.with_field(cells[len(columns)][:20])
        raise DataError(message, place=first_extra, fix="Quote cells that hold the separator")
    values = dict(zip(columns, cells, strict=False))
    for column, cell in values.items():
        if not is_utf8_encodable(cell):
            raise DataError("not UTF-8", place=place.with_field(column), fix=UTF8_FIX)
    return {column: cell for column, cell in values.items() if cell.strip()}


def read_image_folder_rows(source: Path, root: Path) -> Iterator[SourceRow]:
    """Yield a row with ``image`` for every image file below a folder, recursively.

    Files are sorted, and those of a folder precede those of its subfolders. A ``.txt`` file of the
    same name gives ``captions``, one per line; if it cannot be read, the row has an error. The path
    below `source` is ``image`` and the default id. Names that start with a dot, linked folders and
    unreadable folders are skipped. `root` is not used: the paths start from `source`.
    """
    for folder, subfolders, files in os.walk(source):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in sorted(files):
            path = Path(folder, name)
            if path.suffix.lower() in IMAGE_SUFFIXES and not name.startswith("."):
                yield _read_image_row(path, source)


def _read_image_row(path: Path, source: Path) -> SourceRow:
    """Return the row of one image below `source`: ``image``, and ``captions`` of a ``.txt`` file.

    The row has an error instead if the name of the image is not UTF-8, or its ``.txt`` file is not
    or cannot be read. The image is not opened; nothing is raised.
    """
    name = path.relative_to(source).as_posix()
    if not is_utf8_encodable(name):
        place = Place(ascii(str(path)))
        message = "a file name that is not UTF-8"
        return SourceRow.broken(place, source, ascii(name), message=message, fix="Rename it")
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
        return SourceRow(Place(str(path)), source, name, value)
    error = DataError(message, place=sidecar, fix=UTF8_FIX)
    return SourceRow(Place(str(path)), source, name, error=error)


def read_tar_rows(source: Path, root: Path) -> Iterator[SourceRow]:
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
                    yield _make_tar_row(key, members, row_error, source=source, root=root)
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
        yield _make_tar_row(key, members, row_error, source=source, root=root)


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
    root: Path,
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
        return SourceRow(place, root, name, error=error)
    try:
        return SourceRow(place, root, name, _parse_members(members, place))
    except DataError as row_error:
        return SourceRow(place, root, name, error=row_error)


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
