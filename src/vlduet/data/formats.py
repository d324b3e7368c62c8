"""Records from the files that people have, read lazily, every error with its file, line and field.

    source --container reader--> rows --record format--> records

The container follows from the source's name (or from what a folder holds), the record format from
the keys of the first rows; the argument `format` overrides the latter. A broken row goes to
`on_error` and reading continues; a source that cannot be read at all raises at once.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlduet.data import images
from vlduet.data.quarantine import QUARANTINE_SUFFIX
from vlduet.data.readers import (
    archives,
    arrow,
    conversations,
    image_folders,
    json_files,
    pairs,
    tables,
)
from vlduet.data.readers.rows import (
    IMAGE_COLUMNS,
    IgnoredData,
    ReadContext,
    SourceRow,
    find_image_columns,
)
from vlduet.data.record_json import COMMON_KEYS, KEYS_BY_KIND, parse_record, record_to_json
from vlduet.data.records import ImageRef, Record, is_utf8_encodable, map_images
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


def _matches_swift(value: dict[str, Any]) -> bool:
    """Return whether a row has ``query`` and ``response``, or a message with an ``<image>`` tag."""
    if isinstance(value.get("query"), str) and "response" in value:
        return True
    messages = value.get("messages")
    turns = messages if isinstance(messages, list) else []
    contents = [turn.get("content") for turn in turns if isinstance(turn, dict)]
    return any(isinstance(text, str) and conversations.IMAGE_TAG in text for text in contents)


def _matches_messages(value: dict[str, Any]) -> bool:
    return "messages" in value or {"prompt", "completion"} <= value.keys()


def _matches_mmeb(value: dict[str, Any]) -> bool:
    has_query = bool(value.keys() & {"qry", "qry_text"})
    return has_query and bool(value.keys() & set(pairs.MMEB_KEYS[2:]))


FORMATS: dict[str, RecordFormat] = {
    "mmeb": RecordFormat(
        "MMEB: qry, qry_image_path, pos_text, pos_image_path, neg_text, neg_image_path",
        pairs.parse_mmeb,
        _matches_mmeb,
    ),
    "llava": RecordFormat(
        "LLaVA: conversations of from and value, image",
        conversations.parse_llava,
        lambda value: "conversations" in value,
    ),
    "ms-swift": RecordFormat(
        "ms-swift: messages with <image>, or query and response; images",
        conversations.parse_swift,
        _matches_swift,
    ),
    "records": RecordFormat(
        "ours: id and one of image, parts, messages, query", _parse_own, _matches_own
    ),
    "messages": RecordFormat(
        "OpenAI and TRL: messages, or prompt and completion; images",
        conversations.parse_messages,
        _matches_messages,
    ),
    "captions": RecordFormat(
        f"captioned images: a column {', '.join(IMAGE_COLUMNS[:3])}, ... and any of "
        f"{', '.join(pairs.SHORT_COLUMNS + pairs.LONG_COLUMNS)}",
        pairs.parse_captions,
        lambda value: bool(find_image_columns(value)),
    ),
}
"""Record formats by name. The first one that matches a row reads the source: the order matters."""

ContainerReader = Callable[[Path, ReadContext], Iterator[SourceRow]]
"""Function of (file, settings of the source) that yields the file's rows."""

CONTAINER_READERS: dict[str, ContainerReader] = {
    ".jsonl": json_files.read_jsonl_rows,
    ".ndjson": json_files.read_jsonl_rows,
    ".json": json_files.read_json_list_rows,
    ".csv": tables.read_table_rows,
    ".tsv": tables.read_table_rows,
    ".parquet": arrow.read_parquet_rows,
    ".arrow": arrow.read_arrow_rows,
    ".feather": arrow.read_arrow_rows,
    ".tar": archives.read_tar_rows,
    ".tar.gz": archives.read_tar_rows,
    ".tgz": archives.read_tar_rows,
}
"""Container readers by the end of the file's name."""

RECORD_FILE_SUFFIXES = (".jsonl", ".ndjson", ".parquet", ".arrow", ".tar", ".tar.gz", ".tgz")
"""Endings of files that are read as records if they lie in a folder that is the source."""


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
    rows = _read_rows(source, context)
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
    return _detect_format(source, _read_rows(source, ReadContext(root)))[0]


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


