"""POST /v1/search: the documents of the index that are nearest to a query or to a document."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field

from vlduet.errors import DataError, quote_value
from vlduet.retrieval.index import Index
from vlduet.retrieval.search import Hit, SearchOptions, search_similar
from vlduet.serve.inputs import Embeddable, parse_embeddable
from vlduet.serve.openapi import describe_body
from vlduet.serve.resources import Resources, format_hits, json_response
from vlduet.serve.schemas import EmbeddingOptions, EmbeddingUsage, Where, embedding_usage

MAX_OFFSET = 100_000


class SearchBody(EmbeddingOptions):
    """Body of POST /v1/search, with either `query` or `like`."""

    query: Embeddable | None = Field(
        None,
        description="A text, or a list of content parts. A text that is a data: URL of an image is "
        "the image.",
    )
    like: str | None = Field(None, description="Id of a document: find others that are like it.")
    k: Annotated[int, Field(ge=1, le=1000)] | None = Field(None, description="Hits; 10 if absent.")
    where: Where | None = Field(None, description="Filter on metadata.")
    threshold: Annotated[float, Field(ge=-1, le=1)] | None = Field(
        None, description="Lowest score of a hit."
    )
    offset: Annotated[int, Field(ge=0, le=MAX_OFFSET)] | None = Field(
        None, description="Number of best hits to leave out, for further pages."
    )
    distinct: bool | None = Field(None, description="Return identical documents once.")
    exact: bool | None = Field(None, description="Compare every document of a large index.")

    def search_options(self) -> SearchOptions:
        """Return the options of the search."""
        return SearchOptions(
            self.threshold, self.offset or 0, bool(self.distinct), bool(self.exact)
        )


class SearchHit(BaseModel):
    """Document that a search found."""

    rank: int
    score: float = Field(description="Cosine of query and document.")
    id: str
    text: str
    metadata: dict[str, Any]
    image: str | None = Field(None, description="Path of the image on this server.")
    p: float | None = Field(None, description="Share of unrelated pairs with such a score.")


class SearchResponse(BaseModel):
    """Response of POST /v1/search; hits are in the order of their ranks."""

    object: Literal["list"]
    model: str
    data: list[SearchHit]
    usage: EmbeddingUsage
    truncated: int | None = Field(None, description="1 if the query was cut.")


def make_router(resources: Resources) -> APIRouter:
    """Return the route of this file."""
    router = APIRouter()

    @router.post(
        "/v1/search",
        response_model=SearchResponse,
        openapi_extra=describe_body(SearchBody),
        tags=["Search"],
    )
    async def search_index(request: Request) -> Response:
        """Return the documents of the index that are nearest to a query, best first."""
        body = await resources.read_body(request, SearchBody)
        resources.require_index()
        if (body.query is None) == (body.like is None):
            message = "a search needs either a query or the id of a document (like)"
            raise DataError(message, place="query", fix="Send one of them")
        usage, cut = embedding_usage(0), {}
        if body.like is not None:
            hits = await _search_like(resources, body, body.like)
        else:
            truncate = resources.allows_truncation(body)
            load_url = resources.url_images(request).load
            query = await asyncio.to_thread(parse_embeddable, body.query, "query", load_url)
            result = await resources.embed(
                request, [query], ["query"], is_query=True, truncate=truncate
            )
            usage = embedding_usage(result.num_tokens)
            cut = {"truncated": result.num_truncated} if truncate else {}
            k, where, options = body.k or 10, body.where, body.search_options()
            hits = await resources.search(
                query, result.vectors[0], k=k, where=where, options=options
            )
        common = {"object": "list", "model": resources.name, "usage": usage, **cut}
        return await json_response(lambda: common | {"data": format_hits(hits)})

    return router


async def _search_like(resources: Resources, body: SearchBody, document_id: str) -> list[Hit]:
    """Return the documents that are nearest to a document of the index.

    Raises DataError for an id that the index lacks, and as `search_similar`.
    """
    k, where, options = body.k or 10, body.where, body.search_options()

    def search_documents(index: Index) -> list[Hit]:
        if index.get_row(document_id) is None:
            message = f"the index has no document {quote_value(document_id)}"
            raise DataError(message, place="like", fix="Send the id of a hit")
        return search_similar(index, document_id, k=k, where=where, options=options)

    return await resources.query_index(search_documents)
