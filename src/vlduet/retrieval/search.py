"""Search: a text, an image or a mixture of them -> ranked hits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vlduet.data.records import ImageRef, Part, Parts
from vlduet.errors import RetrievalError
from vlduet.retrieval.encode import Embedder
from vlduet.retrieval.filters import Where, parse_conditions
from vlduet.retrieval.index import Index


@dataclass(frozen=True, slots=True)
class Hit:
    """One found document."""

    id: str
    score: float
    """Cosine to the query, rounded to six decimals."""
    text: str
    image: ImageRef | None
    metadata: Mapping[str, Any]
    rank: int
    """From 1."""


def search(
    index: Index, model: Embedder, query: Part | Parts, *, k: int = 10, where: Where = None
) -> list[Hit]:
    """The k documents nearest to a query, best first; ties by id; all of them where there are fewer.

    Args:
        index: what is searched.
        model: the model that built it.
        query: a text, an image, or a tuple of both.
        k: hits wanted.
        where: a filter on metadata, see `filters.Where`.

    Raises:
        RetrievalError: an empty query, a k below 1, another model, a filter on metadata that no document has.
        DataError, ImageError: a query that cannot be embedded.
    """
    parts = (query,) if isinstance(query, str | ImageRef) else tuple(query)
    if not parts or any(isinstance(part, str) and not part.strip() for part in parts):
        raise RetrievalError("an empty query", fix="Give a text, an image, or both")
    if k < 1:
        raise RetrievalError(f"{k} hits", place="k", fix="Ask for 1 or more")
    index.check_model(model)
    if where and not index.count():
        return []  # an index that holds nothing knows no key either
    wanted = parse_conditions(where, index.manifest.fields)
    (found,) = index.store.search(model.encode_query([parts]), k=k, conditions=wanted)
    return [
        Hit(row.id, score, row.text, index.row_image(row), row.metadata, rank)
        for rank, (row, score) in enumerate(found, 1)
    ]
