"""From documents to vectors: in chunks, with broken items named and left out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from vlduet.data.quarantine import bisect_failures
from vlduet.data.records import Part, Parts
from vlduet.errors import DataError, RetrievalError
from vlduet.files import write_atomically
from vlduet.retrieval.documents import Document

T = TypeVar("T")

EncodingErrorCallback = Callable[[Document, DataError], object]
"""Told of every document that could not be embedded, and why."""

DOCUMENTS_PER_CHUNK = 256
"""Documents that are embedded, and committed to an index, at a time."""


class Embedder(Protocol):
    """What retrieval needs of a model; `DuetModel` and `DualEncoder` are such."""

    @property
    def fingerprint(self) -> str:
        """Names everything that decides an embedding."""

    @property
    def image_backend(self) -> str:
        """The library that decodes and resizes images."""

    @property
    def dim(self) -> int:
        """D, the width of the vectors."""

    def encode_query(self, items: Sequence[Part | Parts]) -> np.ndarray:
        """float32[N, D] unit vectors of what is asked."""

    def encode_document(self, items: Sequence[Part | Parts]) -> np.ndarray:
        """float32[N, D] unit vectors of what is searched."""


def encode_documents(
    model: Embedder,
    documents: Iterable[Document],
    *,
    on_error: EncodingErrorCallback,
    chunk_size: int = DOCUMENTS_PER_CHUNK,
) -> Iterator[tuple[list[Document], np.ndarray]]:
    """Embed documents, lazily.

    Args:
        model: embeds.
        documents: what is embedded, read as it is needed.
        on_error: told of every document that the model cannot embed (a broken image); the rest goes on.
        chunk: documents that are embedded at a time.

    Yields:
        (documents, float32[N, D] of unit length), in order; N may be smaller than `chunk`, never 0.

    Raises:
        RetrievalError: vectors that are not finite.
    """

    def encode(group: list[Document]) -> np.ndarray:
        return check_vectors(model.encode_document([document.parts for document in group]), group)

    for group in batched(documents, chunk_size):
        found = zip(group, bisect_failures(encode, group, on_error=on_error), strict=True)
        kept = [(document, vector) for document, vector in found if vector is not None]
        if kept:
            yield [document for document, _ in kept], np.stack([vector for _, vector in kept])


def check_vectors(vectors: np.ndarray, documents: Sequence[Document]) -> np.ndarray:
    """The vectors, if they are finite: a NaN in an index would win or lose every search."""
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if bad.size:
        fix = "The model's weights or its precision are broken: try another checkpoint"
        raise RetrievalError(
            f"the model gave a vector that is not finite for '{documents[bad[0]].id}'", fix=fix
        )
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-3), "embeddings have unit length"
    return vectors.astype(np.float32, copy=False)


def write_vectors(path: Path, *, ids: Sequence[str], vectors: np.ndarray) -> None:
    """Write ``ids`` (str[N]) and ``vectors`` (float32[N, D], unit length) as ``.npz``, whole or not at all.

    Raises:
        RetrievalError: the file cannot be written.
    """
    arrays: dict[str, Any] = {
        "ids": np.array(ids, dtype=np.str_),
        "vectors": vectors.astype(np.float32, copy=False),
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: np.savez(file, **arrays))
    except OSError as error:
        raise RetrievalError(
            f"cannot be written ({error.strerror})", place=path, fix="Choose another --out"
        ) from error


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of up to `size`, as the items come."""
    source = iter(items)
    while group := list(islice(source, size)):
        yield group
