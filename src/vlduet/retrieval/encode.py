"""Embedding of documents: in chunks, with items that cannot be embedded reported and left out."""

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
from vlduet.model.limits import TruncationCallback
from vlduet.model.score_statistics import ScoreStatistics
from vlduet.retrieval.documents import Document

T = TypeVar("T")

CutDocumentCallback = Callable[[Document, int], object]
"""Function called with every document that was cut, and its number of tokens before."""

EncodingErrorCallback = Callable[[Document, DataError], object]
"""Function called with every document that could not be embedded, and the reason."""

DOCUMENTS_PER_CHUNK = 256
"""Number of documents that are embedded, and committed to an index, at a time."""


class Embedder(Protocol):
    """Model that embeds queries and documents; `DuetModel` and `DualEncoder` implement it."""

    @property
    def fingerprint(self) -> str:
        """Identifier of everything that determines an embedding: weights, prompts and so on."""

    @property
    def image_backend(self) -> str:
        """Name of the library that decodes and resizes images."""

    @property
    def dim(self) -> int:
        """Width D of the embeddings."""

    @property
    def score_statistics(self) -> ScoreStatistics | None:
        """Scores of unrelated contents; None if they are not known."""

    @property
    def max_text_tokens(self) -> int:
        """Longest text in tokens that is embedded without being cut; very large without a limit."""

    def encode_query(
        self, items: Sequence[Part | Parts], *, on_truncate: TruncationCallback | None = None
    ) -> np.ndarray:
        """Return the embeddings of N queries, float32[N, D] of unit length.

        With None as `on_truncate`, an item that is longer than the model's limit raises DataError;
        otherwise it is cut, and `on_truncate` is called.
        """

    def encode_document(
        self, items: Sequence[Part | Parts], *, on_truncate: TruncationCallback | None = None
    ) -> np.ndarray:
        """Return the embeddings of N documents, as `encode_query` does for queries."""


def encode_documents(
    model: Embedder,
    documents: Iterable[Document],
    *,
    on_error: EncodingErrorCallback,
    on_truncate: CutDocumentCallback | None = None,
    chunk_size: int = DOCUMENTS_PER_CHUNK,
) -> Iterator[tuple[list[Document], np.ndarray]]:
    """Embed documents lazily, chunk by chunk, in order.

    Args:
        model: model that embeds.
        documents: documents to embed, consumed as chunks are requested.
        on_error: called with every document for which the model raises DataError (a broken image,
            a text beyond the model's limit), which is left out.
        on_truncate: allows texts to be cut to the model's limit, and is called with every document
            that is cut, once. None refuses such documents.
        chunk_size: number of documents that are embedded at a time.

    Yields:
        The documents of one chunk that could be embedded, at least one, and their embeddings,
        float32[N, D] of unit length. Nothing for a chunk without any.

    Raises:
        RetrievalError: the model returned embeddings that are not finite.
        AssertionError: the model returned embeddings that are not of unit length.
    """

    def encode(chunk: list[Document]) -> np.ndarray:
        cut: list[tuple[Document, int]] = []

        def note(position: int, num_tokens: int) -> None:
            cut.append((chunk[position], num_tokens))

        parts = [document.parts for document in chunk]
        vectors = model.encode_document(parts, on_truncate=note if on_truncate else None)
        if on_truncate:
            # Only now: a chunk that raises is embedded again in halves.
            for document, num_tokens in cut:
                on_truncate(document, num_tokens)
        return check_vectors(vectors, chunk)

    for chunk in batched(documents, chunk_size):
        vectors = bisect_failures(encode, chunk, on_error=on_error)
        encoded = [document for document, v in zip(chunk, vectors, strict=True) if v is not None]
        if encoded:
            yield encoded, np.stack([vector for vector in vectors if vector is not None])


def check_vectors(vectors: np.ndarray, documents: Sequence[Document]) -> np.ndarray:
    """Return embeddings float[N, D] as float32 after checking that they are finite unit vectors.

    An array of float32 is returned itself. Raises RetrievalError that names the first document with
    a value that is not finite, since a NaN in an index would win or lose every search, and
    AssertionError for a vector that is not of unit length.
    """
    bad_rows = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if bad_rows.size:
        message = f"the model gave a vector that is not finite for '{documents[bad_rows[0]].id}'"
        fix = "The model's weights or its precision are broken: try another checkpoint"
        raise RetrievalError(message, fix=fix)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-3), "not of unit length"
    return vectors.astype(np.float32, copy=False)


def write_vectors(path: Path, *, ids: Sequence[str], vectors: np.ndarray) -> None:
    """Write ``ids`` (str[N]) and ``vectors`` (float32[N, D]) to an ``.npz`` file, atomically.

    A missing folder is created, an existing file replaced. Raises RetrievalError if the file cannot
    be written; an existing file is then left as it was.
    """
    arrays: dict[str, Any] = {
        "ids": np.array(ids, dtype=np.str_),
        "vectors": vectors.astype(np.float32, copy=False),
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: np.savez(file, **arrays))
    except OSError as error:
        message = f"cannot be written ({error.strerror})"
        raise RetrievalError(message, place=path, fix="Choose another --out") from error


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield lists of `size` consecutive items lazily; the last list may be shorter, never empty."""
    source = iter(items)
    while batch := list(islice(source, size)):
        yield batch
