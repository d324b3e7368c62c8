"""Rows: the values that container readers yield and that record formats parse into records."""

from __future__ import annotations

import datetime
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlduet.data.record_json import JsonValue
from vlduet.data.records import ImageRef, Part, Place
from vlduet.errors import DataError

UTF8_FIX = "Save the file as UTF-8"
_BINARY_TYPES = (bytes, ImageRef)  # no metadata

IMAGE_COLUMN = "image"
LIST_COLUMNS = ("images", "image_paths", "image_files", "image_list", "imgs", "pictures", "photos")
PATH_COLUMNS = (
    *("image_path", "image_file", "image_name", "image_filename", "image_file_name"),
    *("img", "img_path", "picture", "photo"),
)
FILE_COLUMNS = ("file_name", "filename", "filepath", "file_path", "file", "path")
ENCODED_COLUMNS = ("jpg", "jpeg", "png", "webp")
IMAGE_COLUMN_RANKS = (
    (IMAGE_COLUMN,),
    (*LIST_COLUMNS, *PATH_COLUMNS, *FILE_COLUMNS, *ENCODED_COLUMNS),
    ("image_url", "image_urls"),
)
"""Names of columns that may hold the images of a row in any format, the preferred ones first."""
IMAGE_COLUMNS = tuple(itertools.chain(*IMAGE_COLUMN_RANKS))
"""All names of `IMAGE_COLUMN_RANKS`; like these, as `normalize_column` writes them."""


def normalize_column(name: str) -> str:
    """Return the letters and digits of a column's name in lower case, with ``_`` for all between.

    ``Product Name``, ``product-name`` and ``Product (name)`` become ``product_name``.
    """
    return re.sub(r"[\W_]+", "_", name.lower()).strip("_")


class IgnoredData:
    """Counter of what a reader saw in a source and did not read: columns, members, files.

    One counter is shared by all readers of a source. Thread-unsafe.
    """

    def __init__(self) -> None:
        """Start with nothing ignored."""
        self._counts: Counter[tuple[str, str]] = Counter()
        self._examples: dict[tuple[str, str], list[str]] = {}

    def add(self, kind: str, name: str, count: int = 1) -> None:
        """Count one more occurrence of something that is not read.

        Args:
            kind: key of `IGNORED_KINDS` or of `LEFT_OUT_KINDS`, or ``system`` for what a system has
                put beside the data (`folder_scan`).
            name: name of the column or key, ending of the members, path of the file, or why a turn
                is not read.
            count: number of occurrences to add.
        """
        self._counts[kind, name] += count

    def add_file(self, path: Path) -> None:
        """Count a file that is not read, by the ending of its name."""
        key = ("ending", path.suffix.lower() or "without an ending")
        self._counts[key] += 1
        examples = self._examples.setdefault(key, [])
        if len(examples) < MAX_EXAMPLES:
            examples.append(path.name)

    def __bool__(self) -> bool:
        """Return whether anything was counted but what a system has put beside the data."""
        return any(kind != "system" for kind, _ in self._counts)

    def messages(self, *, files: bool = True) -> list[str]:
        """Return a sentence per ignored name, in the order of first occurrence.

        With `files`, those of `describe_files` follow. Half characters, which a file name may hold,
        are escapes.
        """
        messages = [
            IGNORED_KINDS[kind].format(count=count, s="" if count == 1 else "s", name=name)
            for (kind, name), count in self._counts.items()
            if kind in IGNORED_KINDS
        ]
        messages = [message.encode("utf-8", "backslashreplace").decode() for message in messages]
        return messages + (self.describe_files() if files else [])

    def describe_files(self) -> list[str]:
        """Return a sentence for each kind of files and links that are not read."""
        return [self._describe_kind(kind) for kind in LEFT_OUT_KINDS if self._has_kind(kind)]

    def describe_system_files(self) -> list[str]:
        """Return a sentence on what a system has put beside the data, or [] without any."""
        return [self._describe_kind("system")] if self._has_kind("system") else []

    def _has_kind(self, kind: str) -> bool:
        return any(counted == kind for counted, _ in self._counts)

    def _describe_kind(self, kind: str) -> str:
        """Return a sentence with the number of everything of a kind, and the most frequent ones."""
        counts = {name: n for (counted, name), n in self._counts.items() if counted == kind}
        ranking = sorted(counts, key=lambda name: (-counts[name], name))
        items = [self._describe_item(kind, name) for name in ranking[:MAX_NAMES]]
        if len(ranking) > MAX_NAMES:
            items.append(f"{len(ranking) - MAX_NAMES:,} more")
        total = sum(counts.values())
        singular, plural = SYSTEM_SENTENCE if kind == "system" else LEFT_OUT_KINDS[kind]
        text = f"{total:,} {singular if total == 1 else plural}: {', '.join(items)}"
        return text.encode("utf-8", "backslashreplace").decode()

    def _describe_item(self, kind: str, name: str) -> str:
        """Return ``4 .mov (a.mov, b.mov, c.mov, ...)``, ``@eaDir (3)`` or a path."""
        count = self._counts[kind, name]
        if kind != "ending":
            return f"{name} ({count:,})" if count > 1 else name
        examples = self._examples.get((kind, name), [])
        more = ", ..." if count > len(examples) else ""
        return f"{count:,} {name} ({', '.join(examples)}{more})"

    def count_files(self) -> dict[str, int]:
        """Return the number of files and links that are not read, by ending or kind."""
        counts: Counter[str] = Counter()
        for (kind, name), count in self._counts.items():
            if kind in LEFT_OUT_KINDS:
                counts[name if kind == "ending" else kind] += count
            elif kind == "file":
                counts[Path(name).suffix.lower() or "without an ending"] += count
        return dict(counts)

    def count_system_files(self) -> dict[str, int]:
        """Return the number of files and folders of a system that are left out, by name."""
        return {name: count for (kind, name), count in self._counts.items() if kind == "system"}