# --- containers


def _read_rows(source: Path, context: ReadContext) -> Iterator[SourceRow]:
    """Return an iterator over the rows of a file or folder; a file is not opened yet.

    Raises:
        DataError: the source is missing, has an unknown ending, or is a folder without records
            and images or with several data sets.
    """
    if not source.exists():
        raise DataError("no such file or folder", place=source, fix="Check the path")
    if source.is_dir():
        return _read_folder_rows(source, context)
    _, suffix = _split_suffix(source.name)
    if not suffix:
        message = "a file without an ending"
        if source.suffix:
            message = f"a file of records does not end in '{source.suffix}'"
        fix = f"Accepted: {', '.join(CONTAINER_READERS)}, or a folder of images"
        raise DataError(message, place=source, fix=fix)
    return CONTAINER_READERS[suffix](source, context)


def _split_suffix(name: str) -> tuple[str, str]:
    """Return (stem, key of `CONTAINER_READERS`) of a file name; (name, "") for other endings."""
    suffixes = (suffix for suffix in CONTAINER_READERS if name.lower().endswith(suffix))
    suffix = max(suffixes, key=len, default="")
    return name[: len(name) - len(suffix)], suffix


def _read_folder_rows(folder: Path, context: ReadContext) -> Iterator[SourceRow]:
    """Return an iterator over the rows of a folder's files of records, else of its images.

    Several files are read one after the other if their names differ in a number only. Paths
    of a folder of images start from it, whatever the root of `context` is.

    Raises:
        DataError: the folder holds several splits or data sets, a broken or indexed saved dataset,
            or neither records nor images.
    """
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(path.parent.name for path in folder.glob("*/dataset_info.json"))
        fix = f"Name one: {_list_paths(folder / split for split in splits)}"
        raise DataError("several splits in one folder", place=folder, fix=fix)
    files = _list_saved_dataset_files(folder) or _list_record_files(folder)
    if not files:
        return _read_image_rows(folder, context)
    # Shards are numbered parts of one data set; `train.jsonl` and `test.jsonl`, or train-0.tar
    # and test-0.tar, are not.
    number = r"[-_.]?\d+([-_]of[-_]\d+)?(-[0-9a-f]{16})?$"
    stems = {re.sub(number, "", _split_suffix(path.name)[0]) for path in files}
    if len(stems) > 1 or len({path.suffix for path in files}) > 1:
        fix = f"Name one: {_list_paths(files)}"
        raise DataError("several files of records in one folder", place=folder, fix=fix)
    readers = [CONTAINER_READERS[_split_suffix(path.name)[1]] for path in files]
    rows = (reader(path, context) for reader, path in zip(readers, files, strict=True))
    return itertools.chain.from_iterable(rows)


def _list_record_files(folder: Path) -> list[Path]:
    """Return the files of records that lie directly in a folder, sorted; [] if there are none.

    If there is a ``metadata`` file (``.csv``, ``.jsonl`` or ``.parquet``, the first of these), it
    alone is returned. Hidden files and quarantine files are ignored.
    """
    files = sorted(path for path in folder.iterdir() if path.is_file())
    # A quarantine file lists what a command left out, beside the records that it wrote.
    ignored = [p for p in files if p.name.startswith(".") or p.name.endswith(QUARANTINE_SUFFIX)]
    files = [path for path in files if path not in ignored]
    metadata = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
    named = [path for path in files if path.name in metadata]
    return named[:1] or [p for p in files if p.name.lower().endswith(RECORD_FILE_SUFFIXES)]


def _list_saved_dataset_files(folder: Path) -> list[Path]:
    """Return the files that `Dataset.save_to_disk` wrote, in order; [] for another folder.

    Raises:
        DataError: the list of files is broken, or names files outside the folder or a selection.
    """
    state = folder / "state.json"
    if not (state.is_file() and (folder / "dataset_info.json").is_file()):
        return []
    try:
        saved = json.loads(state.read_text(encoding="utf-8"))
        names = [str(item["filename"]) for item in saved["_data_files"]]
    except (ValueError, KeyError, TypeError) as error:
        fix = "Save the dataset again with save_to_disk"
        raise DataError(f"broken ({error})", place=state, fix=fix) from None
    if saved.get("_indices_data_files") or any(Path(name).name != name for name in names):
        fix = "Call flatten_indices() before save_to_disk"
        raise DataError("an indexed view of other files", place=state, fix=fix)
    return [folder / name for name in names]


