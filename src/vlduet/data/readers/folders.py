"""Rows of a folder: of its files of records, else of its images, folder by folder.

    metadata.csv, .jsonl, .parquet     alone, as in `datasets`' ImageFolder
    files of records                   if they are one data set: a file, or its numbered shards
    other tables                       if their rows are recognised: captions.csv, captions.json
    else                               the images, with the text files beside them

A folder's tables hold for its subfolders, except for those that have a metadata file of their own.
What is not read is counted.
"""

from __future__ import annotations

import itertools
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from vlduet.data.image_formats import IMAGE_SUFFIXES
from vlduet.data.readers.containers import (
    CONTAINER_READERS,
    RowGroup,
    is_pattern,
    read_file_group,
    read_pattern_groups,
    split_suffix,
)
from vlduet.data.readers.folder_scan import scan_folder
from vlduet.data.readers.image_folders import (
    SIDECAR_SUFFIXES,
    make_unreadable_folder_row,
    read_image_rows,
)
from vlduet.data.readers.rows import IgnoredData, ReadContext, SourceRow
from vlduet.errors import DataError
from vlduet.structured_files import read_json_object

METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
"""Files that list the images of a folder and of its subfolders; the first that exists is read."""
ARCHIVE_SUFFIXES = (".tar", ".tar.gz", ".tgz")
RECORD_FILE_SUFFIXES = (".jsonl", ".ndjson", ".parquet", ".arrow", *ARCHIVE_SUFFIXES)
"""Endings of files that are read as records if they lie in a folder that is the source."""
SPLITS = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
    "eval": "validation",
}
"""Split by the name of its folder, which may end with a year (``train2017``)."""
UNCOUNTED_FILES = re.compile(
    r"(readme|licen[cs]e|notice|citation|changelog|authors|copying)(\..*)?"
    r"|manifest\.json|dataset_infos?\.json|state\.json|.*\.partial",
    re.IGNORECASE,
)
"""Names of files that hold no data and are not counted."""
MAX_LISTED_FILES = 20
"""Number of files of one ending in a folder that are inspected, or counted by their names."""
MAX_PEEKED_ROWS = 5
"""Number of rows that say whether a table is one of records."""

RowPredicate = Callable[[SourceRow], bool]
"""Function that says whether a row is of a record format."""


def iter_row_groups(
    source: Path,
    context: ReadContext,
    *,
    is_record_row: RowPredicate,
    has_root: bool = False,
    listed: set[str] | None = None,
) -> Iterator[RowGroup]:
    """Yield the rows of a file, a folder or a pattern in groups with common columns.

    Each group must be exhausted before the next one. A folder is walked as the iterator is
    advanced, and what is not read is counted in `context`.

    Args:
        is_record_row: says whether the rows of a table that lies in a folder are to be read.
        has_root: keep the root of `context`; otherwise relative image paths start from the folder
            of each file.
        listed: absolute paths of the images of the groups so far, kept by the caller for groups
            that are tracked. Other images beside a table are counted.

    Raises:
        DataError: before the first group, if the source is missing, has an unknown ending, or is a
            folder without records and images, or with several data sets; for a subfolder with
            several, when it is reached.
        OSError: the folder cannot be read.
    """
    if source.is_dir():
        reader = _FolderReader(source, context, is_record_row, has_root=has_root)
        yield from reader.iter_groups(set() if listed is None else listed)
    elif source.exists():
        root = context.root if has_root else source.parent
        yield read_file_group([source], replace(context, root=root))
    elif is_pattern(source):
        yield from read_pattern_groups(source, context, has_root=has_root)
    else:
        raise DataError("no such file or folder", place=source, fix="Check the path")


@dataclass(slots=True)
class _Folder:
    """Files of one folder by how they are read."""

    path: Path
    subfolders: list[str] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    tables: list[Path] = field(default_factory=list)
    """Files of records that are one data set, or several by mistake."""
    unread: list[str] = field(default_factory=list)
    """Names of files that are not read, without those that are `UNCOUNTED_FILES`."""

    @property
    def has_metadata(self) -> bool:
        """Whether the folder has a file of `METADATA_FILES`."""
        return bool(self.tables) and self.tables[0].name in METADATA_FILES