IGNORED_KINDS = {
    "column": "{count:,} row{s} with a column `{name}` that is not read",
    "member": "{count:,} archive member{s} `{name}`, not read",
    "file": "the file {name} is not read",
    "key": "the key `{name}` of {count:,} JSON object{s}, not read",
    "annotation": "{count:,} annotation{s} not read: {name}",
    "image": "{count:,} image{s} that {name} does not list",
    "text": "{count:,} row{s} with a text in the column `{name}`, which is kept as metadata only; "
    "to learn it, name its role in columns, such as caption={name}",
    "image column": "{count:,} chat{s} without an image, but with names of images in the column "
    "`{name}`, which is kept as metadata only; to read them, name it (columns: image={name})",
    "turn key": "{count:,} chat turn{s} with a key `{name}` that is not read",
    "part key": "{count:,} content part{s} with a key `{name}` that is not read",
    "turn": "{count:,} chat turn{s} not read: {name}",
}
"""Sentence of `IgnoredData.messages` by kind."""
LEFT_OUT_KINDS = {
    "ending": ("file is not read", "files are not read"),
    "linked folder": ("linked folder, not followed", "linked folders, not followed"),
    "broken link": ("link without a target, not read", "links without a target, not read"),
    "special file": ("pipe, socket or device, not read", "pipes, sockets or devices, not read"),
}
"""Beginning of the sentence of `IgnoredData.describe_files` by kind: for one, and for several."""
SYSTEM_SENTENCE = (
    "hidden file, thumbnail or recycle bin, left out",
    "hidden files, thumbnails and recycle bins, left out",
)
"""Beginning of the sentence of `IgnoredData.describe_system_files`: for one, and for several."""
MAX_EXAMPLES = 3
"""Number of files of one ending that a sentence names."""
MAX_NAMES = 20
"""Number of endings, links or names that a sentence lists."""


@dataclass(frozen=True, slots=True)
class ReadContext:
    """Settings and shared state of reading one source."""

    root: Path
    """Folder that relative image paths start from."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Name of the source's column by role (such as ``caption``), given by the user."""
    ignored: IgnoredData = field(default_factory=IgnoredData)
    """Counter of what is not read."""
    id_prefix: str = ""
    """Beginning of the default ids: the folder of a file below the source."""
    inspected_keys: dict[str, None] = field(default_factory=dict)
    """Keys of the rows that were inspected to detect the format, in the order of occurrence. Where
    another row lacks one, it is empty there."""
    plans: dict[Any, Any] = field(default_factory=dict)
    """Cache of the roles of columns, by the keys of rows, that the formats of tables share."""


@dataclass(frozen=True, slots=True)
class SourceRow:
    """One row of a container: a JSON-like value, or the error that took its place."""

    place: Place
    context: ReadContext
    """Settings of the source, and the counter of what is not read."""
    default_id: str
    """Id of the record if the value has none, without `ReadContext.id_prefix`."""
    value: Any = None
    """Decoded value without its null fields; None if `error` is set."""
    error: DataError | None = None
    metadata_types: Mapping[str, Callable[[str], Any]] = field(default_factory=dict)
    """Function that converts the texts of a column, where they become metadata, by column."""
    keys: tuple[str, ...] = field(init=False)
    """Keys of the value, with those of null fields: all columns of a table."""

    def __post_init__(self) -> None:
        keys = tuple(self.value) if isinstance(self.value, dict) else ()
        object.__setattr__(self, "keys", keys)
        # Here, so that null means "absent" in every container, whatever the format.
        try:
            object.__setattr__(self, "value", drop_null_fields(self.value))
        except RecursionError:
            error = DataError("nested too deeply", place=self.place, fix="Write a flat object")
            object.__setattr__(self, "value", None)
            object.__setattr__(self, "error", error)

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

    @property
    def column_names(self) -> tuple[str, ...]:
        """Columns of the row: the keys of the inspected rows, and its own ones."""
        return tuple(dict.fromkeys((*self.context.inspected_keys, *self.keys)))

    def get_field(self, key: str) -> JsonValue:
        """Return the value under `key` with its place; the value of a missing key is None."""
        return JsonValue(self.value, self.place, self.root).get_field(key)


