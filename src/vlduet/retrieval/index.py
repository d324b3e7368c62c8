"""Index: a folder with a manifest, a vector store, and images that have no file of their own.

    INDEX/manifest.json      model, prompts and image backend that built it, its source and its
                             size, and size and hash of every file of the store
          store/             LanceDB table of rows and embeddings
          images/            images that the source contains as bytes, named by their SHA-256
          quarantine.jsonl   records that the last build left out, with reasons

`build.build_index` writes an index; all other code only reads it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from vlduet import __version__
from vlduet.data.records import ImageRef
from vlduet.errors import RetrievalError, quote_value
from vlduet.files import write_text_atomically
from vlduet.hub import describe_snapshot
from vlduet.integrity import (
    CHANGED,
    Damage,
    FileDigest,
    find_damage,
    get_listed_files,
    hash_files,
    is_intact,
    list_files,
    seal_manifest,
)
from vlduet.retrieval.documents import Side
from vlduet.retrieval.encode import Embedder
from vlduet.retrieval.filter_values import FILTER_VERSION
from vlduet.retrieval.search import check_image_search, search_vector
from vlduet.retrieval.stores.base import ApproximateMode, IndexRow, VectorStore
from vlduet.structured_files import FieldTypes, check_fields, read_json_object

MANIFEST_FORMAT = 1
"""Version of the manifest's format; an index in another format is refused."""
MANIFEST_FILENAME = "manifest.json"
STORE_FOLDER = "store"
IMAGE_FOLDER = "images"
DAMAGE_REMEDY = "Copy the index again, or delete it and build it again"
STORE = "lance"
"""Kind of store that the manifest of every index names."""
REQUIRED_FIELDS: FieldTypes = {
    "format": int,
    "store": str,
    "side": str,
    "dim": int,
    "fingerprint": str,
    "image_backend": str,
}
"""Keys that every manifest has."""
OPTIONAL_FIELDS: FieldTypes = {
    "model": (str, type(None)),
    "model_relative": (str, type(None)),
    "source": str,
    "fields": dict,
    "filters": int,
    "ann": str,
    "count": int,
    "complete": bool,
    "created": str,
    "updated": str,
    "vlduet": str,
    "files": dict,
    "manifest_sha256": str,
}
"""Keys that manifests of earlier versions may lack."""


