"""Rows: the values that container readers yield and that record formats parse into records."""

from __future__ import annotations

import datetime
import itertools
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlduet.data.record_json import JsonValue, require_answer
from vlduet.data.records import ImageRef, Message, Part, Place, Record
from vlduet.errors import DataError

UTF8_FIX = "Save the file as UTF-8"

IMAGE_COLUMN = "image"
PATH_COLUMNS = ("image_path", "image_file", "img", "img_path", "picture", "photo")
FILE_COLUMNS = ("file_name", "filename", "filepath", "file", "path")
ENCODED_COLUMNS = ("jpg", "jpeg", "png", "webp")
IMAGE_COLUMN_RANKS = (
    (IMAGE_COLUMN,),
    ("images", *PATH_COLUMNS, *FILE_COLUMNS, *ENCODED_COLUMNS),
    ("image_url",),
)
"""Names of columns that may hold the images of a row in any format, the preferred ones first."""
IMAGE_COLUMNS = tuple(itertools.chain(*IMAGE_COLUMN_RANKS))
"""All names of `IMAGE_COLUMN_RANKS`; like these, in lower case."""


class IgnoredData:
    """Counter of what a reader saw in a source and did not read: columns, members, files.

    One counter is shared by all readers of a source. Thread-unsafe.
    """

    def __init__(self) -> None:
        """Start with nothing ignored."""
        self._counts: Counter[tuple[str, str]] = Counter()

    def add(self, kind: str, name: str, count: int = 1) -> None:
        """Count one more occurrence of something that is not read.

        Args:
            kind: key of `IGNORED_KINDS`: ``column``, ``member`` or ``file``.
            name: name of the column, ending of the members, or path of the file.
            count: number of occurrences to add.
        """
        self._counts[kind, name] += count

    def __bool__(self) -> bool:
        """Return whether anything was counted."""
        return bool(self._counts)

    def messages(self) -> list[str]:
        """Return a sentence per ignored name, in the order of first occurrence."""
        return [
            IGNORED_KINDS[kind].format(count=count, rows="row" if count == 1 else "rows", name=name)
            for (kind, name), count in self._counts.items()
        ]


IGNORED_KINDS = {
    "column": "{count:,} {rows} with a column `{name}` that is not read",
    "member": "{count:,} archive members `{name}` that are not read",
    "file": "the file {name} is not read",
}
"""Sentence of `IgnoredData.messages` by kind."""


@dataclass(frozen=True, slots=True)
class ReadContext:
    """Settings and shared state of reading one source."""

    root: Path
    """Folder that relative image paths start from."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Name of the source's column by role (such as ``caption``), given by the user."""
    ignored: IgnoredData = field(default_factory=IgnoredData)
    """Counter of what is not read."""


@dataclass(frozen=True, slots=True)
class SourceRow:
    """One row of a container: a JSON-like value, or the error that took its place."""

    place: Place
    context: ReadContext
    """Settings of the source, and the counter of what is not read."""
    default_id: str
    """Id of the record if the value has none."""
    value: Any = None
    """Decoded value; None if `error` is set."""
    error: DataError | None = None

    @classmethod
    def broken(
        cls, place: Place, context: ReadContext, default_id: str, *, message: str, fix: str
    ) -> SourceRow:
        """Return a row with an error at `place` instead of a value."""
        error = DataError(message, place=place, fix=fix)
        return cls(place, context, default_id, error=error)

    @property
    def root(self) -> Path:
        """Folder that relative image paths start from."""
        return self.context.root

    def get_field(self, key: str) -> JsonValue:
        """Return the value under `key` with its place; the value of a missing key is None."""
        return JsonValue(self.value, self.place, self.root).get_field(key)


def drop_null_fields(value: Any) -> Any:
    """Return `value` without the keys that hold None, at any depth.

    Tables give every row every column.
    """
    if isinstance(value, dict):
        return {key: drop_null_fields(item) for key, item in value.items() if item is not None}
    return [drop_null_fields(item) for item in value] if isinstance(value, list) else value


