"""Rows of a source: its name, or what a folder holds, says which container reader reads it."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from vlduet.data.images import IMAGE_SUFFIXES
from vlduet.data.quarantine import QUARANTINE_SUFFIX
from vlduet.data.readers import archives, arrow, image_folders, json_files, tables
from vlduet.data.readers.rows import ReadContext, SourceRow
from vlduet.errors import DataError

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


def read_source_rows(source: Path, context: ReadContext) -> Iterator[SourceRow]:
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
        suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
        fix = f"Accepted: images ({suffixes}), or files {', '.join(CONTAINER_READERS)}"
        raise DataError("neither images nor records in this folder", place=folder, fix=fix)
    return itertools.chain([first], rows)


def _list_paths(paths: Iterable[Path]) -> str:
    """Return up to six paths for a message, and how many more there are."""
    names = [str(path) for path in paths]
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
