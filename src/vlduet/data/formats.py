"""Records from the files that people have, read lazily, every error with its file, line and field.

    source --container reader--> rows --record format--> records

The container follows from the source's name (or from what a folder holds). Each row is read by the
first record format whose keys it has, and a row that has none by the format of the rows around it,
which says what is missing; the argument `format` overrides both. A broken row goes to `on_error`
and reading continues; a source that cannot be read at all raises at once.
"""

from __future__ import annotations

import difflib
import functools
import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from vlduet.data.readers import conversations, image_folders, pairs
from vlduet.data.readers.columns import (
    LONG_COLUMNS,
    NEGATIVE_COLUMNS,
    QUERY_COLUMNS,
    QUERY_POSITIVE_COLUMNS,
    SHORT_COLUMNS,
    check_roles,
    find_missing_columns,
)
from vlduet.data.readers.containers import RowGroup
from vlduet.data.readers.folders import iter_row_groups
from vlduet.data.readers.json_objects import LIST_KEYS
from vlduet.data.readers.rows import (
    IMAGE_COLUMNS,
    IgnoredData,
    ReadContext,
    SourceRow,
    normalize_column,
)
from vlduet.data.record_json import COMMON_KEYS, KEYS_BY_KIND, parse_record
from vlduet.data.records import Record
from vlduet.errors import DataError, suggest_name
from vlduet.logs import logger

RowErrorHandler = Callable[[DataError], object]
"""Function that receives the error of each row that is left out."""
CHAT_ROLES = {"id", "image", "messages"}
"""Roles of `columns` that rows of any format may have; with others, every row is of a table."""
BARE_KEYS = {"id", "metadata", "image"}
"""Keys of a pair of ours that has no caption."""
MAX_DETECTION_ROWS = 50
"""Number of rows that are looked at, at most, to detect the record format."""


@dataclass(frozen=True, slots=True)
class RecordFormat:
    """Layout of a row's keys: how to recognise it, and how to make a record of it."""

    description: str
    """Keys of the format, for messages and for ``vlduet data formats``."""
    parse_row: Callable[[SourceRow], Record]
    """Return the record of a row; raise DataError if the row is wrong."""
    matches: Callable[[SourceRow], bool]
    """Return whether the keys of a row, whose value is an object, are of this format."""
    is_table: bool = False
    """Whether the format's columns may have any names, see `readers.columns`."""


def _parse_own(row: SourceRow) -> Record:
    return parse_record(row.value, place=row.place, root=row.root)


def _is_own_row(row: SourceRow) -> bool:
    """Return whether a row has an ``id``, a key of one kind of record, and no foreign keys.

    A misspelt key of that kind (similarity at least 0.8) is not foreign. A query or wrong candidate
    that is no list, as ours are, is a cell of somebody else's table. Turns with other keys than
    ours are somebody else's chat.
    """
    value = row.value
    if "id" not in value or conversations.has_foreign_turns(row):
        return False
    if any(key in value and not isinstance(value[key], list) for key in ("query", "negative")):
        return False
    return _has_own_keys(frozenset(value))


@functools.lru_cache(maxsize=1024)
def _has_own_keys(names: frozenset[str]) -> bool:
    """Return whether all keys are of one kind of record of ours, or misspelt ones."""
    for keys in KEYS_BY_KIND.values():
        valid_keys = keys | COMMON_KEYS
        # A misspelt key of ours is an error to report, not a column of somebody else's table.
        are_close = (difflib.get_close_matches(key, valid_keys, cutoff=0.8) for key in names)
        if keys & names and all(are_close):
            return True
    return False


def _is_mmeb_row(row: SourceRow) -> bool:
    has_query = bool(row.value.keys() & {"qry", "qry_text"})
    return has_query and bool(row.value.keys() & set(pairs.MMEB_KEYS[2:]))


