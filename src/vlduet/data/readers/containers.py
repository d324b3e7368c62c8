"""Containers: a file -> its rows, lazily. A broken row is a `Row` with its error, and the rest goes on."""

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
"""Bytes of one archive member: a compressed archive may unfold into anything."""
UTF8_FIX = "Save the file as UTF-8"


def read_jsonl_rows(source: Path, root: Path) -> Iterator[SourceRow]:
    """``.jsonl``: one object a line."""
    with source.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield _json_row(line, Place(str(source), number), root)


def _json_row(data: bytes, place: Place, root: Path) -> SourceRow:
    name = f"{Path(place.file).name}:{place.line}"
    try:
        return SourceRow(place, root, name, json.loads(data.decode("utf-8-sig")))
    except UnicodeDecodeError as error:
        broken = DataError(f"not UTF-8 at byte {error.start}", place=place, fix=UTF8_FIX)
    except json.JSONDecodeError as error:
        broken = DataError(
            f"broken JSON at column {error.colno} ({error.msg})", place=place, fix="Mend the line"
        )
    except (
        ValueError,
        RecursionError,
    ) as error:  # a number of thousands of digits, lists in lists in lists
        broken = DataError(f"JSON that cannot be held ({error})", place=place, fix="Mend the line")
    return SourceRow(place, root, name, error=broken)


def read_json_list_rows(source: Path, root: Path) -> Iterator[SourceRow]:
    """``.json``: a list of objects, decoded one by one; JSON lines under a wrong name are taken too."""
    try:
        text = source.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 at byte {error.start}", place=source, fix=UTF8_FIX) from None
    at = _skip(text, 0, " \t\r\n")
    if text[at : at + 1] == "{":
        yield from read_jsonl_rows(source, root)
        return
    if text[at : at + 1] != "[":
        if text.strip():
            raise DataError(
                "neither a list nor lines of objects", place=source, fix="Write [{...}, {...}]"
            )
        return
    decoder, line, counted = json.JSONDecoder(), 1, 0
    at = _skip(text, at + 1, " \t\r\n")
    while text[at : at + 1] != "]":
        line, counted = line + text.count("\n", counted, at), at
        place = Place(str(source), line)
        name = f"{source.name}:{line}"
        try:
            value, at = decoder.raw_decode(text, at)
            at = _skip(text, at, " \t\r\n")
            if text[at : at + 1] not in (",", "]"):
                raise json.JSONDecodeError("expected , or ]", text, at)
        except json.JSONDecodeError as error:
            place = Place(str(source), error.lineno)
            fix = "Mend the line; what follows it in the list was not read"
            broken = DataError(
                f"broken JSON at column {error.colno} ({error.msg})", place=place, fix=fix
            )
            yield SourceRow(place, root, name, error=broken)
            return
        except (ValueError, RecursionError) as error:
            fix = "Mend it; what follows it in the list was not read"
            yield SourceRow(
                place,
                root,
                name,
                error=DataError(f"JSON that cannot be held ({error})", place=place, fix=fix),
            )
            return
        yield SourceRow(place, root, name, value)
        at = _skip(text, at, ", \t\r\n")


def _skip(text: str, at: int, these: str) -> int:
    while at < len(text) and text[at] in these:
        at += 1
    return at


def read_table_rows(source: Path, root: Path) -> Iterator[SourceRow]:
    """``.csv`` and ``.tsv`` with a header line. Empty cells are left out."""
    with source.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
        header = lines.readline()
        lines.seek(0)
        delimiter = max("\t,;" if source.suffix.lower() == ".csv" else "\t", key=header.count)
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        try:
            columns = [name.strip() for name in next(reader, [])]
        except csv.Error as error:
            raise DataError(
                f"broken header ({error})", place=Place(str(source), 1), fix="Mend the quotes"
            ) from None
        if len(set(columns)) != len(columns):
            raise DataError(
                f"a column twice: {', '.join(columns)}",
                place=Place(str(source), 1),
                fix="Rename one",
            )
        while True:
            place = Place(str(source), reader.line_num + 1)
            row = SourceRow(place, root, f"{source.name}:{place.line}")
            try:
                cells = next(reader)
                if cells:
                    yield SourceRow(row.place, root, row.default_id, _cells(columns, cells, place))
            except StopIteration:
                return
            except csv.Error as error:
                fix = "Double the quotes inside a quoted cell, and close it"
                yield SourceRow(
                    place,
                    root,
                    row.default_id,
                    error=DataError(f"broken row ({error})", place=place, fix=fix),
                )
            except DataError as broken:
                yield SourceRow(place, root, row.default_id, error=broken)


def _cells(columns: list[str], cells: list[str], place: Place) -> dict[str, str]:
    if len(cells) > len(columns):
        what = f"{len(cells)} cells for {len(columns)} columns"
        raise DataError(
            what,
            place=place.with_field(cells[len(columns)][:20]),
            fix="Quote cells that hold the separator",
        )
    for column, cell in zip(columns, cells, strict=False):
        if not is_utf8_encodable(cell):
            raise DataError("not UTF-8", place=place.with_field(column), fix=UTF8_FIX)
    return {column: cell for column, cell in zip(columns, cells, strict=False) if cell.strip()}


