"""Records out of whatever people already have, lazily, each error with its file, line and field.

    source --container--> rows --schema--> records

The container is told by the source's name (or what a folder holds), the schema by the keys of the first rows; `format`
overrides the schema. A broken row goes to `on_error` and the rest goes on; a source that cannot be read at all raises at
once.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlduet.data import arrow, images
from vlduet.data.quarantine import QUARANTINE_SUFFIX
from vlduet.data.readers import containers, conversations, pairs
from vlduet.data.readers.rows import SourceRow
from vlduet.data.records import (
    COMMON_KEYS,
    KEYS_BY_KIND,
    ImageRef,
    Parts,
    Record,
    is_utf8_encodable,
    parse_record,
    record_to_json,
)
from vlduet.errors import DataError, suggest_name

RowErrorHandler = Callable[[DataError], object]
MAX_DETECTION_ROWS = 50
"""Rows that are looked at, at most, to tell the schema."""


@dataclass(frozen=True, slots=True)
class RecordFormat:
    """A schema: how to know a row of it, and how to read one."""

    description: str
    parse_row: Callable[[SourceRow], Record]
    matches: Callable[[dict[str, Any]], bool]


def _ours(row: SourceRow) -> Record:
    return parse_record(row.value, place=row.place, root=row.root)


def _knows_ours(value: dict[str, Any]) -> bool:
    if "id" not in value:
        return False
    for keys in KEYS_BY_KIND.values():
        known = keys | COMMON_KEYS
        # A misspelt key of ours is an error to report, not a column of somebody else's table.
        if keys & value.keys() and all(
            difflib.get_close_matches(key, known, cutoff=0.8) for key in value
        ):
            return True
    return False


def _knows_swift(value: dict[str, Any]) -> bool:
    turns = value.get("messages")
    tagged = isinstance(turns, list) and any(
        isinstance(turn, dict)
        and isinstance(turn.get("content"), str)
        and conversations.IMAGE_TAG in turn["content"]
        for turn in turns
    )
    return tagged or (isinstance(value.get("query"), str) and "response" in value)


def _knows_messages(value: dict[str, Any]) -> bool:
    return "messages" in value or {"prompt", "completion"} <= value.keys()


FORMATS: dict[str, RecordFormat] = {
    "mmeb": RecordFormat(
        "MMEB: qry, qry_image_path, pos_text, pos_image_path, neg_text, neg_image_path",
        pairs.parse_mmeb,
        lambda value: bool(
            value.keys() & {"qry", "qry_text"} and value.keys() & set(pairs.MMEB_KEYS[2:])
        ),
    ),
    "llava": RecordFormat(
        "LLaVA: conversations of from and value, image",
        conversations.parse_llava,
        lambda value: "conversations" in value,
    ),
    "ms-swift": RecordFormat(
        "ms-swift: messages with <image>, or query and response; images",
        conversations.parse_swift,
        _knows_swift,
    ),
    "records": RecordFormat(
        "ours: id and one of image, parts, messages, query", _ours, _knows_ours
    ),
    "messages": RecordFormat(
        "OpenAI and TRL: messages, or prompt and completion; images",
        conversations.parse_messages,
        _knows_messages,
    ),
    "captions": RecordFormat(
        f"captioned images: a column {', '.join(pairs.IMAGE_COLUMNS[:3])}, ... and any of "
        f"{', '.join(pairs.SHORT_COLUMNS + pairs.LONG_COLUMNS)}",
        pairs.parse_captions,
        lambda value: bool(pairs.find_image_columns(value)),
    ),
}
"""Asked in this order: the first that knows the keys of a row reads the source."""

ContainerReader = Callable[[Path, Path], Iterator[SourceRow]]

CONTAINER_READERS: dict[str, ContainerReader] = {
    ".jsonl": containers.read_jsonl_rows,
    ".ndjson": containers.read_jsonl_rows,
    ".json": containers.read_json_list_rows,
    ".csv": containers.read_table_rows,
    ".tsv": containers.read_table_rows,
    ".parquet": arrow.read_parquet_rows,
    ".arrow": arrow.read_arrow_rows,
    ".feather": arrow.read_arrow_rows,
    ".tar": containers.read_tar_rows,
    ".tar.gz": containers.read_tar_rows,
    ".tgz": containers.read_tar_rows,
}
"""By the end of the file's name."""

RECORD_FILE_SUFFIXES = (".jsonl", ".ndjson", ".parquet", ".arrow", ".tar", ".tar.gz", ".tgz")
"""Files that make a folder more than a folder of images."""


