"""Read the official files of benchmarks.

Errors name the file, the line and the field. Every annotation file that is read is hashed, so that
a score states what it was measured on.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vlduet.data.image_formats import IMAGE_SUFFIXES
from vlduet.data.readers.arrow import read_parquet_rows
from vlduet.data.readers.rows import ReadContext
from vlduet.data.records import ImageRef, Place
from vlduet.errors import DataError
from vlduet.structured_files import parse_json

USE_OFFICIAL_FILE = "Take the official file, unchanged"


class OfficialObject(dict[str, Any]):
    """One object of an official file.

    Reading a missing key raises DataError that names the file, the line or index, and the key.
    """

    def __init__(self, values: Mapping[str, Any], place: Place):
        super().__init__(values)
        self.place = place

    def __missing__(self, key: str) -> Any:
        raise self.make_error(f"no '{key}' here", key)

    def make_error(self, message: str, key: str | None = None) -> DataError:
        """Return an error about this object, or about its value under `key`."""
        place = self.place if key is None else self.place.with_field(key)
        return DataError(message, place=place, fix=USE_OFFICIAL_FILE)

    def get_object(self, key: str) -> OfficialObject:
        """Return the object under `key`; raise DataError where there is none."""
        return as_official_object(self[key], self.place.with_field(key))

    def get_objects(self, key: str) -> list[OfficialObject]:
        """Return the objects of the list under `key`; raise DataError for anything else."""
        return _as_official_objects(self[key], self.place, field=key)


def as_official_object(value: Any, place: Place) -> OfficialObject:
    """Return a decoded mapping with its place; raise DataError there for any other value."""
    if not isinstance(value, Mapping):
        message = f"expected an object, got {type(value).__name__}"
        raise DataError(message, place=place, fix=USE_OFFICIAL_FILE)
    return OfficialObject(value, place)


def _as_official_objects(value: Any, place: Place, *, field: str = "") -> list[OfficialObject]:
    """Return the mappings of a decoded list as OfficialObjects, with their index in their place.

    Raises:
        DataError: the value is no list, at `field` of `place`; or an element of it is no mapping.
    """
    if not isinstance(value, list):
        message = f"expected a list, got {type(value).__name__}"
        place = place.with_field(field) if field else place
        raise DataError(message, place=place, fix=USE_OFFICIAL_FILE)
    return [
        as_official_object(item, place.with_field(f"{field}[{i}]")) for i, item in enumerate(value)
    ]


class OfficialFiles:
    """Data folder with the official files of benchmarks, and the settings of their loaders.

    Methods that take several names use the first one that exists. They raise DataError where none
    exists or the content is broken.
    """

    def __init__(self, root: Path, *, seed: int = 0, k: int | None = None):
        """Store the arguments; no file is read, and `root` need not exist.

        Args:
            root: data folder (option ``--data``); all names are relative to it.
            seed: seed of everything that a loader draws, such as WebQA questions or the order of
                options.
            k: number of retrieved entries in the prompt of a RAG benchmark; None for its own
                default.
        """
        self.root = root
        self.seed = seed
        self.k = k
        self.hashes: dict[str, str] = {}
        """SHA-256 of every annotation file that was read, by its path relative to `root`."""
        self._file_names: dict[Path, frozenset[str]] = {}

    def find_path(self, *names: str) -> Path:
        """Return the path of the first of these names that exists; raise DataError if none does."""
        for name in names:
            if (self.root / name).exists():
                return self.root / name
        raise self._missing_error(*names, fix="Put the official file in that place")

    def has_file(self, name: str) -> bool:
        """Return whether a file or folder exists."""
        return (self.root / name).exists()

    def read_bytes(self, *names: str) -> bytes:
        """Return the content of the first of these files that exists; store its hash in `hashes`.

        DataError is raised where none exists.
        """
        path = self.find_path(*names)
        data = path.read_bytes()
        self.hashes[path.relative_to(self.root).as_posix()] = hashlib.sha256(data).hexdigest()
        return data

    def read_text(self, *names: str) -> str:
        """Return the content of a UTF-8 file without byte order mark; store its hash in `hashes`.

        DataError is raised where none of the names exists or the file is not UTF-8.
        """
        data = self.read_bytes(*names)
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            message = f"not UTF-8 at byte {error.start}"
            place = self.find_path(*names)
            raise DataError(message, place=place, fix=USE_OFFICIAL_FILE) from None

    def read_json(self, *names: str) -> Any:
        """Return the decoded content of a JSON file."""
        return _parse_json(self.read_text(*names), Place(str(self.find_path(*names))))

    def read_object(self, *names: str) -> OfficialObject:
        """Return the object that a JSON file contains."""
        return as_official_object(self.read_json(*names), Place(str(self.find_path(*names))))

    def read_named_objects(self, *names: str) -> dict[str, OfficialObject]:
        """Return the objects of a JSON file that maps names to objects, in file order."""
        mapping = self.read_object(*names)
        return {key: mapping.get_object(key) for key in mapping}

    def read_objects(self, *names: str) -> list[OfficialObject]:
        """Return the objects of a JSON file that contains a list of objects."""
        return _as_official_objects(self.read_json(*names), Place(str(self.find_path(*names))))

    def read_json_lines(self, *names: str) -> list[OfficialObject]:
        """Return the objects of a JSON lines file of any suffix; store its hash in `hashes`.

        Blank lines are skipped. A missing file, or a line that is no JSON object, raises DataError.
        """
        path = str(self.find_path(*names))
        objects = []
        for number, line in enumerate(self.read_text(*names).splitlines(), 1):
            if line.strip():
                place = Place(path, number)
                objects.append(as_official_object(_parse_json(line, place), place))
        return objects

    def read_table(self, *names: str, delimiter: str = ",") -> list[OfficialObject]:
        """Return the rows of a CSV or TSV file by its header line, and store its hash in `hashes`.

        Empty and missing cells are ``""``; cells without a column name are dropped. The limit of
        the csv module on the size of a cell is raised for the whole process. DataError is raised
        where none of the names exists or the file is not UTF-8.
        """
        path = str(self.find_path(*names))
        csv.field_size_limit(2**31 - 1)  # MMBench stores images in base64 columns
        # Not splitlines: a quoted cell may contain line ends, even Unicode ones.
        lines = io.StringIO(self.read_text(*names), newline="")
        reader = csv.DictReader(lines, delimiter=delimiter)
        rows = []
        for row in reader:
            cells = {key: value or "" for key, value in row.items() if key}
            rows.append(OfficialObject(cells, Place(path, reader.line_num)))
        return rows

    def iter_parquet_rows(self, pattern: str) -> Iterator[OfficialObject]:
        """Yield the rows of all parquet files that match a glob pattern, in order of file names.

        The hash of a file is stored in `hashes` when its first row is due. DataError is raised
        during iteration, where no file matches, a file is broken, or a row is no object.
        """
        paths = sorted(self.root.glob(pattern))
        if not paths:
            raise self._missing_error(pattern, fix="Put the official file in that place")
        for path in paths:
            self.read_bytes(path.relative_to(self.root).as_posix())
            for row in read_parquet_rows(path, ReadContext(self.root)):
                if row.error is not None:
                    raise row.error
                yield as_official_object(row.value, row.place)

    def find_image(self, *names: str) -> ImageRef:
        """Return a reference to the first of these files that exists; raise DataError if none does.

        Images are neither opened nor hashed.
        """
        for name in names:
            if self.has_image(name):
                return ImageRef(path=self.root / name)
        raise self._missing_error(*names, fix="Unpack the images in that place", kind="image ")

    def has_image(self, name: str) -> bool:
        """Return whether a file exists, whatever its type; a missing folder gives False.

        Every folder is listed only once, because image folders contain up to 100,000 files; later
        changes of it go unnoticed.
        """
        path = self.root / name
        if path.parent not in self._file_names:
            try:
                file_names = frozenset(item.name for item in path.parent.iterdir())
            except OSError:
                file_names = frozenset()
            self._file_names[path.parent] = file_names
        return path.name in self._file_names[path.parent]

    def list_images(self, name: str) -> list[ImageRef]:
        """Return the images of a folder, sorted by file name."""
        paths = sorted(self.find_path(name).iterdir())
        return [ImageRef(path=path) for path in paths if path.suffix.lower() in IMAGE_SUFFIXES]

    def _missing_error(self, *names: str, fix: str, kind: str = "") -> DataError:
        """Return the error that none of these names exists."""
        alternatives = f" (nor {', '.join(names[1:])})" if names[1:] else ""
        return DataError(f"{kind}'{names[0]}' is not there{alternatives}", place=self.root, fix=fix)


def _parse_json(text: str, place: Place) -> Any:
    """Return decoded JSON; raise DataError if it is broken.

    The error is at `place`, with the line of the mistake where `place` has no line.
    """
    return parse_json(text, place=place, error_class=DataError, fix="Copy the file again")