@dataclass(frozen=True, slots=True)
class IndexManifest:
    """Origin and content of an index; the fields are the keys of manifest.json."""

    format: int
    store: str
    side: Side
    dim: int
    fingerprint: str
    """Fingerprint of the model: weights, prompts and image backend."""
    image_backend: str
    model: str | None = None
    """Absolute path of the model folder; None if the model was not loaded from a folder."""
    model_relative: str | None = None
    """The same path relative to the index folder."""
    source: str = ""
    """Absolute path of the source of the last build."""
    fields: Mapping[str, list[str]] = field(default_factory=dict)
    """Metadata keys that can be filtered by, with the kinds of their values."""
    filters: int = 1
    """Version of the rules by which metadata are stored to be filtered by; see `FILTER_VERSION`."""
    ann: ApproximateMode = "auto"
    """Whether builds make an index for approximate search, unless they are told otherwise."""
    count: int = 0
    """Number of documents."""
    complete: bool = False
    """Whether the last build finished; False during a build and after an interrupted one."""
    created: str = ""
    updated: str = ""
    vlduet: str = ""
    """Version of vlduet that wrote the manifest."""
    files: Mapping[str, FileDigest] = field(default_factory=dict)
    """Size and hash of the store's files at the last commit; of earlier versions empty."""
    manifest_sha256: str = ""
    """Hash of the other fields; "" before writing and in indexes of earlier versions."""

    @classmethod
    def for_new_index(cls, model: Embedder, *, side: Side) -> Self:
        """Return the manifest of an empty index that `model` is about to build."""
        return cls(
            format=MANIFEST_FORMAT,
            store=STORE,
            side=side,
            dim=model.dim,
            fingerprint=model.fingerprint,
            image_backend=model.image_backend,
            filters=FILTER_VERSION,
            created=_utc_now(),
        )

    @classmethod
    def read(cls, path: Path) -> Self:
        """Return the manifest of the index at folder `path`; the store is not opened.

        Raises:
            RetrievalError: no index, a broken or changed manifest, one in another format, or an
                index in the flat store of earlier versions.
        """
        rebuild = "Delete the index and build it again"
        file = path / MANIFEST_FILENAME
        if not file.exists():
            fix = "Build one: vlduet index MODEL SOURCE --to INDEX"
            raise RetrievalError("no index here", place=path, fix=fix)
        values = read_json_object(file, {"format": int}, error_class=RetrievalError, fix=rebuild)
        if values["format"] != MANIFEST_FORMAT:
            message = f"in format {values['format']}, this version reads {MANIFEST_FORMAT}"
            fix = "Update vlduet, or build the index again"
            raise RetrievalError(message, place=path, fix=fix)
        check_fields(
            values,
            REQUIRED_FIELDS,
            place=file,
            error_class=RetrievalError,
            fix=rebuild,
            optional=OPTIONAL_FIELDS,
        )
        unknown_keys = sorted(values.keys() - {*REQUIRED_FIELDS, *OPTIONAL_FIELDS})
        if unknown_keys or values["dim"] < 1:
            problem = f"unknown key {quote_value(unknown_keys[0])}" if unknown_keys else "dim < 1"
            raise RetrievalError(f"broken manifest ({problem})", place=file, fix=rebuild)
        manifest = cls(**{**values, "files": get_listed_files(values)})
        if manifest.store != STORE:
            message = f"its store '{manifest.store}' is no longer supported, only '{STORE}' is"
            raise RetrievalError(message, place=path, fix=rebuild)
        if not is_intact(values):
            raise RetrievalError(CHANGED, place=file, fix=DAMAGE_REMEDY)
        return manifest

    def write(self, path: Path) -> None:
        """Write the manifest to folder `path`, atomically.

        It gets the current time and version, and the list of the files that the store has now.
        Files ``.json``, which LanceDB only takes hints from, and its locks are not listed.
        """
        values = asdict(replace(self, updated=_utc_now(), vlduet=__version__))
        names = [f"{STORE_FOLDER}/{name}" for name in list_files(path / STORE_FOLDER)]
        names = [name for name in names if not name.endswith(".json")]
        text = json.dumps(seal_manifest(values, path, names=names), indent=2, ensure_ascii=False)
        write_text_atomically(path / MANIFEST_FILENAME, text + "\n")

    def find_damage(self, path: Path, *, reread: bool = False) -> list[Damage]:
        """Return the files of the store at folder `path` that are not as listed; [] if all are.

        After an interrupted build, files that are missing do not count: it may have merged them
        into others, and LanceDB misses those that it needs. `reread`: see `integrity.find_damage`.
        """
        files = self.files
        if not self.complete:
            files = {name: digest for name, digest in files.items() if (path / name).exists()}
        return find_damage(path, files, reread=reread)

    def verify_files(self, path: Path) -> None:
        """Raise RetrievalError at the first damaged file of the store at folder `path`."""
        for damage in self.find_damage(path):
            place = path / damage.name
            raise RetrievalError(damage.reason, place=place, fix=DAMAGE_REMEDY)

    def check_model(self, model: Embedder, path: Path) -> None:
        """Raise RetrievalError unless `model` is the one that built the index at `path`.

        Models are compared by fingerprint: only vectors of the same model are comparable.
        """
        from vlduet.model.duet import DuetModel
        from vlduet.model.saving import compute_model_fingerprint

        fingerprint = model.fingerprint
        if fingerprint != self.fingerprint and isinstance(model, DuetModel):
            # An earlier version computed fingerprints of plain checkpoints in another way.
            fingerprint = compute_model_fingerprint(model, like=self.fingerprint)
        if fingerprint != self.fingerprint:
            builder = self.fingerprint + (f" ({self.model})" if self.model else "")
            message = f"built by model {builder}, this is model {fingerprint}"
            fix = (
                "Use that model (--model DIR), copy it again if a file of it is damaged, "
                "or build a new index (vlduet index ... --to DIR)"
            )
            raise RetrievalError(f"{message}: vectors differ", place=path, fix=fix)