def read_records(
    source: Path,
    *,
    format: str | None = None,
    root: Path | None = None,
    on_error: RowErrorHandler | None = None,
) -> Iterator[Record]:
    """The records of a file or a folder, lazily.

    Args:
        source: a file of any name in `CONTAINERS`; a folder of images, of shards, or saved by Hugging Face `datasets`.
        format: a key of `FORMATS`; None tells it by the keys.
        root: where relative image paths start; None takes the file's folder.
        on_error: gets each broken row's error and reading goes on; None raises at the first.

    Raises:
        DataError: at once for a source or format that is unknown or unreadable; then, without `on_error`, for a row.
    """
    if format is not None and format not in FORMATS:
        known, near = f"Known: {', '.join(FORMATS)}", suggest_name(format, FORMATS)
        fix = known if near.startswith("Known") else f"{near} {known}"
        raise DataError(f"no format '{format}'", place=source, fix=fix)
    rows = _rows(source, root)
    try:
        name, rows = (format, rows) if format else _sniff(source, rows)
    except OSError as error:
        raise DataError(
            f"cannot be read ({error.strerror})", place=source, fix="Check its permissions"
        ) from None
    return _records(rows, FORMATS[name], on_error)


def append_unlisted_images(
    records: Iterable[Record], folder: Path, *, on_error: RowErrorHandler
) -> Iterator[Record]:
    """Records that lie in a folder of images, then those images that none of them names."""
    known = set[Path]()
    for record in records:
        known |= {ref.path.resolve() for ref in record.images() if ref.path is not None}
        yield record
    for record in _records(
        containers.read_image_folder_rows(folder, folder), FORMATS["captions"], on_error
    ):
        if (
            record.image is not None
            and record.image.path is not None
            and record.image.path.resolve() not in known
        ):
            yield record


def _records(
    rows: Iterable[SourceRow], schema: RecordFormat, on_error: RowErrorHandler | None
) -> Iterator[Record]:
    for row in rows:
        try:
            if row.error is not None:
                raise row.error
            if not isinstance(row.value, dict):
                what = f"a row is an object, this is {type(row.value).__name__}"
                raise DataError(what, place=row.place, fix="Write {...}")
            record = schema.parse_row(row)
        except DataError as error:
            if on_error is None:
                raise
            on_error(error)
            continue
        yield record


def detect_format(source: Path) -> str:
    """The format's name. Raises DataError where it is not recognised."""
    return _sniff(source, _rows(source, None))[0]


def _sniff(source: Path, rows: Iterator[SourceRow]) -> tuple[str, Iterator[SourceRow]]:
    """The format by the first row that one knows, and all the rows again."""
    seen: list[SourceRow] = []
    for row in itertools.islice(rows, MAX_DETECTION_ROWS):
        seen.append(row)
        if isinstance(row.value, dict):
            for name, schema in FORMATS.items():
                if schema.matches(row.value):
                    return name, itertools.chain(seen, rows)
    objects = [row for row in seen if isinstance(row.value, dict)]
    if not objects:
        return "records", itertools.chain(
            seen, rows
        )  # nothing, or nothing that could be read: the rows' errors say it
    keys = ", ".join(sorted(map(str, objects[0].value))[:12]) or "none"
    accepted = "; ".join(f"{name} ({schema.description})" for name, schema in FORMATS.items())
    raise DataError(
        f"not recognised by its keys: {keys}", place=objects[0].place, fix=f"Accepted: {accepted}"
    )


# --- containers ------------------------------------------------------------------------------------


def _rows(source: Path, root: Path | None) -> Iterator[SourceRow]:
    if not source.exists():
        raise DataError("no such file or folder", place=source, fix="Check the path")
    if source.is_dir():
        return _folder_rows(source, root)
    container = _container(source)
    if container is None:
        what = (
            f"a file of records does not end in '{source.suffix}'"
            if source.suffix
            else "a file without an ending"
        )
        raise DataError(
            what,
            place=source,
            fix=f"Accepted: {', '.join(CONTAINER_READERS)}, or a folder of images",
        )
    return container(source, source.parent if root is None else root)


def _container(source: Path) -> ContainerReader | None:
    name = source.name.lower()
    return next(
        (container for ending, container in CONTAINER_READERS.items() if name.endswith(ending)),
        None,
    )


def _folder_rows(folder: Path, root: Path | None) -> Iterator[SourceRow]:
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(p.parent.name for p in folder.glob("*/dataset_info.json"))
        fix = f"Name one: {_some(folder / split for split in splits)}"
        raise DataError("several splits in one folder", place=folder, fix=fix)
    files = _saved_dataset(folder)
    if not files:
        here = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
        here = [
            p for p in here if not p.name.endswith(QUARANTINE_SUFFIX)
        ]  # what a verb left out, beside what it wrote
        files = [
            p for p in here if p.name in ("metadata.jsonl", "metadata.csv", "metadata.parquet")
        ][:1]
        files = files or [p for p in here if p.name.lower().endswith(RECORD_FILE_SUFFIXES)]
    if not files:
        return _some_images(folder)
    endings = {p.suffix for p in files}
    # Shards are numbered parts of one thing; `train.jsonl` and `test.jsonl`, or train-0.tar and test-0.tar, are not.
    stems = {
        re.sub(r"[-_.]?\d+([-_]of[-_]\d+)?(-[0-9a-f]{16})?$", "", _stem(p.name)) for p in files
    }
    if len(files) > 1 and (len(stems) > 1 or len(endings) > 1):
        raise DataError(
            "several files of records in one folder", place=folder, fix=f"Name one: {_some(files)}"
        )
    read = [container for p in files if (container := _container(p))]
    start = folder if root is None else root
    return itertools.chain.from_iterable(c(p, start) for c, p in zip(read, files, strict=True))