def parse_id(row: SourceRow) -> str:
    """Return the row's own id, else its default. Raise DataError if the own id is wrong."""
    field = row.get_field("id")
    return row.default_id if field.value in (None, "") else field.parse_record_id()


def collect_metadata(row: SourceRow, used: Iterable[str]) -> dict[str, Any]:
    """Return the keys of the row's own ``metadata`` and all columns but `used`, as one dict.

    A ``metadata`` that is no object is left out, and so is the column ``id``. Of equal keys, the
    column wins: a column that is None removes the key. Values become JSON types: dates and
    times ISO text, tuples lists, other types ``str(value)``. Bytes are left out at any depth, None
    only at the top. The result may be empty.
    """
    metadata = row.value.get("metadata")
    columns = dict(metadata) if isinstance(metadata, Mapping) else {}
    parsed = {*used, "id", "metadata"}
    columns |= {key: value for key, value in row.value.items() if key not in parsed}
    return {
        key: _to_json_type(value)
        for key, value in columns.items()
        if not isinstance(value, bytes) and value is not None
    }


def _to_json_type(value: Any) -> Any:
    """Return a value as JSON types: dates and times as ISO text, other types as ``str(value)``.

    Bytes inside lists and objects are left out, None is kept, and keys become text.
    """
    if isinstance(value, dict):
        return {str(k): _to_json_type(v) for k, v in value.items() if not isinstance(v, bytes)}
    if isinstance(value, list | tuple):
        return [_to_json_type(item) for item in value if not isinstance(item, bytes)]
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    return value if isinstance(value, str | int | float | bool) or value is None else str(value)


def parse_images(row: SourceRow, *keys: str) -> list[ImageRef]:
    """Return the image or the list of images under the first of `keys` that is not empty.

    Images are not opened. The list is empty if all keys are.

    Raises:
        DataError: a value is no reference to an image, as in `JsonValue.parse_image`.
    """
    for key in keys:
        field = row.get_field(key)
        if isinstance(field.value, list) and field.value:
            return [item.parse_image() for item in field.parse_items("images")]
        if field.value not in (None, "", []):
            return [field.parse_image()]
    return []


def find_image_columns(columns: Iterable[str]) -> list[str]:
    """Return the columns that may hold the image, of the first of `IMAGE_COLUMN_RANKS` present.

    Names count in any case. The list is empty if there is none.
    """
    names = list(columns)
    for rank in IMAGE_COLUMN_RANKS:
        candidates = [name for name in names if name.lower() in rank]
        if candidates:
            return candidates
    return []


def split_caption_lines(text: str) -> list[str]:
    """Return the captions of a text file: its stripped lines without blank ones."""
    return [line.strip() for line in text.lstrip("\ufeff").splitlines() if line.strip()]


def interleave_images(text: str, tag: str, images: list[ImageRef], *, place: Place) -> list[Part]:
    """Split `text` at every `tag`, and put an image in place of each tag.

    The texts between the tags are stripped, and blank ones left out; [] for a blank text. Images
    without a tag are no error here.

    Args:
        images: images to use in order; those that are used are removed from the list.

    Raises:
        DataError: at `place`, if there are more tags than images.
    """
    parts: list[Part] = []
    for i, segment in enumerate(text.split(tag)):
        if i:
            if not images:
                fix = f"Write as many {tag} as there are images, or add the missing image"
                raise DataError(f"a {tag} more than there are images", place=place, fix=fix)
            parts.append(images.pop(0))
        if segment.strip():
            parts.append(segment.strip())
    return parts


def build_chat_record(
    row: SourceRow, messages: list[Message], *, field: str, used: Iterable[str]
) -> Record:
    """Return a chat record of `messages`.

    Args:
        field: key of the source that holds the answers, for the error.
        used: columns that are not metadata.

    Raises:
        DataError: no message is by the assistant, or the id is wrong.
    """
    require_answer(messages, row.place.with_field(field))
    metadata = collect_metadata(row, used)
    return Record(parse_id(row), messages=tuple(messages), metadata=metadata, place=row.place)
