"""What an index remembers of its sources between builds, in one file.

    INDEX/sources.sqlite   sources     files and folders that documents were read from
                           documents   source of each document
                           images      size, modification time, inode and hash of each image file

Without it, a build takes all documents for those of the last source, and reads all images again.
"""

from __future__ import annotations

import os
import sqlite3
import stat
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Self

from vlduet.data import images
from vlduet.data.readers.containers import is_pattern
from vlduet.data.records import ImageRef
from vlduet.errors import RetrievalError
from vlduet.hub import describe_snapshot
from vlduet.library_errors import describe_library_error, is_lack_of_space
from vlduet.retrieval.index import path_pair

STATE_FILENAME = "sources.sqlite"
TIMESTAMP_MARGIN_NS = 2_000_000_000
"""Age below which a file may change without another modification time, as on FAT: it is read again
by the next build."""
MAX_UNWRITTEN_VERSIONS = 1000
"""Number of image files after which their versions are written."""
HUB_PREFIX = "hub:"
"""Beginning of the name of a source that is a data set on the hub, whatever its revision."""
_SCHEMA = """
CREATE TABLE IF NOT EXISTS sources (
    number INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, relative TEXT);
CREATE TABLE IF NOT EXISTS documents (id TEXT PRIMARY KEY, source INTEGER) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS images (path BLOB PRIMARY KEY, version TEXT, sha256 TEXT) WITHOUT ROWID;
"""


def name_source(path: Path) -> str:
    """Return the name of a source: its absolute path, or ``hub:ORG/NAME`` of a data set there."""
    snapshot = describe_snapshot(path)
    if snapshot is not None:
        return HUB_PREFIX + snapshot.partition("@")[0]
    return os.fsencode(path).decode("utf-8", "replace")