def _stem(name: str) -> str:
    """A file's name without the ending that tells its container: of train.part.tar.gz, train.part."""
    ending = max((e for e in CONTAINER_READERS if name.lower().endswith(e)), key=len, default="")
    return name[: len(name) - len(ending)]


def _some(paths: Iterable[Path]) -> str:
    names = [str(path) for path in paths]
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def _saved_dataset(folder: Path) -> list[Path]:
    """The files of a folder that `Dataset.save_to_disk` wrote, in their order."""
    state = folder / "state.json"
    if not (state.is_file() and (folder / "dataset_info.json").is_file()):
        return []
    try:
        saved = json.loads(state.read_text(encoding="utf-8"))
        names = [str(item["filename"]) for item in saved["_data_files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"broken ({error})", place=state, fix="Save the dataset again with save_to_disk"
        ) from None
    if saved.get("_indices_data_files") or any(Path(name).name != name for name in names):
        raise DataError(
            "an indexed view of other files",
            place=state,
            fix="Call flatten_indices() before save_to_disk",
        )
    return [folder / name for name in names]


def _some_images(folder: Path) -> Iterator[SourceRow]:
    rows = containers.read_image_folder_rows(folder, folder)
    first = next(rows, None)
    if first is None:
        fix = f"Accepted: images ({', '.join(sorted(images.IMAGE_SUFFIXES))}), or files {', '.join(CONTAINER_READERS)}"
        raise DataError("neither images nor records in this folder", place=folder, fix=fix)
    return itertools.chain([first], rows)


# --- writing ---------------------------------------------------------------------------------------


def check_output_path(target: Path, source: Path, *, allow_existing: bool = False) -> None:
    """Raises DataError for a target of `convert` that is no ``.jsonl``, or that is the source or a part of it.

    Args:
        may_grow: the target may be what a folder holds already.
    """
    if target.suffix != ".jsonl":
        raise DataError(
            f"'{target}' is no .jsonl file",
            place="--to",
            fix=f"Write {target.with_suffix('.jsonl')}",
        )
    if target.resolve() == source.resolve():
        raise DataError(f"'{target}' is the source itself", place="--to", fix="Name another file")
    if not allow_existing and is_file_inside(target, source):
        fix = "Name a file outside, or a new one"
        raise DataError(
            f"'{target}' is there already, and is read as a part of {source}", place="--to", fix=fix
        )


def is_file_inside(target: Path, source: Path) -> bool:
    """Whether there is such a file, and a folder that is read has it in it."""
    return target.exists() and target.resolve().parent == source.resolve()


def stream_to_jsonl(records: Iterable[Record], target: Path) -> Iterator[Record]:
    """Write records as our ``.jsonl``, yielding each as it is written; the file appears when all are.

    Images inside the source (archives, tables, data: URLs) are written to ``<target's stem>-images/``, named by content.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as out:
            for record in records:
                raw = record_to_json(_with_files(record, target), root=target.parent)
                out.write(_readable(raw) + "\n")
                yield record
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def _readable(raw: dict[str, Any]) -> str:
    """JSON with its letters as they are; in ASCII where one of them has no bytes in UTF-8."""
    line = json.dumps(raw, ensure_ascii=False)
    return line if is_utf8_encodable(line) else json.dumps(raw)


def _with_files(record: Record, target: Path) -> Record:
    """The record with every embedded image written to a file."""

    def filed(ref: ImageRef) -> ImageRef:
        if ref.data is None:
            return ref
        kind = images.detect_image_format(ref.data[:512])
        ending = f".{kind.lower()}" if f".{kind.lower()}" in images.IMAGE_SUFFIXES else ".bin"
        path = (
            target.parent
            / f"{target.stem}-images"
            / f"{hashlib.sha256(ref.data).hexdigest()[:24]}{ending}"
        )
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(ref.data)
        return ImageRef(path=path)

    def parts(items: Parts) -> Parts:
        return tuple(filed(item) if isinstance(item, ImageRef) else item for item in items)

    return dataclasses.replace(
        record,
        image=filed(record.image) if record.image else None,
        parts=parts(record.parts),
        messages=tuple(
            dataclasses.replace(turn, parts=parts(turn.parts)) for turn in record.messages
        ),
        query=parts(record.query),
        positive=tuple(map(parts, record.positive)),
        negative=tuple(map(parts, record.negative)),
    )