class _FolderReader:
    """Walk over a folder, from the top down, that yields groups of rows."""

    def __init__(
        self, source: Path, context: ReadContext, is_record_row: RowPredicate, *, has_root: bool
    ):
        """Set the folder and the settings of its rows, as `iter_row_groups` does."""
        self.source = source
        self.context = context
        self.is_record_row = is_record_row
        self.has_root = has_root
        self.unread_tables: list[Path] = []
        """Files of records in subfolders without images."""

    def iter_groups(self, listed: set[str]) -> Iterator[RowGroup]:
        """Yield the groups of the folder; raise DataError or OSError as `iter_row_groups`."""
        os.listdir(self.source)  # raises, while os.walk is silent
        if (self.source / "dataset_dict.json").is_file():
            splits = sorted(path.parent for path in self.source.glob("*/dataset_info.json"))
            raise _make_split_error(self.source, splits)
        if saved := _list_saved_dataset_files(self.source):
            yield self._read_tables(self.source, saved)
            return
        num_groups = 0
        for group in self._walk(self.source, None, listed):
            num_groups += 1
            yield group
        if not num_groups and self.unread_tables:
            message = "neither images nor records directly in this folder"
            raise DataError(message, place=self.source, fix=_name_one(self.unread_tables))
        if not num_groups:
            suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
            fix = f"Accepted: images ({suffixes}), or files {', '.join(CONTAINER_READERS)}"
            message = "neither images nor records in this folder"
            raise DataError(message, place=self.source, fix=fix)

    def _walk(self, path: Path, table: Path | None, listed: set[str]) -> Iterator[RowGroup]:
        """Yield the groups of a folder and of its subfolders, sorted.

        Args:
            table: file of a folder above that lists the images, or None.
            listed: absolute paths of the images that the groups so far have named.
        """
        try:
            folder = self._scan(path, table)
        except OSError as error:
            row = make_unreadable_folder_row(path, error, self.context)
            yield RowGroup(path, self.context, iter([row]), has_fixed_columns=True)
            return
        if folder.tables:
            _check_shards(folder)
            yield self._read_tables(path, folder.tables)
            table = folder.tables[0]
        elif table is None:
            self._check_splits(folder)
            if folder.images:
                context = replace(self.context, root=self.source, inspected_keys={}, id_prefix="")
                names = {*folder.images, *folder.unread}
                rows = read_image_rows(path, folder.images, context, files=names)
                yield RowGroup(path, context, rows, has_fixed_columns=True)
        self._count_unread(folder, table, listed)
        for name in folder.subfolders:
            yield from self._walk(path / name, table, listed)

    def _read_tables(self, folder: Path, tables: list[Path]) -> RowGroup:
        """Return the rows of the tables of a folder, whose ids start with the folder's name."""
        prefix = "" if folder == self.source else f"{folder.relative_to(self.source).as_posix()}/"
        root = self.context.root if self.has_root else folder
        return read_file_group(
            tables, replace(self.context, root=root, id_prefix=prefix), is_tracked=True
        )

    def _scan(self, path: Path, table: Path | None) -> _Folder:
        """Return what a folder holds and how it is read; count what `scan_folder` leaves out.

        Raises OSError if the folder is unreadable.
        """
        content = scan_folder(path, self.context.ignored)
        folder = _Folder(path, content.subfolders, content.images)
        names = content.files
        folder.tables = self._select_tables(folder, names, table)
        is_read = {*folder.images, *(file.name for file in folder.tables)}
        is_read |= _find_shard_side_files(names, folder.subfolders)
        folder.unread = [n for n in names if n not in is_read and not UNCOUNTED_FILES.fullmatch(n)]
        return folder

    def _select_tables(self, folder: _Folder, names: list[str], table: Path | None) -> list[Path]:
        """Return the files of records among the files of a folder.

        In a subfolder whose images a table lists already, and in one without images, only a
        metadata file counts.
        """
        metadata = [folder.path / name for name in METADATA_FILES if name in names]
        is_source = folder.path == self.source
        if metadata:
            return metadata[:1]
        side_files = _find_shard_side_files(names, folder.subfolders)
        files = [folder.path / name for name in names if name not in side_files]
        tables = [p for p in files if p.name.lower().endswith(RECORD_FILE_SUFFIXES)]
        if not is_source and (table is not None or not _has_images(folder)):
            self.unread_tables += tables
            return []
        if not is_source:
            # What lies deep in somebody's photos is a table only if its rows name images.
            tables = [
                path
                for path in tables
                if not path.name.lower().endswith(ARCHIVE_SUFFIXES) and self._is_table(path)
            ]
        sidecar_stems = {Path(name).stem for name in folder.images}
        candidates = [
            path
            for path in files
            if path.suffix.lower() in (".csv", ".tsv", ".json", ".txt")
            and path.stem not in sidecar_stems
            and not UNCOUNTED_FILES.fullmatch(path.name)
        ]
        counts = Counter(path.suffix.lower() for path in candidates)
        candidates = [p for p in candidates if counts[p.suffix.lower()] <= MAX_LISTED_FILES]
        return sorted([*tables, *(path for path in candidates if self._is_table(path))])

    def _is_table(self, path: Path) -> bool:
        """Return whether the first rows of a file are records; a broken CSV or TSV counts as well.

        Nothing is counted as not read.
        """
        context = replace(self.context, root=path.parent, ignored=IgnoredData(), inspected_keys={})
        try:
            rows = list(itertools.islice(read_file_group([path], context).rows, MAX_PEEKED_ROWS))
        except (DataError, OSError):
            return path.suffix.lower() in (".csv", ".tsv")
        return any(self.is_record_row(row) for row in rows)

    def _check_splits(self, folder: _Folder) -> None:
        """Raise DataError if the subfolders with data are several splits of a data set."""
        splits: dict[str, list[Path]] = {}
        for name in folder.subfolders:
            split = SPLITS.get(re.sub(r"[-_]?\d{4}$", "", name.lower()))
            if split is not None and _has_data(folder.path / name):
                splits.setdefault(split, []).append(folder.path / name)
        if len(splits) > 1:
            raise _make_split_error(folder.path, itertools.chain(*splits.values()))

    def _count_unread(self, folder: _Folder, table: Path | None, listed: set[str]) -> None:
        """Count the files of a folder that are not read.

        Args:
            table: file that lists the images of the folder; None if they are read themselves.
            listed: absolute paths of the images that records name.
        """
        ignored = self.context.ignored
        unread = folder.unread
        if table is None:
            stems = {Path(name).stem for name in folder.images}
            sidecars = {stem + suffix for stem in stems for suffix in SIDECAR_SUFFIXES}
            unread = [name for name in unread if name not in sidecars]
        else:
            root = os.path.abspath(folder.path)
            missing = [name for name in folder.images if os.path.join(root, name) not in listed]
            if missing:
                ignored.add("image", str(table), len(missing))
        endings = Counter(Path(name).suffix.lower() for name in unread)
        for name in unread:
            ending = Path(name).suffix.lower()
            is_data = split_suffix(name)[1] != ""
            if is_data and endings[ending] <= MAX_LISTED_FILES:
                ignored.add("file", str(folder.path / name))
            else:
                ignored.add_file(folder.path / name)


