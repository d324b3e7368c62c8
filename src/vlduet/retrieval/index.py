"""An index: a folder with a manifest, a store of rows and vectors, and images that have no file of their own.

    INDEX/manifest.json      which model, prompts and image backend made it, from which source, and its size
          store/             LanceDB, or the flat store
          images/            images that came as bytes
          quarantine.jsonl   what the last build left out, and why

`build.build` writes one; everybody else reads.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal, Self

from vlduet.data.records import ImageRef
from vlduet.errors import RetrievalError
from vlduet.files import write_text_atomically
from vlduet.retrieval.documents import Side
from vlduet.retrieval.encode import Embedder
from vlduet.retrieval.stores.base import FlatStore, IndexRow, VectorStore

StoreKind = Literal["lance", "flat"]

MANIFEST_FORMAT = 1
MANIFEST_FILENAME = "manifest.json"


@dataclass(frozen=True, slots=True)
class IndexManifest:
    """What made an index, and what it holds."""

    format: int
    store: StoreKind
    side: Side
    dim: int
    fingerprint: str
    """The model's: weights, prompts and image backend."""
    image_backend: str
    model: str | None = None
    """Absolute path of the model, where it was loaded from one."""
    model_relative: str | None = None
    source: str = ""
    """What the last build read."""
    fields: Mapping[str, list[str]] = field(default_factory=dict)
    """Metadata keys that can be filtered by, and the kinds of their values."""
    count: int = 0
    complete: bool = False
    """False while a build is under way or after it was interrupted."""
    created: str = ""
    updated: str = ""
    vlduet: str = ""
    """Version of the software that wrote this."""

    @classmethod
    def for_new_index(cls, model: Embedder, *, store: StoreKind, side: Side) -> Self:
        """The manifest of an index that `model` is about to build."""
        return cls(
            format=MANIFEST_FORMAT,
            store=store,
            side=side,
            dim=model.dim,
            fingerprint=model.fingerprint,
            image_backend=model.image_backend,
            created=_now(),
        )

    @classmethod
    def read(cls, path: Path) -> Self:
        """The manifest of the index at `path`. Raises RetrievalError where there is none that can be read."""
        try:
            raw = json.loads((path / MANIFEST_FILENAME).read_text(encoding="utf-8"))
            if raw["format"] != MANIFEST_FORMAT:
                newer = f"in format {raw['format']} of vlduet {raw.get('vlduet')}, this version reads {MANIFEST_FORMAT}"
                raise RetrievalError(
                    newer, place=path, fix="Update vlduet, or build the index again"
                )
            return cls(**raw)
        except (FileNotFoundError, NotADirectoryError):
            fix = "Make one: vlduet index MODEL SOURCE --to INDEX"
            raise RetrievalError("no index here", place=path, fix=fix) from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            broken = f"broken manifest ({type(error).__name__}: {error})"
            fix = "Delete the index and build it again"
            raise RetrievalError(broken, place=path / MANIFEST_FILENAME, fix=fix) from None

    def write(self, path: Path) -> None:
        """Write it, whole or not at all."""
        told = asdict(replace(self, updated=_now(), vlduet=_version()))
        write_text_atomically(
            path / MANIFEST_FILENAME, json.dumps(told, indent=2, ensure_ascii=False) + "\n"
        )

    def check_model(self, model: Embedder, path: Path) -> None:
        """Raises RetrievalError unless `model` gives the vectors that the index at `path` holds."""
        theirs = model.fingerprint
        if theirs != self.fingerprint:
            built = self.fingerprint + (f" ({self.model})" if self.model else "")
            what = (
                f"built by model {built}, this is model {theirs}: their vectors cannot be compared"
            )
            fix = "Use that model (--model DIR), or build a new index with this one (vlduet index ... --to DIR)"
            raise RetrievalError(what, place=path, fix=fix)


class Index:
    """An open index. Use `Index.open` to search one and `build` to make or extend one.

    Args:
        path: the folder.
        manifest: what stands in it.
        write: whether this process holds the lock.
    """

    def __init__(self, path: Path, manifest: IndexManifest, *, write: bool = False):
        self.path, self.manifest = path, manifest
        self._checked: Embedder | None = None
        self.store = _open_store(manifest.store, path / "store", dim=manifest.dim, write=write)

    @classmethod
    def open(cls, path: Path | str, model: Embedder | None = None) -> Self:
        """Open an index for searching.

        Args:
            path: the folder.
            model: checked against the model that built the index.

        Raises:
            RetrievalError: no index, an unreadable one, or one of another model.
        """
        path = Path(path)
        manifest = IndexManifest.read(path)
        if model is not None:
            manifest.check_model(model, path)
        index = cls(path, manifest)
        index._checked = model
        return index

    @property
    def model_path(self) -> Path:
        """The folder of the model that built the index. Raises RetrievalError where it is gone."""
        found = self._locate(self.manifest.model, self.manifest.model_relative)
        if found is None or not found.exists():
            what = f"its model {self.manifest.model or '(built from Python)'} is not there"
            raise RetrievalError(what, place=self.path, fix="Name the model: --model DIR")
        return found

    def row_image(self, row: IndexRow) -> ImageRef | None:
        """The image of a row: at its absolute path, or beside the index where both moved."""
        found = self._locate(row.image_path, row.relative_image_path)
        return None if found is None else ImageRef(path=found)

    def _locate(self, absolute: str | None, relative: str | None) -> Path | None:
        if absolute is None:
            return None
        if relative is not None and not Path(absolute).exists():
            moved = self.path / relative
            if moved.exists():
                return moved
        return Path(absolute)

    def check_model(self, model: Embedder) -> None:
        """Raises RetrievalError unless `model` gives the vectors that this index holds."""
        if self._checked is not model:  # once: a fingerprint hashes every trained weight
            self.manifest.check_model(model, self.path)
            self._checked = model

    def count(self) -> int:
        """Documents in the index."""
        return self.store.count()

    def close(self) -> None:
        """Let go of files."""
        self.store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _open_store(name: StoreKind, folder: Path, *, dim: int, write: bool) -> VectorStore:
    if name == "flat":
        return FlatStore(folder, dim=dim, write=write)
    from vlduet.retrieval.stores.lance import LanceStore

    return LanceStore(folder, dim=dim, write=write)


def absolute_and_relative_path(target: Path | None, folder: Path) -> tuple[str | None, str | None]:
    """A path, absolute and as seen from `folder`."""
    if target is None:
        return None, None
    absolute = target.resolve()
    try:
        return str(absolute), Path(os.path.relpath(absolute, folder.resolve())).as_posix()
    except ValueError:  # another drive on Windows
        return str(absolute), None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _version() -> str:
    try:
        return version("vlduet")
    except PackageNotFoundError:
        return "unknown"
