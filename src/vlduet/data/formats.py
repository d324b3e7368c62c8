"""Records from the files that people have, read lazily, every error with its file, line and field.

    source --container reader--> rows --record format--> records

The container follows from the source's name (or from what a folder holds), the record format from
the keys of the first rows; the argument `format` overrides the latter. A broken row goes to
`on_error` and reading continues; a source that cannot be read at all raises at once.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlduet.data.readers import (
    conversations,
    image_folders,
    pairs,
)
from vlduet.data.readers.containers import read_source_rows
from vlduet.data.readers.rows import (
    IMAGE_COLUMNS,
    IgnoredData,
    ReadContext,
    SourceRow,
    find_image_columns,
)
from vlduet.data.record_json import COMMON_KEYS, KEYS_BY_KIND, parse_record
from vlduet.data.records import Record
from vlduet.errors import DataError, suggest_name

RowErrorHandler = Callable[[DataError], object]
"""Function that receives the error of each row that is left out."""
MAX_DETECTION_ROWS = 50
"""Number of rows that are looked at, at most, to detect the record format."""


@dataclass(frozen=True, slots=True)
class RecordFormat:
    """Layout of a row's keys: how to recognise it, and how to make a record of it."""

    description: str
    """Keys of the format, for messages and for ``vlduet data formats``."""
    parse_row: Callable[[SourceRow], Record]
    """Return the record of a row; raise DataError if the row is wrong."""
    matches: Callable[[dict[str, Any]], bool]
    """Return whether the keys of a row's value are of this format."""


def _parse_own(row: SourceRow) -> Record:
    return parse_record(row.value, place=row.place, root=row.root)


def _matches_own(value: dict[str, Any]) -> bool:
    """Return whether a row has an ``id``, a key of one kind of record, and no foreign keys.

    A misspelt key of that kind (similarity at least 0.8) is not foreign.
    """
    if "id" not in value:
        return False
    for keys in KEYS_BY_KIND.values():
        valid_keys = keys | COMMON_KEYS
        # A misspelt key of ours is an error to report, not a column of somebody else's table.
        are_close = (difflib.get_close_matches(key, valid_keys, cutoff=0.8) for key in value)
        if keys & value.keys() and all(are_close):
            return True
    return False


def _matches_mmeb(value: dict[str, Any]) -> bool:
    has_query = bool(value.keys() & {"qry", "qry_text"})
    return has_query and bool(value.keys() & set(pairs.MMEB_KEYS[2:]))


FORMATS: dict[str, RecordFormat] = {
    "records": RecordFormat(
        "ours: id and one of image, parts, messages, query", _parse_own, _matches_own
    ),
    "mmeb": RecordFormat(
        "MMEB: qry, qry_image_path, pos_text, pos_image_path, neg_text, neg_image_path",
        pairs.parse_mmeb,
        _matches_mmeb,
    ),
    "llava": RecordFormat(
        "LLaVA and ShareGPT: conversations of from and value; image",
        conversations.parse_chat,
        conversations.is_llava_row,
    ),
    "ms-swift": RecordFormat(
        "ms-swift: query and response, or messages and positive_messages; images",
        conversations.parse_chat,
        conversations.is_swift_row,
    ),
    "messages": RecordFormat(
        "OpenAI, TRL and ms-swift: messages, or prompt and completion; images",
        conversations.parse_chat,
        conversations.is_messages_row,
    ),
    "captions": RecordFormat(
        f"captioned images: a column {', '.join(IMAGE_COLUMNS[:3])}, ... and any of "
        f"{', '.join(pairs.SHORT_COLUMNS + pairs.LONG_COLUMNS)}",
        pairs.parse_captions,
        lambda value: bool(find_image_columns(value)),
    ),
}
"""Record formats by name. The first one that matches a row reads the source: the order matters."""