class SourceState:
    """The open file. It is a context manager that closes it; each change is written at once.

    Attributes:
        foreign: number of the source of each stored document of other sources, by id.
    """

    def __init__(self, index: Path, source: Path, *, rehash: bool = False):
        """Open or create the file of an index that this process has locked.

        Args:
            index: folder of the index.
            source: absolute path of the source of this build. A source at the same place relative
                to the index is the same, if its old path is gone: both were moved together.
            rehash: forget the versions of all image files.

        Raises:
            RetrievalError: the file is broken, or cannot be written.
        """
        self.path = index / STATE_FILENAME
        self.foreign: dict[str, int] = {}
        self._new_versions: dict[bytes, tuple[str, str]] = {}
        # The folder's lock is ours; locks of SQLite fail on some network drives.
        uri = f"{self.path.resolve().as_uri()}?nolock=1"
        with self._translate_errors():
            self._database = sqlite3.connect(uri, uri=True, isolation_level=None)
            self._database.executescript(_SCHEMA)
            if rehash:
                self._database.execute("DELETE FROM images")
            self.number = self._register(index, source)

    def _register(self, index: Path, source: Path) -> int:
        """Return the number of a source, which is added, or renamed if it was moved."""
        name = name_source(source)
        relative = None if name.startswith(HUB_PREFIX) else path_pair(source, index)[1]
        # A source of this name comes first: another one that was moved here cannot take its name.
        select = "SELECT number, name, relative FROM sources ORDER BY name != ?"
        rows = self._database.execute(select, (name,)).fetchall()
        for number, known_name, known_relative in rows:
            is_moved = known_relative == relative is not None and not _exists(known_name)
            if known_name == name or is_moved:
                update = "UPDATE sources SET name = ?, relative = ? WHERE number = ?"
                self._database.execute(update, (name, relative, number))
                return int(number)
        insert = "INSERT INTO sources (name, relative) VALUES (?, ?)"
        return int(self._database.execute(insert, (name, relative)).lastrowid or 0)

    def load(self, ids: Collection[str], *, last_source: str) -> None:
        """Read the sources of stored documents into `foreign`.

        Args:
            ids: ids of all documents in the store.
            last_source: path of the source of the last build, from which all documents are if the
                file knows none; empty for a new index.
        """
        with self._translate_errors():
            if last_source and not self._database.execute("SELECT 1 FROM documents").fetchone():
                # Before the file existed, an index had one source.
                earlier = self._register(self.path.parent, Path(last_source))
                self._write_documents(ids, earlier)
            select = "SELECT id, source FROM documents JOIN sources ON number = source"
            rows = self._database.execute(f"{select} WHERE number != ?", (self.number,))
            self.foreign = {id_: number for id_, number in rows if id_ in ids}

    def name(self, number: int) -> str:
        """Return the name of a source for messages."""
        select = "SELECT name FROM sources WHERE number = ?"
        return str(self._database.execute(select, (number,)).fetchone()[0])

    def is_missing(self, number: int) -> bool:
        """Return whether nothing is left where a source was, which is never known of the hub."""
        return not _exists(self.name(number))

    def take_over(self, number: int) -> None:
        """Make all documents of another source those of this build's."""
        with self._translate_errors():
            update = "UPDATE documents SET source = ? WHERE source = ?"
            self._database.execute(update, (self.number, number))
            self._database.execute("DELETE FROM sources WHERE number = ?", (number,))
        self.foreign = {id_: n for id_, n in self.foreign.items() if n != number}

    def claim(self, ids: Iterable[str]) -> None:
        """Note that documents are of this build's source, before they are written to the store."""
        ids = list(ids)
        with self._translate_errors():
            self._write_documents(ids, self.number)
        for id_ in ids:
            self.foreign.pop(id_, None)

    def _write_documents(self, ids: Iterable[str], number: int) -> None:
        rows = ((id_, number) for id_ in ids)
        self._execute_many("INSERT OR REPLACE INTO documents VALUES (?, ?)", rows)

    def forget(self, ids: Iterable[str]) -> None:
        """Remove documents that were removed from the store."""
        with self._translate_errors():
            self._execute_many("DELETE FROM documents WHERE id = ?", ((id_,) for id_ in ids))

    def image_key(self, ref: ImageRef) -> str:
        """Return `images.image_key` of an image, without reading a file that has not changed.

        A file has not changed if size, modification time and inode are those at which it was read.
        Raises ImageError as `images.image_key`.
        """
        version = None if ref.path is None else _ImageVersion.read(ref.path)
        if ref.path is None or version is None:
            return images.image_key(ref)
        path = os.fsencode(os.path.abspath(ref.path))
        if path in self._new_versions:
            return self._new_versions[path][1]
        with self._translate_errors():
            select = "SELECT sha256 FROM images WHERE path = ? AND version = ?"
            row = self._database.execute(select, (path, version.text)).fetchone()
        if row is not None:
            return str(row[0])
        key = images.image_key(ref)
        if version.is_settled:
            self._new_versions[path] = (version.text, key)
        if len(self._new_versions) >= MAX_UNWRITTEN_VERSIONS:
            self._write_versions()
        return key

    def _write_versions(self) -> None:
        """Write the versions of files that were read since the last call."""
        rows = [(path, *values) for path, values in self._new_versions.items()]
        self._new_versions.clear()
        with self._translate_errors():
            self._execute_many("INSERT OR REPLACE INTO images VALUES (?, ?, ?)", rows)

    def forget_missing_images(self) -> None:
        """Remove the versions of image files that do not exist any more."""
        with self._translate_errors():
            paths = [path for (path,) in self._database.execute("SELECT path FROM images")]
            missing = [(path,) for path in paths if not os.path.lexists(path)]
            self._execute_many("DELETE FROM images WHERE path = ?", missing)

    def _execute_many(self, statement: str, rows: Iterable[tuple[Any, ...]]) -> None:
        """Execute a statement for many rows in one transaction."""
        self._database.execute("BEGIN")
        self._database.executemany(statement, rows)
        self._database.execute("COMMIT")

    @contextmanager
    def _translate_errors(self) -> Iterator[None]:
        """Turn errors of SQLite in a block into a RetrievalError at the file."""
        try:
            yield
        except sqlite3.Error as error:
            if is_lack_of_space(error):
                message, fix = describe_library_error(error) or ("", "")
            else:
                message = f"cannot be used ({error})"
                fix = (
                    "Delete this file, and build again, without --prune: all images are read "
                    "again, and all documents are taken for those of the last source"
                )
            raise RetrievalError(message, place=self.path, fix=fix) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        try:
            self._write_versions()
        except RetrievalError:
            if error_type is None:
                raise
        finally:
            self._database.close()


class _ImageVersion(NamedTuple):
    """Version of a regular file."""

    text: str
    """Size, modification time in ns and inode."""
    is_settled: bool
    """Whether every later change will give another version."""

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """Return the version of a file; None for a missing one, a folder, a pipe or the like."""
        try:
            status = path.stat()
        except (OSError, ValueError):
            return None
        if not stat.S_ISREG(status.st_mode):
            return None
        text = f"{status.st_size}:{status.st_mtime_ns}:{status.st_ino}"
        return cls(text, time.time_ns() - status.st_mtime_ns > TIMESTAMP_MARGIN_NS)


def _exists(name: str) -> bool:
    """Return whether a source still exists: always true of the hub; of a pattern its folder."""
    path = Path(name)
    if name.startswith(HUB_PREFIX):
        return True
    return path.exists() or (is_pattern(path) and path.parent.exists())