FORMATS: dict[str, RecordFormat] = {
    "records": RecordFormat(
        "ours: id and one of image, parts, messages, query", _parse_own, _is_own_row
    ),
    "mmeb": RecordFormat(
        "MMEB: qry, qry_image_path, pos_text, pos_image_path, neg_text, neg_image_path",
        pairs.parse_mmeb,
        _is_mmeb_row,
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
    "retrieval": RecordFormat(
        f"queries with candidates: a column {' or '.join(QUERY_COLUMNS)}, one of "
        f"{', '.join(QUERY_POSITIVE_COLUMNS)} or an image, and {NEGATIVE_COLUMNS[0]}",
        pairs.parse_retrieval,
        pairs.is_retrieval_row,
        is_table=True,
    ),
    "captions": RecordFormat(
        f"captioned images: a column {', '.join(IMAGE_COLUMNS[:3])}, ... and any of "
        f"{', '.join(SHORT_COLUMNS + LONG_COLUMNS)}",
        pairs.parse_captions,
        pairs.is_caption_row,
        is_table=True,
    ),
}
"""Record formats by name. The first one that matches a row reads it: the order matters."""


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
        source: a file whose name ends as a key of `CONTAINER_READERS`; a folder: of images, of
            shards of one file, or saved by Hugging Face `datasets`; or a pattern of files, such as
            ``data/*.tar`` or ``{00000..00099}.tar``.
        format: a key of `FORMATS`; None detects it by the keys of each row.
        root: folder that relative image paths start from; None means the folder of the file.
        columns: column of the source by role, such as ``{"caption": "text_en"}``; the roles are
            those of `readers.columns.COLUMN_ROLES`.
        ignored: counter that receives what is seen and not read, as the iterator is advanced.
        on_error: receives the error of each broken row, which is left out; None raises the first.

    Raises:
        DataError: at once if the source is missing, of an unknown kind or, without `format`,
            unreadable or not recognised, or if `format`, a role or a column is unknown; as the
            iterator is advanced, for a file that is broken as a whole and, without `on_error`, for
            a broken row.
        OSError: as the iterator is advanced, if a file cannot be read and `format` is given; at
            once for an unreadable folder.
    """
    if format is not None and format not in FORMATS:
        fix = suggest_name(format, FORMATS)
        if not fix.startswith("Known"):
            fix = f"{fix} Known: {', '.join(FORMATS)}"
        raise DataError(f"no format '{format}'", place=source, fix=fix)
    check_roles(columns or {})
    context = ReadContext(
        root or source, columns or {}, IgnoredData() if ignored is None else ignored
    )
    reader = _SourceReader(format, on_error)
    groups = iter_row_groups(
        source,
        context,
        has_root=root is not None,
        is_record_row=_is_record_row,
        listed=reader.listed,
    )
    try:
        first = reader.inspect(next(groups))
    except OSError as error:
        message = f"cannot be read ({error.strerror})"
        raise DataError(message, place=source, fix="Check its permissions") from None
    return reader.read(first, groups)


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
    whose name or caption file cannot be read, and of each folder; errors of `records` propagate.
    Links and other files that are left out are logged.
    """
    listed = set[Path]()
    for record in records:
        listed |= {ref.path.resolve() for ref in record.images() if ref.path is not None}
        yield record
    context = ReadContext(folder)
    rows = image_folders.read_image_folder_rows(folder, context)
    reader = _SourceReader("captions", on_error)
    for record in reader.parse_rows(rows, FORMATS["captions"]):
        path = record.image.path if record.image else None
        if path is not None and path.resolve() not in listed:
            yield record
    for message in context.ignored.describe_files() + context.ignored.describe_system_files():
        logger.warning(f"{folder}: {message}")


def detect_format(source: Path) -> str:
    """Return the key of `FORMATS` for the first rows; ``records`` if no row is an object.

    Raises:
        DataError: no format fits, or the source cannot be read.
    """
    groups = iter_row_groups(source, ReadContext(source), is_record_row=_is_record_row)
    default = _SourceReader(None, None).inspect(next(groups)).default
    return next(name for name, schema in FORMATS.items() if schema is default)


@dataclass(frozen=True, slots=True)
class _InspectedGroup:
    """Rows with common columns, whose first ones were inspected."""

    group: RowGroup
    rows: Iterator[SourceRow]
    """All rows of the group."""
    default: RecordFormat
    """Format of the rows that match none, and of those that hold an image alone."""


class _SourceReader:
    """State of reading one source: how rows are parsed, and which images they name."""

    def __init__(self, format: str | None, on_error: RowErrorHandler | None):
        """Set how rows are parsed.

        Args:
            format: key of `FORMATS` of all rows; None detects it for each.
            on_error: receives the error of each broken row; None raises it.
        """
        self.schema = FORMATS[format] if format is not None else None
        self.on_error = on_error
        self.listed: set[str] = set()
        """Absolute paths of the images of all records, if a folder needs them."""

    def read(self, first: _InspectedGroup, groups: Iterator[RowGroup]) -> Iterator[Record]:
        """Yield the records of the first group, then those of the others."""
        for inspected in itertools.chain([first], map(self.inspect, groups)):
            for record in self.parse_rows(inspected.rows, inspected.default):
                if inspected.group.is_tracked:
                    paths = (ref.path for ref in record.images() if ref.path is not None)
                    self.listed.update(map(os.path.abspath, paths))
                yield record

    def inspect(self, group: RowGroup) -> _InspectedGroup:
        """Return a group with its default format; no row is lost.

        With a format for all rows and no columns of the user, no row is read. Else up to
        `MAX_DETECTION_ROWS` are, and the keys of tables are added to the group's context. The
        default is the first format in the order of `FORMATS` that a row matches, but an image alone
        counts only if nothing else matches; without any object, it is ``records``.

        Raises:
            DataError: there are objects, but no format matches one, or a column that the user names
                is missing in all of them; or reading the rows fails.
            OSError: a file cannot be read.
        """
        columns = group.context.columns
        if self.schema is not None and not columns:
            return _InspectedGroup(group, group.rows, self.schema)
        head = list(itertools.islice(group.rows, MAX_DETECTION_ROWS))
        rows = itertools.chain(head, group.rows)
        objects = [row for row in head if isinstance(row.value, dict)]
        names = dict.fromkeys(key for row in objects for key in row.keys)
        tables = [row for row in objects if _match_own_keys(row) is None]
        group.context.inspected_keys.update(dict.fromkeys(k for row in tables for k in row.keys))
        missing = find_missing_columns(columns, names)
        if missing and objects and not group.has_fixed_columns:
            message = f"no column '{missing[0]}'; the columns are {_list_names(names)}"
            fix = "Correct the setting `columns` (--columns ROLE=NAME)"
            raise DataError(message, place=group.place, fix=fix)
        if self.schema is not None:
            return _InspectedGroup(group, rows, self.schema)
        matches = [match for row in objects if (match := _match_format(row)) is not None]
        rank = list(FORMATS.values()).index
        default = min(matches, key=lambda match: (match.is_bare, rank(match.schema)), default=None)
        if default is not None:
            return _InspectedGroup(group, rows, default.schema)
        if objects:
            raise _make_format_error(objects, names)
        # No row could be read: whatever the format, the errors of the rows say why.
        return _InspectedGroup(group, rows, FORMATS["records"])

    def parse_rows(self, rows: Iterable[SourceRow], default: RecordFormat) -> Iterator[Record]:
        """Yield the record of each row that has one.

        The DataErrors of rows that are broken, no objects or not of a format go to `on_error`, or
        the first is raised if it is None. Errors of `rows` itself propagate.
        """
        for row in rows:
            try:
                record = self._parse_row(row, default)
            except DataError as error:
                if self.on_error is None:
                    raise
                self.on_error(error)
                continue
            yield record

    def _parse_row(self, row: SourceRow, default: RecordFormat) -> Record:
        """Return the record of a row. Raise DataError if it is broken, no object, or wrong."""
        if row.error is not None:
            raise row.error
        if not isinstance(row.value, dict):
            message = f"a row is an object, this is {type(row.value).__name__}"
            raise DataError(message, place=row.place, fix="Write {...}")
        schema = self.schema
        if schema is None:
            match = _match_format(row)
            is_default = match is None or (match.is_bare and not default.is_table)
            schema = default if match is None or is_default else match.schema
        if schema.is_table:
            return schema.parse_row(row)
        for role, name in row.context.columns.items():
            if name != role and {role, name} <= row.value.keys():
                row.context.ignored.add("column", role)
        return schema.parse_row(_rename_columns(row))


@dataclass(frozen=True, slots=True)
class _FormatMatch:
    """Record format of a row."""

    schema: RecordFormat
    is_bare: bool
    """Whether the row is a pair without a caption, which is any row with an image."""


def _match_format(row: SourceRow) -> _FormatMatch | None:
    """Return the first format whose keys a row has, or None.

    If the user names columns of texts, only tables count.
    """
    match = _match_own_keys(row)
    if match is not None:
        return match
    for name, schema in FORMATS.items():
        if schema.is_table and schema.matches(row):
            is_bare = name == "captions" and not pairs.has_captions(row)
            return _FormatMatch(schema, is_bare)
    return None


def _match_own_keys(row: SourceRow) -> _FormatMatch | None:
    """Return the first format with keys of its own, so no table, that a row has, or None."""
    if row.context.columns.keys() - CHAT_ROLES:
        return None
    renamed = _rename_columns(row)
    for schema in FORMATS.values():
        if not schema.is_table and schema.matches(renamed):
            return _FormatMatch(schema, is_bare=renamed.value.keys() <= BARE_KEYS)
    return None


def _is_record_row(row: SourceRow) -> bool:
    """Return whether a row is an object with the keys of a format."""
    return isinstance(row.value, dict) and _match_format(row) is not None


def _rename_columns(row: SourceRow) -> SourceRow:
    """Return a row whose columns of `CHAT_ROLES` have these names, as chats need them.

    A column in the place of one that the user names is left out.
    """
    columns = {role: name for role, name in row.context.columns.items() if role in CHAT_ROLES}
    if not columns:
        return row
    value = dict(row.value)
    for role, name in columns.items():
        if name in value:
            value[role] = value.pop(name)
    return replace(row, value=value)


def _make_format_error(objects: list[SourceRow], names: Iterable[str]) -> DataError:
    """Return the error of a source of which no row is of a format: what it has, and what it needs.

    Args:
        objects: inspected rows that are objects, at least one.
        names: keys of all inspected rows.
    """
    row = objects[0]
    plan = pairs.plan_row(row)
    missing = "no column of images, queries or messages"
    if plan.query:
        missing = f"a query ({', '.join(plan.query)}), but no right candidate"
    fix = "Name the columns (--columns image=NAME, or columns in a config)"
    if any(re.search("(^|_)ur[il]s?$", normalize_column(name)) for name in names):
        fix += ", and make files of URLs first (img2dataset): nothing is downloaded"
    message = f"not recognised by its keys: {_list_names(names)}; {missing}"
    for unread in row.context.ignored.messages()[:3]:
        message = f"{message}; {unread}"
    if len(objects) == 1 and row.place.file.lower().endswith(".json"):
        message = f"one JSON object, {message}"
        fix = f"Write a list of rows, also under {' or '.join(LIST_KEYS[:3])}. {fix}"
    fix += f". `vlduet data formats` explains the formats: {', '.join(FORMATS)}"
    return DataError(message, place=row.place, fix=fix)


def _list_names(names: Iterable[str]) -> str:
    """Return up to twenty names for a message, and how many more there are."""
    texts = list(map(str, names))
    more = f" and {len(texts) - 20} more" if len(texts) > 20 else ""
    return (", ".join(texts[:20]) or "none") + more
