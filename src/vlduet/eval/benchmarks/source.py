"""The folder where official files lie: reading them with errors that name file, line and field, and hashing what is read."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vlduet.data.arrow import read_parquet_rows
from vlduet.data.images import IMAGE_SUFFIXES
from vlduet.data.records import ImageRef, Place
from vlduet.errors import DataError

UNCHANGED = "Take the official file, unchanged"


class Fields(dict[str, Any]):
    """One object of an official file. A missing key is an error that names the file, the line or index, and the key."""

    def __init__(self, values: Mapping[str, Any], place: Place):
        super().__init__(values)
        self.place = place

    def __missing__(self, key: str) -> Any:
        raise DataError(f"no '{key}' here", place=self.place.with_field(key), fix=UNCHANGED)

    def within(self, key: str) -> Fields:
        """The object under `key`."""
        return fields(self[key], self.place.with_field(key))

    def each(self, key: str) -> list[Fields]:
        """The objects of the list under `key`."""
        value = self[key]
        if not isinstance(value, list):
            raise DataError(f"'{key}' is no list", place=self.place.with_field(key), fix=UNCHANGED)
        return [fields(item, self.place.with_field(f"{key}[{i}]")) for i, item in enumerate(value)]


def fields(value: Any, place: Place) -> Fields:
    """A decoded object. Raises DataError for anything else."""
    if not isinstance(value, Mapping):
        raise DataError(
            f"expected an object, got {type(value).__name__}", place=place, fix=UNCHANGED
        )
    return Fields(value, place)


class Source:
    """A folder of official files.

    Args:
        root: what ``--data`` names; paths in `Benchmark.files` are relative to it.
        seed: of whatever a protocol draws by chance (which WebQA questions, which order).
        k: facts that a RAG benchmark puts in the prompt; None for its own default.
    """

    def __init__(self, root: Path, *, seed: int = 0, k: int | None = None):
        self.root, self.seed, self.k = root, seed, k
        self.hashes: dict[str, str] = {}
        """SHA-256 of every annotation file that was read, by its path in `root`."""
        self._folders: dict[Path, frozenset[str]] = {}

    def path(self, *names: str) -> Path:
        """The first of these that is there. Raises DataError naming the first one."""
        for name in names:
            if (self.root / name).exists():
                return self.root / name
        other = f" (nor {', '.join(names[1:])})" if names[1:] else ""
        raise DataError(
            f"'{names[0]}' is not there{other}",
            place=self.root,
            fix="Put the official file in that place",
        )

    def has(self, name: str) -> bool:
        """Whether a file or folder is there."""
        return (self.root / name).exists()

    def bytes(self, *names: str) -> bytes:
        """The content of a file, whose hash is remembered."""
        path = self.path(*names)
        data = path.read_bytes()
        self.hashes[path.relative_to(self.root).as_posix()] = hashlib.sha256(data).hexdigest()
        return data

    def text(self, *names: str) -> str:
        """A UTF-8 file."""
        try:
            return self.bytes(*names).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(
                f"not UTF-8 at byte {error.start}", place=self.path(*names), fix=UNCHANGED
            ) from None

    def json(self, *names: str) -> Any:
        """A JSON file."""
        try:
            return json.loads(self.text(*names))
        except json.JSONDecodeError as error:
            place = Place(str(self.path(*names)), error.lineno)
            raise DataError(
                f"broken JSON ({error.msg})", place=place, fix="Copy the file again"
            ) from None

    def object(self, *names: str) -> Fields:
        """A JSON file that holds one object."""
        return fields(self.json(*names), Place(str(self.path(*names))))

    def entries(self, *names: str) -> dict[str, Fields]:
        """A JSON file that holds objects by name, in their order."""
        found = self.object(*names)
        return {key: found.within(key) for key in found}

    def items(self, *names: str) -> list[Fields]:
        """A JSON file that holds a list of objects."""
        value, place = self.json(*names), Place(str(self.path(*names)))
        if not isinstance(value, list):
            raise DataError(
                f"expected a list, got {type(value).__name__}", place=place, fix=UNCHANGED
            )
        return [fields(item, place.with_field(f"[{i}]")) for i, item in enumerate(value)]

    def lines(self, *names: str) -> list[Fields]:
        """A JSON lines file, whatever its name."""
        path, found = self.path(*names), []
        for number, line in enumerate(self.text(*names).splitlines(), 1):
            if line.strip():
                place = Place(str(path), number)
                try:
                    found.append(fields(json.loads(line), place))
                except json.JSONDecodeError as error:
                    raise DataError(
                        f"broken JSON ({error.msg})", place=place, fix="Copy the file again"
                    ) from None
        return found

    def table(self, *names: str, delimiter: str = ",") -> list[Fields]:
        """A CSV or TSV file with a header line."""
        path = self.path(*names)
        csv.field_size_limit(2**31 - 1)  # images travel in base64 columns
        # Not splitlines: a quoted field may hold line ends, and universal ones at that.
        reader = csv.DictReader(io.StringIO(self.text(*names), newline=""), delimiter=delimiter)
        return [
            Fields({k: v or "" for k, v in row.items() if k}, Place(str(path), reader.line_num))
            for row in reader
        ]

    def parquet(self, pattern: str) -> Iterator[Fields]:
        """The rows of all parquet files that match, in the order of their names."""
        paths = sorted(self.root.glob(pattern))
        if not paths:
            raise DataError(
                f"no '{pattern}' there", place=self.root, fix="Put the official file in that place"
            )
        for path in paths:
            self.hashes[path.relative_to(self.root).as_posix()] = hashlib.sha256(
                path.read_bytes()
            ).hexdigest()
            for row in read_parquet_rows(path, self.root):
                if row.error is not None:
                    raise row.error
                yield fields(row.value, row.place)

    def image(self, *names: str) -> ImageRef:
        """An image that must be there; the first of these names that is."""
        for name in names:
            if self.holds(name):
                return ImageRef(path=self.root / name)
        other = f" (nor {', '.join(names[1:])})" if names[1:] else ""
        raise DataError(
            f"image '{names[0]}' is not there{other}",
            place=self.root,
            fix="Unpack the images in that place",
        )

    def holds(self, name: str) -> bool:
        """Whether an image is there; a folder is listed once, because benchmarks have 100,000 of them."""
        path = self.root / name
        if path.parent not in self._folders:
            try:
                self._folders[path.parent] = frozenset(item.name for item in path.parent.iterdir())
            except OSError:
                self._folders[path.parent] = frozenset()
        return path.name in self._folders[path.parent]

    def images_in(self, name: str) -> list[ImageRef]:
        """The images of a folder, by name."""
        return [
            ImageRef(path=p)
            for p in sorted(self.path(name).iterdir())
            if p.suffix.lower() in IMAGE_SUFFIXES
        ]