def read_records(
    source: Path,
    *,
    format: str | None = None,
    root: Path | None = None,
    columns: Mapping[str, str] | None = None,
    ignored: IgnoredData | None = None,
    on_error: RowErrorHandler | None = None,
) -> Iterator[Record]:
    """Return an iterator over the records of a file or folder, which reads as it is advanced.

    Without `format`, up to `MAX_DETECTION_ROWS` rows are read at once. Images are not opened.

    Args:
        source: a file whose name ends as a key of `CONTAINER_READERS`, or a folder: of images, of
            shards of one file, or saved by Hugging Face `datasets`.
        format: a key of `FORMATS`; None detects it by the keys of the first rows.
        root: folder that relative image paths start from; None means the folder of the file.
        columns: column of the source by role, such as ``{"caption": "text_en"}``.
        ignored: counter that receives what is seen and not read, as the iterator is advanced.
        on_error: receives the error of each broken row, which is left out; None raises the first.

    Raises:
        DataError: at once if the source is missing, of an unknown kind or, without `format`,
            unreadable or not recognised, or if `format` is unknown; as the iterator is advanced,
            for a file that is broken as a whole and, without `on_error`, for a broken row.
        OSError: as the iterator is advanced, if a file cannot be read and `format` is given; at
            once for an unreadable folder.
    """
    if format is not None and format not in FORMATS:
        fix = suggest_name(format, FORMATS)
        if not fix.startswith("Known"):
            fix = f"{fix} Known: {', '.join(FORMATS)}"
        raise DataError(f"no format '{format}'", place=source, fix=fix)
    if root is None:
        root = source if source.is_dir() else source.parent
    context = ReadContext(root, columns or {}, IgnoredData() if ignored is None else ignored)
    rows = read_source_rows(source, context)
    try:
        if format is None:
            format, rows = _detect_format(source, rows)
    except OSError as error:
        message = f"cannot be read ({error.strerror})"
        raise DataError(message, place=source, fix="Check its permissions") from None
    return _parse_rows(rows, FORMATS[format], on_error)


def read_jsonl(path: Path) -> Iterator[Record]:
    """Return an iterator over the records of one of our own ``.jsonl`` files.

    Raises:
        DataError: at the first broken line.
    """
    return read_records(path, format="records")


def append_unlisted_images(
    records: Iterable[Record], folder: Path, *, on_error: RowErrorHandler
) -> Iterator[Record]:
    """Yield `records`, then a pair for every image below `folder` that none of them refers to.

    Paths are compared with symbolic links resolved. `on_error` receives the error of each image
    whose name or caption file cannot be read; errors of `records` propagate.
    """
    listed = set[Path]()
    for record in records:
        listed |= {ref.path.resolve() for ref in record.images() if ref.path is not None}
        yield record
    rows = image_folders.read_image_folder_rows(folder, ReadContext(folder))
    for record in _parse_rows(rows, FORMATS["captions"], on_error):
        path = record.image.path if record.image else None
        if path is not None and path.resolve() not in listed:
            yield record


def _parse_rows(
    rows: Iterable[SourceRow], schema: RecordFormat, on_error: RowErrorHandler | None
) -> Iterator[Record]:
    """Yield the record of each row that has one.

    The DataErrors of rows that are broken, no objects or not of the format go to `on_error`, or
    the first is raised if it is None. Errors of `rows` itself propagate.
    """
    for row in rows:
        try:
            if row.error is not None:
                raise row.error
            if not isinstance(row.value, dict):
                message = f"a row is an object, this is {type(row.value).__name__}"
                raise DataError(message, place=row.place, fix="Write {...}")
            record = schema.parse_row(row)
        except DataError as error:
            if on_error is None:
                raise
            on_error(error)
            continue
        yield record


def detect_format(source: Path) -> str:
    """Return the key of `FORMATS` that fits the first rows; ``records`` if no row is an object.

    Raises:
        DataError: no format fits, or the source cannot be read.
    """
    root = source if source.is_dir() else source.parent
    return _detect_format(source, read_source_rows(source, ReadContext(root)))[0]


def _detect_format(source: Path, rows: Iterator[SourceRow]) -> tuple[str, Iterator[SourceRow]]:
    """Return (name of the first format that matches a row, all rows); no row is lost.

    Up to `MAX_DETECTION_ROWS` are taken from `rows`, of which only the returned iterator may be
    used afterwards. If none of them is an object, the name is ``records``.

    Raises:
        DataError: there are objects, but no format matches one; or reading the rows fails.
        OSError: a file cannot be read.
    """
    head: list[SourceRow] = []
    for row in itertools.islice(rows, MAX_DETECTION_ROWS):
        head.append(row)
        if isinstance(row.value, dict):
            for name, schema in FORMATS.items():
                if schema.matches(row.value):
                    return name, itertools.chain(head, rows)
    objects = [row for row in head if isinstance(row.value, dict)]
    if not objects:
        # No row could be read: whatever the format, the errors of the rows say why.
        return "records", itertools.chain(head, rows)
    keys = ", ".join(sorted(map(str, objects[0].value))[:12]) or "none"
    accepted = "; ".join(f"{name} ({schema.description})" for name, schema in FORMATS.items())
    message = f"not recognised by its keys: {keys}"
    raise DataError(message, place=objects[0].place, fix=f"Accepted: {accepted}")
