"""Sources of records, with the settings that say how each is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from vlduet.config import SourceSection
from vlduet.data.formats import RowErrorHandler, read_records
from vlduet.data.jsonl_output import LIST_REMEDY, find_output_damage
from vlduet.data.readers.rows import IgnoredData
from vlduet.data.records import Record
from vlduet.errors import DataError
from vlduet.hub import resolve_dataset
from vlduet.logs import logger

MAX_WARNINGS = 20
"""Largest number of warnings about what is not read in a source; the others are counted."""
STRICT_FIX = (
    "Remove it from the source, or name its role (--columns caption=NAME), or leave --strict out"
)


@dataclass(frozen=True, slots=True)
class RecordSource:
    """File or folder of records, and how it is read. The fields are those of `read_records`."""

    path: Path
    """The file or folder, or the name of a data set on the hub (`hub.resolve_dataset`)."""
    format: str | None = None
    """Key of `formats.FORMATS`; None detects it."""
    root: Path | None = None
    """Folder that relative image paths start from; None means that of the file."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Column of the source by role."""
    strict: bool = False
    """Refuse broken rows, and whatever in the source is not read."""

    @classmethod
    def from_config(cls, section: SourceSection) -> Self:
        """Return the source that a section of a config names."""
        return cls(
            section.path,
            format=section.format,
            root=section.root,
            columns=section.columns,
            strict=section.strict,
        )

    def read(
        self, *, on_error: RowErrorHandler | None = None, ignored: IgnoredData | None = None
    ) -> Iterator[Record]:
        """Return an iterator over the records, which logs what was seen and not read.

        Each column, file or the like is one warning, logged when the iterator ends or is closed, of
        which there are `MAX_WARNINGS` at most. So is each file of an output of ours that is not as
        it was written (`find_output_damage`), at once.

        Args:
            on_error: receives the error of each broken row, which is left out; None, or `strict`,
                raises the first.
            ignored: counter of what is not read, for a caller that reports its files
                (`IgnoredData.describe_files`), which are not logged then.

        Raises:
            DataError, OSError: as `read_records`, at once or as the iterator is advanced; and, if
                `strict`, for a file that is not as it was written, and behind the first record
                after which something was not read.
        """
        self._report_damage()
        logs_files = ignored is None
        counter = IgnoredData() if ignored is None else ignored
        records = self.read_silently(counter, on_error=None if self.strict else on_error)
        return self._report_ignored(records, counter, logs_files=logs_files)

    def read_silently(
        self, ignored: IgnoredData, *, on_error: RowErrorHandler | None
    ) -> Iterator[Record]:
        """Return an iterator over the records that counts in `ignored` what is not read.

        As `read`, but nothing is logged, and `strict` has no effect.
        """
        return read_records(
            resolve_dataset(self.path),
            format=self.format,
            root=self.root,
            columns=self.columns,
            ignored=ignored,
            on_error=on_error,
        )

    def _report_damage(self) -> None:
        """Log or, if `strict`, raise which files of an output of ours are not as written."""
        messages, _ = find_output_damage(self.path)
        if messages and self.strict:
            raise DataError(messages[0], place=self.path, fix=LIST_REMEDY)
        for message in messages[:MAX_WARNINGS]:
            logger.warning(f"{self.path}: {message}. {LIST_REMEDY}")

    def _report_ignored(
        self, records: Iterator[Record], ignored: IgnoredData, *, logs_files: bool
    ) -> Iterator[Record]:
        """Yield `records`; log or, if `strict`, raise what `ignored` has counted."""
        try:
            for record in records:
                self._check_strict(ignored)
                yield record
            self._check_strict(ignored)
        finally:
            messages = [] if self.strict else ignored.messages(files=False)
            for message in messages[:MAX_WARNINGS]:
                logger.warning(f"{self.path}: {message}")
            if num_more := len(messages[MAX_WARNINGS:]):
                more = f"{num_more:,} more columns, files or members are not read"
                logger.warning(f"{self.path}: {more}; 'vlduet data check --json' lists all")
            if logs_files:
                files = [] if self.strict else ignored.describe_files()
                for message in files + ignored.describe_system_files():
                    logger.warning(f"{self.path}: {message}")

    def _check_strict(self, ignored: IgnoredData) -> None:
        """Raise DataError if `strict` is set and something was not read."""
        if self.strict and ignored:
            messages = ignored.messages()
            more = [f"{len(messages) - MAX_WARNINGS:,} more"] if messages[MAX_WARNINGS:] else []
            message = "; ".join(messages[:MAX_WARNINGS] + more)
            raise DataError(message, place=self.path, fix=STRICT_FIX)


SourceLike = RecordSource | Path | str
"""Source, or the path of one that is read without settings."""


def as_source(source: SourceLike) -> RecordSource:
    """Return `source` itself, or a source with default settings at the path that it is."""
    return source if isinstance(source, RecordSource) else RecordSource(Path(source))