def read_image_folder_rows(source: Path, root: Path) -> Iterator[SourceRow]:
    """A folder of images, with all folders below: captions from a ``.txt`` of the same name, one a line."""
    for folder, folders, files in os.walk(source):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            path = Path(folder, name)
            if path.suffix.lower() not in IMAGE_SUFFIXES or name.startswith("."):
                continue
            identity = path.relative_to(source).as_posix()
            if not is_utf8_encodable(identity):
                wrong = DataError(
                    "a file name that is not UTF-8", place=ascii(str(path)), fix="Rename it"
                )
                yield SourceRow(Place(ascii(str(path))), source, ascii(identity), error=wrong)
                continue
            row = SourceRow(Place(str(path)), source, identity, {"image": identity})
            sidecar = path.with_suffix(".txt")
            try:
                if sidecar.is_file():
                    captions = split_caption_lines(sidecar.read_text(encoding="utf-8"))
                    row = SourceRow(
                        row.place, source, identity, {"image": identity, "captions": captions}
                    )
            except (UnicodeDecodeError, OSError) as error:
                what = (
                    "not UTF-8"
                    if isinstance(error, UnicodeDecodeError)
                    else f"cannot be read ({error.strerror})"
                )
                row = SourceRow(
                    row.place, source, identity, error=DataError(what, place=sidecar, fix=UTF8_FIX)
                )
            yield row


def read_tar_rows(source: Path, root: Path) -> Iterator[SourceRow]:
    """A webdataset ``.tar`` (also compressed), streamed: nothing is written to disk, links and devices are refused.

    Members that share their path up to the first dot of the name are one row, as the format demands they stand together.
    """
    key, members, broken = "", dict[str, bytes](), None
    try:
        with tarfile.open(source, "r|*") as archive:
            for member in archive:
                if member.isdir():
                    continue
                path = PurePosixPath(member.name)
                stem, _, extension = path.name.partition(".")
                new = str(path.parent / stem)
                if new != key and (members or broken):
                    yield _member_row(key, members, broken, source=source, root=root)
                    members, broken = {}, None
                key = new
                try:
                    members[extension.lower()] = _member(archive, member, source)
                except DataError as error:
                    broken = error
    except (tarfile.TarError, EOFError, OSError) as error:
        fix = "Copy or download the shard again; what follows in it was not read"
        place = Place(str(source), None, key or None)
        broken = DataError(f"truncated or broken archive ({error})", place=place, fix=fix)
    if members or broken:
        yield _member_row(key, members, broken, source=source, root=root)


def _member(archive: tarfile.TarFile, member: tarfile.TarInfo, source: Path) -> bytes:
    place = Place(str(source), None, member.name)
    if not member.isreg():
        raise DataError(
            "a link or device in an archive, which is refused",
            place=place,
            fix="Pack the file itself",
        )
    if member.size > MAX_MEMBER_BYTES:
        raise DataError(
            f"{member.size / 2**20:.0f} MiB in one member",
            place=place,
            fix="Keep members below 256 MiB",
        )
    file = archive.extractfile(member)
    assert file is not None
    return file.read()


def _member_row(
    key: str, members: dict[str, bytes], error: DataError | None, *, source: Path, root: Path
) -> SourceRow:
    place, name = Place(str(source), None, key), f"{source.name.partition('.')[0]}/{key}"
    if error is not None:
        return SourceRow(place, root, name, error=error)
    value: dict[str, Any] = {}
    try:
        if "json" in members:
            value = json.loads(members["json"].decode("utf-8-sig"))
            if not isinstance(value, dict):
                raise DataError("not a JSON object", place=place.at("json"), fix="Write {...}")
        texts = [members[e].decode("utf-8-sig") for e in ("txt", "text", "caption") if e in members]
        if "cls" in members:
            value["cls"] = members["cls"].decode().strip()
    except (ValueError, RecursionError) as problem:  # of bytes, of JSON, of numbers
        broken = DataError(
            f"broken text or JSON ({problem})", place=place, fix="Write UTF-8, and one JSON object"
        )
        return SourceRow(place, root, name, error=broken)
    except DataError as problem:
        return SourceRow(place, root, name, error=problem)
    if texts and (captions := [c for text in texts for c in split_caption_lines(text)]):
        value.pop("caption", None)  # img2dataset writes the same text into both
        value["captions"] = captions
    pictures = [
        {"bytes": data}
        for e, data in members.items()
        if "." + e.rpartition(".")[2] in IMAGE_SUFFIXES
    ]
    if len(pictures) == 1:
        value["image"] = pictures[0]
        value.pop("images", None)
    elif pictures:
        value["images"] = pictures
        value.pop("image", None)
    return SourceRow(place, root, name, value)