def _read_image_rows(folder: Path, context: ReadContext) -> Iterator[SourceRow]:
    """Return an iterator over a row per image below a folder, in the order of its reader.

    Raises:
        DataError: at once, if there is no image.
    """
    rows = image_folders.read_image_folder_rows(folder, context)
    first = next(rows, None)
    if first is None:
        suffixes = ", ".join(sorted(images.IMAGE_SUFFIXES))
        fix = f"Accepted: images ({suffixes}), or files {', '.join(CONTAINER_READERS)}"
        raise DataError("neither images nor records in this folder", place=folder, fix=fix)
    return itertools.chain([first], rows)


def _list_paths(paths: Iterable[Path]) -> str:
    """Return up to six paths for a message, and how many more there are."""
    names = [str(path) for path in paths]
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


# --- writing


def check_output_path(target: Path, source: Path, *, allow_existing: bool = False) -> None:
    """Check that `target` can be written while `source` is read. Nothing is written.

    Args:
        allow_existing: accept an existing file of the folder `source`, which the caller replaces.

    Raises:
        DataError: `target` is no ``.jsonl``, is the source, or (without `allow_existing`) exists
            directly in the folder `source`.
    """
    if target.suffix != ".jsonl":
        fix = f"Write {target.with_suffix('.jsonl')}"
        raise DataError(f"'{target}' is no .jsonl file", place="--to", fix=fix)
    if target.resolve() == source.resolve():
        fix = "Name another file"
        raise DataError(f"'{target}' is the source itself", place="--to", fix=fix)
    if not allow_existing and is_file_inside(target, source):
        message = f"'{target}' is there already, and is read as a part of {source}"
        raise DataError(message, place="--to", fix="Name a file outside, or a new one")


def is_file_inside(path: Path, folder: Path) -> bool:
    """Return whether `path` exists and lies directly in `folder`."""
    return path.exists() and path.resolve().parent == folder.resolve()


def stream_to_jsonl(records: Iterable[Record], target: Path) -> Iterator[Record]:
    """Write records to a ``.jsonl`` file, and yield each one after it is written.

    The generator must be exhausted: nothing happens before it is advanced, `target` appears, or is
    replaced, when all records are written, and stays as it was if an error stops the generator.
    The folder of `target` is created. Images given as bytes are written by `write_inline_image`
    and referred to there in the file; the yielded records are the unchanged ones.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial_file = target.with_name(f".{target.name}.partial")
    try:
        with partial_file.open("w", encoding="utf-8") as file:
            for record in records:
                stored = map_images(record, lambda ref: write_inline_image(ref, target))
                raw = record_to_json(stored, root=target.parent)
                line = json.dumps(raw, ensure_ascii=False)
                # A lone surrogate has no bytes in UTF-8, but can be spelled in ASCII.
                file.write((line if is_utf8_encodable(line) else json.dumps(raw)) + "\n")
                yield record
        partial_file.replace(target)
    finally:
        partial_file.unlink(missing_ok=True)


def write_inline_image(ref: ImageRef, target: Path) -> ImageRef:
    """Write an image that exists only as bytes to a file beside `target`; return its reference.

    The file is ``<stem of target>-images/<24 hex digits of the SHA-256>.<format>`` (``.bin`` for a
    format that is not in `IMAGE_SUFFIXES`), and is not written again if it exists. Folders are
    created. A `ref` with a path is returned unchanged.
    """
    if ref.data is None:
        return ref
    suffix = f".{images.detect_image_format(ref.data[:512]).lower()}"
    if suffix not in images.IMAGE_SUFFIXES:
        suffix = ".bin"
    name = hashlib.sha256(ref.data).hexdigest()[:24] + suffix
    path = target.parent / f"{target.stem}-images" / name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(ref.data)
    return ImageRef(path=path)
