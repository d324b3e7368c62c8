"""Rows of a source: its name, or what a folder holds, says which container reader reads it.

file     -> one group of rows
pattern  -> its files, which are one data set
folder   -> its files of records, or its images                          (readers/folders.py)
"""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from vlduet.data.readers import archives, arrow, json_files, tables
from vlduet.data.readers.rows import ReadContext, SourceRow
from vlduet.errors import DataError
from vlduet.structured_files import require_regular_file

ContainerReader = Callable[[Path, ReadContext], Iterator[SourceRow]]
"""Function of (file, settings of the source) that yields the file's rows."""

CONTAINER_READERS: dict[str, ContainerReader] = {
    ".jsonl": json_files.read_jsonl_rows,
    ".ndjson": json_files.read_jsonl_rows,
    ".json": json_files.read_json_rows,
    ".csv": tables.read_table_rows,
    ".tsv": tables.read_table_rows,
    ".txt": tables.read_table_rows,
    ".parquet": arrow.read_parquet_rows,
    ".arrow": arrow.read_arrow_rows,
    ".feather": arrow.read_arrow_rows,
    ".tar": archives.read_tar_rows,
    ".tar.gz": archives.read_tar_rows,
    ".tgz": archives.read_tar_rows,
}
"""Container readers by the end of the file's name."""
SPREADSHEET_SUFFIXES = (".xlsx", ".xls", ".xlsm", ".xlsb", ".ods", ".numbers")
"""Endings of files that are tables, but must be saved as CSV first."""
MAX_PATTERN_FILES = 100_000
"""Largest number of names that the braces of a pattern may stand for."""


@dataclass(frozen=True, slots=True)
class RowGroup:
    """Rows that have their columns in common: those of a file, of its shards, or of a folder."""

    place: Path
    """File or folder that the first row is from."""
    context: ReadContext
    """Settings of all rows."""
    rows: Iterator[SourceRow]
    """The rows, to be iterated over once."""
    has_fixed_columns: bool = False
    """Whether the reader names the columns, so that those of the user need not be there."""
    is_tracked: bool = False
    """Whether the reader needs to know which images the records name."""


def split_suffix(name: str) -> tuple[str, str]:
    """Return (stem, key of `CONTAINER_READERS`) of a file name; (name, "") for other endings."""
    suffixes = (suffix for suffix in CONTAINER_READERS if name.lower().endswith(suffix))
    suffix = max(suffixes, key=len, default="")
    return name[: len(name) - len(suffix)], suffix


def is_pattern(source: Path) -> bool:
    """Return whether a path does not exist and has ``*``, ``?``, ``[`` or ``{`` of a pattern."""
    return re.search(r"[*?\[{]", str(source)) is not None and not source.exists()


def read_file_group(
    files: list[Path], context: ReadContext, *, is_tracked: bool = False
) -> RowGroup:
    """Return the rows of files that are parts of one data set, one file after the other.

    Args:
        files: at least one file, each with an ending of `CONTAINER_READERS`.
        context: settings of the rows; the keys of inspected rows are not those of other groups.
        is_tracked: as in `RowGroup`.

    Raises:
        DataError: a file has an unknown ending, or is a pipe, socket or device.
    """
    for path in files:
        require_regular_file(path, error_class=DataError)
    context = replace(context, inspected_keys={})
    readers = [_find_reader(path) for path in files]
    rows = (reader(path, context) for reader, path in zip(readers, files, strict=True))
    return RowGroup(files[0], context, itertools.chain.from_iterable(rows), is_tracked=is_tracked)


def _find_reader(path: Path) -> ContainerReader:
    """Return the container reader of a file. Raise DataError for an unknown ending."""
    _, suffix = split_suffix(path.name)
    if suffix:
        return CONTAINER_READERS[suffix]
    message = "a file without an ending"
    if path.suffix:
        message = f"a file of records does not end in '{path.suffix}'"
    fix = f"Accepted: {', '.join(CONTAINER_READERS)}, or a folder of images"
    if path.suffix.lower() in SPREADSHEET_SUFFIXES:
        fix = f"Save the sheet as {path.with_suffix('.csv').name} (CSV, UTF-8)"
    raise DataError(message, place=path, fix=fix)


# --- patterns


def read_pattern_groups(
    source: Path, context: ReadContext, *, has_root: bool
) -> Iterator[RowGroup]:
    """Yield a group for each folder that a pattern has files in; the files are one data set.

    Args:
        has_root: keep the root of `context`; otherwise relative image paths start from the folder
            of each file.

    Raises:
        DataError: at the first group, if no file matches, a file that the braces name is missing,
            one has an unknown ending, or the endings differ.
    """
    files = expand_pattern(source)
    suffixes = {split_suffix(path.name)[1] for path in files}
    for path in files:
        _find_reader(path)
    if len(suffixes) > 1:
        fix = f"Name one: {source}{' or '.join(sorted(suffixes))}"
        message = f"files of several kinds: {', '.join(sorted(suffixes))}"
        raise DataError(message, place=source, fix=fix)
    folders = {path.parent: None for path in files}
    base = Path(os.path.commonpath(folders))
    for folder in folders:
        prefix = "" if folder == base else f"{folder.relative_to(base).as_posix()}/"
        group_context = replace(
            context, root=context.root if has_root else folder, id_prefix=prefix
        )
        yield read_file_group([path for path in files if path.parent == folder], group_context)


def expand_pattern(source: Path) -> list[Path]:
    """Return the files that a pattern stands for: braces in their order, else sorted.

    ``{00000..00012}`` counts, with as many digits as the bounds have; ``{a,b}`` are alternatives;
    ``*``, ``?``, ``[...]`` and ``**`` are those of `glob`. Folders are left out, and a file that
    several alternatives match is returned once.

    Raises:
        DataError: a pattern matches nothing, a file without ``*`` is missing, or the braces stand
            for more than `MAX_PATTERN_FILES` names.
    """
    files: dict[Path, None] = {}
    for name in _expand_braces(str(source), source):
        matches = sorted(glob.glob(name, recursive=True)) if glob.has_magic(name) else [name]
        paths = [Path(match) for match in matches if os.path.isfile(match)]
        if not paths:
            message = f"no file matches '{name}'" if glob.has_magic(name) else f"no file '{name}'"
            raise DataError(message, place=source, fix="Check the path, or name a folder")
        files.update(dict.fromkeys(paths))
    return list(files)


def _expand_braces(pattern: str, source: Path) -> list[str]:
    """Return the names that the braces of a pattern stand for; a brace without a pair is itself.

    Args:
        source: place of an error.

    Raises:
        DataError: there are more than `MAX_PATTERN_FILES`.
    """
    match = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if match is None:
        return [pattern]
    if match[3] is not None:
        items: Iterable[str] = match[3].split(",")
        count = match[3].count(",") + 1
    else:
        first, last = int(match[1]), int(match[2])
        width = len(match[1]) if match[1].startswith("0") or len(match[1]) == len(match[2]) else 0
        step = 1 if first <= last else -1
        items = (f"{number:0{width}d}" for number in range(first, last + step, step))
        count = abs(last - first) + 1
    suffixes = _expand_braces(pattern[match.end() :], source)
    if count * len(suffixes) > MAX_PATTERN_FILES:
        message = f"braces that stand for more than {MAX_PATTERN_FILES:,} files"
        raise DataError(message, place=source, fix="Name a folder, or use *")
    prefix = pattern[: match.start()]
    return [prefix + item + end for item in items for end in suffixes]