def _has_images(folder: _Folder) -> bool:
    """Return whether a folder, or one of its direct subfolders, holds an image."""
    names = [*folder.images]
    for name in folder.subfolders:
        # An unreadable subfolder is reported when it is reached.
        names += next(os.walk(folder.path / name), ("", [], []))[2]
    return any(Path(name).suffix.lower() in IMAGE_SUFFIXES for name in names)


def _has_data(folder: Path) -> bool:
    """Return whether a folder, or one below it, holds an image or a file of records."""
    endings = (*IMAGE_SUFFIXES, *RECORD_FILE_SUFFIXES, ".csv", ".tsv")
    return any(name.lower().endswith(endings) for _, _, names in os.walk(folder) for name in names)


def _find_shard_side_files(names: list[str], subfolders: list[str]) -> set[str]:
    """Return the files that img2dataset writes beside its shards: their metadata and statistics.

    A shard is a ``.tar``, a ``.parquet`` with images, or a folder.
    """
    present = {*names}
    side_files = set()
    for name in names:
        stem, suffix = split_suffix(name)
        shard = stem.removesuffix("_stats")
        has_shard = f"{shard}.tar" in present or shard in subfolders
        is_metadata = suffix == ".parquet" and (f"{stem}.tar" in present or stem.isdigit())
        if name.endswith("_stats.json"):
            is_metadata = True
            has_shard |= f"{shard}.parquet" in present
        if is_metadata and has_shard:
            side_files.add(name)
    return side_files


def _check_shards(folder: _Folder) -> None:
    """Raise DataError if the tables of a folder are several data sets.

    Shards are numbered parts of one data set; ``train.jsonl`` and ``test.jsonl``, or train-0.tar
    and test-0.tar, are not.
    """
    number = r"[-_.]?\d+([-_]of[-_]\d+)?(-[0-9a-f]{16})?$"
    stems = {re.sub(number, "", split_suffix(path.name)[0]) for path in folder.tables}
    if len(stems) > 1 or len({split_suffix(path.name)[1] for path in folder.tables}) > 1:
        message = "several files of records in one folder"
        raise DataError(message, place=folder.path, fix=_name_one(folder.tables))


def _list_saved_dataset_files(folder: Path) -> list[Path]:
    """Return the files that `Dataset.save_to_disk` wrote, in order; [] for another folder.

    Raises:
        DataError: the list of files is broken, or names files outside the folder or a selection.
    """
    state = folder / "state.json"
    if not (state.is_file() and (folder / "dataset_info.json").is_file()):
        return []
    fix = "Save the dataset again with save_to_disk"
    saved = read_json_object(state, {"_data_files": list}, error_class=DataError, fix=fix)
    try:
        names = [str(item["filename"]) for item in saved["_data_files"]]
    except (KeyError, TypeError) as error:
        raise DataError(f"broken ({error})", place=state, fix=fix) from None
    if saved.get("_indices_data_files") or any(Path(name).name != name for name in names):
        fix = "Call flatten_indices() before save_to_disk"
        raise DataError("an indexed view of other files", place=state, fix=fix)
    return [folder / name for name in names]


def _make_split_error(folder: Path, splits: Iterable[Path]) -> DataError:
    """Return the error of a folder whose subfolders are splits of one data set."""
    return DataError("several splits in one folder", place=folder, fix=_name_one(splits))


def _name_one(paths: Iterable[Path]) -> str:
    """Return a remedy that lists up to six paths, and how many more there are."""
    names = [str(path) for path in paths]
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return f"Name one: {', '.join(names[:6])}{more}"
