"""Search: the documents of an index that are nearest to a query, a vector, or another document."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vlduet.data.records import ImageRef, Message, Part
from vlduet.errors import RetrievalError, quote_value
from vlduet.retrieval.calibration import find_content_kind, judge_hits
from vlduet.retrieval.encode import Embedder
from vlduet.retrieval.filter_values import FILTER_VERSION
from vlduet.retrieval.filters import Condition, Where, parse_conditions
from vlduet.retrieval.stores.base import IndexRow, ScoredRow

if TYPE_CHECKING:
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
    """Position among all hits, from 1; the first one behind an offset has rank offset + 1."""
    p: float | None = None
    """Share of unrelated pairs of a query and a document whose cosine is at least `score`, as in
    `ScoreDistribution.share_at_least`; None without statistics of the model."""


@dataclass(frozen=True, slots=True)
class SearchOptions:
    """Which of the ranked documents a search returns, and how it finds them.

    Raises:
        RetrievalError: a threshold that is not between -1 and 1, or a negative offset.
    """

    threshold: float | None = None
    """Lowest score of a hit; None returns hits with any score."""
    offset: int = 0
    """Number of hits that are left out at the beginning, for further pages."""
    distinct: bool = False
    """Return only the best of several documents with identical content."""
    exact: bool = False
    """Compare every document, also if the index has an approximate search index."""

    def __post_init__(self) -> None:
        """Check the values; raise RetrievalError as the class says."""
        threshold = self.threshold
        if threshold is not None and not (math.isfinite(threshold) and -1 <= threshold <= 1):
            fix = "Scores are cosines: give a number from -1 to 1"
            raise RetrievalError(f"{threshold}", place="threshold", fix=fix)
        if self.offset < 0:
            raise RetrievalError(f"{self.offset}", place="offset", fix="Give 0 or more")


DEFAULT_OPTIONS = SearchOptions()


def search(
    index: Index,
    model: Embedder,
    query: Part | Iterable[Part] | Iterable[Message],
    *,
    k: int = 10,
    where: Where = None,
    options: SearchOptions = DEFAULT_OPTIONS,
) -> list[Hit]:
    """Return the `k` documents nearest to a query, best first, ties in the order of ids.

    Fewer hits are returned if fewer documents match; none if the index is empty, in which case
    `where` is not checked.

    Args:
        index: index to search.
        model: model that built the index; it embeds the query.
        query: a text, an image, any sequence of both, or a conversation, which is embedded where
            its last turn ends.
        k: number of hits.
        where: filter on metadata, see `filters.Where`.
        options: threshold, offset and further options.

    Raises:
        RetrievalError: an empty query or a blank text in it, `k` below 1, a model that did not
            build the index, or a filter that is malformed or on metadata that no document has.
        DataError: a query that cannot be embedded, such as a conversation by a dual encoder;
            ImageError for a broken image.
    """
    parts: Any = (query,) if isinstance(query, str | ImageRef) else tuple(query)
    if not parts or any(isinstance(part, str) and not part.strip() for part in parts):
        raise RetrievalError("an empty query", fix="Give a text, an image, or both")
    _check_k(k)
    index.check_model(model)
    vector = model.encode_query([parts])[0]  # [D]
    hits = search_vector(index, vector, k=k, where=where, options=options)
    kind, side = find_content_kind(parts), index.manifest.side
    return judge_hits(hits, model.score_statistics, query=kind, side=side)


def search_vector(
    index: Index,
    vector: np.ndarray,
    *,
    k: int = 10,
    where: Where = None,
    options: SearchOptions = DEFAULT_OPTIONS,
) -> list[Hit]:
    """Return the `k` documents nearest to an embedding, best first, ties in the order of ids.

    Several threads may call this at the same time on one open index; no model is used. The hits
    have no `p` (`calibration.judge_hits` adds it).

    Args:
        index: index to search.
        vector: embedding of unit length by the model of the index, float32[D].
        k: number of hits; fewer are returned if fewer documents match.
        where: filter on metadata, see `filters.Where`; not checked if the index is empty.
        options: threshold, offset and further options.

    Raises:
        RetrievalError: `k` below 1, a vector of another width or that is not finite, or a filter
            that is malformed or on metadata that no document has.
    """
    _check_k(k)
    vector = np.asarray(vector, dtype=np.float32)
    if vector.shape != (index.manifest.dim,) or not np.isfinite(vector).all():
        message = f"a vector of shape {list(vector.shape)}, or with values that are not finite"
        fix = f"Give {index.manifest.dim} numbers from the model of the index"
        raise RetrievalError(message, place="vector", fix=fix)
    rows = _find_rows(index, vector, k=k, where=where, options=options)
    return [
        Hit(row.id, score, row.text, index.row_image(row), row.metadata, rank)
        for rank, (row, score) in enumerate(rows, options.offset + 1)
    ]


def search_similar(
    index: Index,
    document_id: str,
    *,
    k: int = 10,
    where: Where = None,
    options: SearchOptions = DEFAULT_OPTIONS,
) -> list[Hit]:
    """Return the `k` documents nearest to a document of the index, without the document itself.

    With `options.distinct`, documents of identical content are left out as well. Arguments and
    errors are those of `search_vector`; an id that the index lacks is a RetrievalError.
    """
    _check_k(k)
    row = index.get_row(document_id)
    if row is None:
        message = f"no document {quote_value(document_id)}"
        fix = "Give the id of a document, as a search returns it"
        raise RetrievalError(message, place=index.path, fix=fix)
    vector = index.store.read_vectors([document_id])[0]  # [D]
    rows = _find_rows(index, vector, k=k, where=where, options=options, like=row)
    return [
        Hit(found.id, score, found.text, index.row_image(found), found.metadata, rank)
        for rank, (found, score) in enumerate(rows, options.offset + 1)
    ]


def _check_k(k: int) -> None:
    """Raise RetrievalError unless `k` is at least 1."""
    if k < 1:
        raise RetrievalError(f"{k} hits", place="k", fix="Ask for 1 or more")


def _find_rows(
    index: Index,
    vector: np.ndarray,
    *,
    k: int,
    where: Where,
    options: SearchOptions,
    like: IndexRow | None = None,
) -> list[ScoredRow]:
    """Return the rows of the hits `offset` to `offset` + `k`, best first.

    Args:
        index: index to search.
        vector: query of unit length, float32[D].
        k: number of rows; fewer are returned if fewer match.
        where: filter on metadata; not checked if the index is empty.
        options: options of the search.
        like: row that is left out, with `distinct` also every row of its content; or None.
    """
    if where and not index.count():
        return []  # an empty index knows no metadata key, so every filter would be an error
    conditions = _parse_where(index, where)
    num_wanted = options.offset + k
    limit = num_wanted + (like is not None)
    while True:
        (rows,) = index.store.search(
            vector[None], k=limit, conditions=conditions, exact=options.exact
        )
        selected = _select_rows(rows, options, like)
        is_below = options.threshold is not None and rows and rows[-1].score < options.threshold
        if len(selected) >= num_wanted or len(rows) < limit or is_below:
            return selected[options.offset : num_wanted]
        limit *= 4  # documents of identical content took places


def _parse_where(index: Index, where: Where) -> tuple[Condition, ...]:
    """Return the conditions of a filter; raise RetrievalError as `parse_conditions`.

    A key that an index of an earlier version cannot be filtered by is named as such.
    """
    try:
        return parse_conditions(where, index.manifest.fields)
    except RetrievalError as error:
        if where is None or index.manifest.filters >= FILTER_VERSION:
            raise
        fix = (
            "An earlier version built the index, without lists and dates: run `vlduet index` again"
        )
        raise RetrievalError(str(error), fix=fix) from error


def check_where(index: Index, where: Where) -> None:
    """Raise RetrievalError for a filter that is malformed or on metadata that no document has.

    An empty index knows no metadata: its filters are not checked.
    """
    if index.count():
        _parse_where(index, where)


def check_image_search(index: Index, where: Where) -> None:
    """Raise RetrievalError for an index of texts, and as `check_where`."""
    if index.manifest.side == "text":
        fix = "Use an index with images, built without --side text"
        raise RetrievalError("the index has texts and no images", place=index.path, fix=fix)
    check_where(index, where)


def _select_rows(
    rows: Sequence[ScoredRow], options: SearchOptions, like: IndexRow | None
) -> list[ScoredRow]:
    """Return the ranked rows that the threshold, `distinct` and `like` leave; see `_find_rows`."""
    seen_contents: set[str] = set()
    if like is not None and options.distinct:
        seen_contents.add(like.hashes.content_hash)
    selected = []
    for scored in rows:
        if options.threshold is not None and scored.score < options.threshold:
            break  # rows come in the order of their scores
        if like is not None and scored.row.id == like.id:
            continue
        content = scored.row.hashes.content_hash
        if options.distinct and content in seen_contents:
            continue
        seen_contents.add(content)
        selected.append(scored)
    return selected