def drop_null_fields(value: Any) -> Any:
    """Return `value` without the keys that hold None, or an object of None only, at any depth.

    Tables give every row every column, and every object every key. Items of lists are kept.

    Raises:
        RecursionError: the value is nested too deeply.
    """
    if isinstance(value, list):
        return [drop_null_fields(item) for item in value]
    if not isinstance(value, dict):
        return value
    fields = {}
    for key, item in value.items():
        pruned = drop_null_fields(item)
        if pruned is not None and (pruned != {} or item == {}):
            fields[key] = pruned
    return fields


def parse_id(row: SourceRow, column: str = "id") -> str:
    """Return the row's own id, else its default behind the prefix of the source.

    Raises:
        DataError: the value of `column` is no id.
    """
    field = row.get_field(column)
    if field.value in (None, ""):
        return row.context.id_prefix + row.default_id
    return field.parse_record_id()


def collect_metadata(row: SourceRow, used: Iterable[str]) -> dict[str, Any]:
    """Return the keys of the row's own ``metadata`` and all columns but `used`, as one dict.

    A ``metadata`` that is no object is left out and counted, the column ``id`` only left out. Of
    equal keys, the column wins. Values become JSON types: dates and times ISO text, tuples lists,
    other types ``str(value)``. Images and bytes are left out at any depth, and their columns
    counted; None is left out at the top. The result may be empty.
    """
    metadata = row.value.get("metadata")
    columns = dict(metadata) if isinstance(metadata, Mapping) else {}
    parsed = {*used, "id", "metadata"}
    if metadata is not None and not isinstance(metadata, Mapping):
        row.context.ignored.add("column", "metadata")
    for key, value in row.value.items():
        if key in parsed:
            continue
        if holds_bytes(value):
            row.context.ignored.add("column", key)
            if isinstance(value, dict) and value.keys() <= {"bytes", "path"}:
                continue
        convert = row.metadata_types.get(key)
        columns[key] = value if convert is None else convert(value)
    return {
        key: _to_json_type(value)
        for key, value in columns.items()
        if not isinstance(value, _BINARY_TYPES) and value is not None
    }


def holds_bytes(value: Any) -> bool:
    """Return whether a value holds an image or other bytes, at any depth."""
    if isinstance(value, dict):
        return any(holds_bytes(item) for item in value.values())
    if isinstance(value, list | tuple):
        return any(holds_bytes(item) for item in value)
    return isinstance(value, _BINARY_TYPES)


def _to_json_type(value: Any) -> Any:
    """Return a value as JSON types: dates and times as ISO text, other types as ``str(value)``.

    Images and bytes inside lists and objects are left out, None is kept, and keys become text.
    """
    if isinstance(value, dict):
        items = {str(k): v for k, v in value.items() if not isinstance(v, _BINARY_TYPES)}
        return {key: _to_json_type(item) for key, item in items.items()}
    if isinstance(value, list | tuple):
        return [_to_json_type(item) for item in value if not isinstance(item, _BINARY_TYPES)]
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    return value if isinstance(value, str | int | float | bool) or value is None else str(value)


def parse_images(field: JsonValue) -> list[ImageRef]:
    """Return the image or the list of images that a value names; [] for an empty one.

    Images are not opened.

    Raises:
        DataError: a value is no reference to an image, as in `JsonValue.parse_image`.
    """
    if isinstance(field.value, list) and field.value:
        return [item.parse_image() for item in field.parse_items("images")]
    return [] if field.value in (None, "", [], {}) else [field.parse_image()]


def find_image_columns(columns: Iterable[str]) -> list[str]:
    """Return the columns that may hold the image, of the first of `IMAGE_COLUMN_RANKS` present.

    Names are compared as `normalize_column` writes them. The list is empty if there is none.
    """
    names = {name: normalize_column(name) for name in columns}
    for rank in IMAGE_COLUMN_RANKS:
        candidates = [name for name, normalized in names.items() if normalized in rank]
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
