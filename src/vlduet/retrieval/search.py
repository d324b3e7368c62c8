"""Search: the documents of an index that are nearest to a text, an image, or a mixture of both."""

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
    """One document that a search returned."""

    id: str
    score: float
    """Cosine to the query, rounded to six decimals."""
    text: str
    image: ImageRef | None
    metadata: Mapping[str, Any]
    rank: int
    """Position among the hits, from 1."""


def search(
    index: Index, model: Embedder, query: Part | Parts, *, k: int = 10, where: Where = None
) -> list[Hit]:
    """Return the `k` documents nearest to a query, best first, ties in the order of ids.

    Fewer hits are returned if fewer documents match; none if the index is empty, in which case
    `where` is not checked.

    Args:
        index: index to search.
        model: model that built the index; it embeds the query.
        query: a text, an image, or a tuple of both.
        k: number of hits.
        where: filter on metadata, see `filters.Where`.

    Raises:
        RetrievalError: an empty query or a blank text in it, `k` below 1, a model that did not
            build the index, or a filter that is malformed or on metadata that no document has.
        DataError: a query that cannot be embedded; ImageError for a broken image.
    """
    parts = (query,) if isinstance(query, str | ImageRef) else tuple(query)
    if not parts or any(isinstance(part, str) and not part.strip() for part in parts):
        raise RetrievalError("an empty query", fix="Give a text, an image, or both")
    if k < 1:
        raise RetrievalError(f"{k} hits", place="k", fix="Ask for 1 or more")
    index.check_model(model)
    if where and not index.count():
        return []  # an empty index knows no metadata key, so every filter would be an error
    conditions = parse_conditions(where, index.manifest.fields)
    query_vectors = model.encode_query([parts])  # [1, D]
    (scored_rows,) = index.store.search(query_vectors, k=k, conditions=conditions)
    return [
        Hit(row.id, score, row.text, index.row_image(row), row.metadata, rank)
        for rank, (row, score) in enumerate(scored_rows, 1)
    ]