class Index:
    """An open index. `Index.open` opens one for searching; `build_index` makes or extends one.

    It is a context manager that closes the index at the end.

    Args:
        path: folder of the index.
        manifest: content of its manifest.json.
        write: whether this process holds the lock of the index and may write.
    """

    def __init__(self, path: Path, manifest: IndexManifest, *, write: bool = False):
        # Here, not above: lancedb is slow to import, and reading a manifest does not need it.
        from vlduet.retrieval.stores.lance import LanceStore

        self.path, self.manifest = path, manifest
        self._manifest_state = _file_state(path / MANIFEST_FILENAME)
        self.store: VectorStore = LanceStore(path / STORE_FOLDER, dim=manifest.dim, write=write)
        self._checked_model: Embedder | None = None

    @classmethod
    def open(cls, path: Path | str, model: Embedder | None = None) -> Self:
        """Open an index for searching, also one whose last build was interrupted.

        Args:
            path: folder of the index.
            model: model to check against the one that built the index; None checks nothing yet.

        Raises:
            RetrievalError: no index, an unreadable or damaged one, or one that another model built.
        """
        path = Path(path)
        manifest = _read_verified_manifest(path)
        if model is not None:
            manifest.check_model(model, path)
        index = cls(path, manifest)
        index._checked_model = model
        return index

    search_vector = search_vector
    check_image_search = check_image_search

    @property
    def model_path(self) -> Path:
        """Existing folder of the model that built the index, at its old or its relative path.

        Raises RetrievalError if neither exists, or if the index was built without a model folder.
        """
        path = self._locate(self.manifest.model, self.manifest.model_relative)
        if path is None or not path.exists():
            message = f"its model {self.manifest.model or '(built from Python)'} is not there"
            name = describe_snapshot(Path(self.manifest.model or "")) or "DIR"
            raise RetrievalError(message, place=self.path, fix=f"Name the model: --model {name}")
        return path

    def row_image(self, row: IndexRow) -> ImageRef | None:
        """Return a reference to a row's image, whose file may be missing; None without image."""
        path = self._locate(row.image_path, row.relative_image_path)
        return None if path is None else ImageRef(path=path)

    def _locate(self, absolute: str | None, relative: str | None) -> Path | None:
        """Return the path `absolute`, or `relative` to the index folder if only that one exists.

        The latter is so after both were moved together. Returns None if `absolute` is None; a path
        that is returned may be missing.
        """
        if absolute is None:
            return None
        if relative is not None and not Path(absolute).exists():
            moved = self.path / relative
            if moved.exists():
                return moved
        return Path(absolute)

    def check_model(self, model: Embedder) -> None:
        """Raise RetrievalError unless `model` built this index; each model is checked once."""
        if self._checked_model is not model:  # a fingerprint hashes every trained weight
            self.manifest.check_model(model, self.path)
            self._checked_model = model

    def refresh(self) -> None:
        """Use what was written to the index since it was opened or refreshed.

        Nothing is read if the manifest's size, time of modification and inode are the same. A
        search that runs in another thread meanwhile ends on the version that it began with.

        Raises:
            RetrievalError: the index was rebuilt with another model, is gone, or cannot be read;
                this index stays as it was, and the next call tries again.
        """
        from vlduet.retrieval.stores.lance import LanceStore

        state = _file_state(self.path / MANIFEST_FILENAME)
        if state is not None and state == self._manifest_state:
            return
        manifest = IndexManifest.read(self.path)
        if (manifest.fingerprint, manifest.dim) != (self.manifest.fingerprint, self.manifest.dim):
            message = (
                f"rebuilt by model {manifest.fingerprint}, opened with {self.manifest.fingerprint}"
            )
            fix = "Start again with the new model"
            raise RetrievalError(f"{message}: vectors differ", place=self.path, fix=fix)
        # A store is opened anew: the folder may have been replaced by another one.
        self.store = LanceStore(self.path / STORE_FOLDER, dim=manifest.dim, write=False)
        self.manifest, self._manifest_state = manifest, state

    def get_row(self, document_id: str) -> IndexRow | None:
        """Return the stored row of a document, or None if the index lacks the id."""
        rows = self.store.read_rows([document_id])
        return rows[0] if rows else None

    def count(self) -> int:
        """Return the number of documents in the index."""
        return self.store.count()

    def close(self) -> None:
        """Close the store; an index that is open for writing is compacted first."""
        self.store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _read_verified_manifest(path: Path) -> IndexManifest:
    """Return the manifest of the index at folder `path` after its store was compared with it.

    A build that another process begins meanwhile may merge files: then the new manifest counts.
    Raises RetrievalError as `IndexManifest.read` and `IndexManifest.verify_files`.
    """
    manifest = IndexManifest.read(path)
    while manifest.find_damage(path):
        newer_manifest = IndexManifest.read(path)
        if newer_manifest == manifest:
            manifest.verify_files(path)
        manifest = newer_manifest
    return manifest


def find_index_damage(path: Path) -> tuple[list[str], int]:
    """Return a line for each damaged file of an index, and the number of files. All are read.

    These are the files of its store, and its images, whose names are their hashes. Raises
    RetrievalError as `IndexManifest.read`.
    """
    manifest = IndexManifest.read(path)
    images = path / IMAGE_FOLDER
    names = [name for name in list_files(images) if len(name) == 64]
    hashes = hash_files(images, names, reread=True)
    damage = manifest.find_damage(path, reread=True)
    for name, digest in hashes.items():
        if digest["sha256"] != name:
            damage.append(Damage(f"{IMAGE_FOLDER}/{name}", CHANGED))
    lines = [f"{path / name}: {reason}" for name, reason in damage]
    return lines, len(manifest.files) + len(hashes)


def path_pair(target: Path | None, folder: Path) -> tuple[str | None, str | None]:
    """Return the absolute path of `target` and its path relative to `folder`; Nones for None.

    Links are resolved; neither needs to exist. The relative path is in POSIX form, may begin with
    ``..``, and is None if both are on different drives.
    """
    if target is None:
        return None, None
    absolute = target.resolve()
    try:
        return str(absolute), Path(os.path.relpath(absolute, folder.resolve())).as_posix()
    except ValueError:  # another drive on Windows
        return str(absolute), None


def _file_state(path: Path) -> tuple[int, int, int] | None:
    """Return size, time of modification in nanoseconds and inode of a file; None if it is gone."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_size, status.st_mtime_ns, status.st_ino


def _utc_now() -> str:
    """Return the current time as ISO 8601 in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
