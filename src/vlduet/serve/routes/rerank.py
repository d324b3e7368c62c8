"""POST /v1/rerank: documents in the order of their similarity to a query.

Requests and responses are those of Cohere and Jina. A score is the cosine of query and document.
"""

from __future__ import annotations

import asyncio
import uuid
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, BeforeValidator, Field

from vlduet.data.records import Parts
from vlduet.serve.content import MAX_REQUEST_PARTS, UrlLoader, check_number_of_parts
from vlduet.serve.inputs import Embeddable, EmbeddableObject, parse_embeddable
from vlduet.serve.openapi import describe_body
from vlduet.serve.resources import Resources, json_response
from vlduet.serve.schemas import MAX_INPUTS, EmbeddingOptions, EmbeddingUsage, embedding_usage


def _check_documents(values: Any) -> Any:
    """Return the value of `documents` unchanged; raise DataError for too many parts."""
    if isinstance(values, list):
        check_number_of_parts(values, "documents", limit=MAX_REQUEST_PARTS)
    return values


class RerankBody(EmbeddingOptions):
    """Body of POST /v1/rerank."""

    query: Embeddable
    documents: Annotated[
        list[Embeddable],
        Field(min_length=1, max_length=MAX_INPUTS),
        BeforeValidator(_check_documents),
    ]
    top_n: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Number of best documents to return; all if absent."
    )
    return_documents: bool | None = Field(
        None,
        description="Whether results contain their documents; if absent, those that are texts.",
    )

    def parse_items(self, load_url: UrlLoader) -> tuple[Parts, list[Parts]]:
        """Return the query and the documents as contents to embed.

        Raises DataError for one that cannot be embedded.
        """
        query = parse_embeddable(self.query, "query", load_url)
        documents = [
            parse_embeddable(document, f"documents[{i}]", load_url)
            for i, document in enumerate(self.documents)
        ]
        return query, documents

    def format_document(self, index: int) -> dict[str, Any]:
        """Return the field `document` of a result, or no field."""
        document = self.documents[index]
        if self.return_documents is False:
            return {}
        if isinstance(document, str):
            return {"document": {"text": document}}
        if isinstance(document, EmbeddableObject):
            is_text = document.image is None
            if is_text or self.return_documents:
                return {"document": document.model_dump(exclude_none=True)}
        elif self.return_documents:
            return {"document": {"content": [part.model_dump() for part in document]}}
        return {}


class RerankResult(BaseModel):
    """One document of a response."""

    index: int = Field(description="Position of the document in the request.")
    relevance_score: float
    document: dict[str, Any] | None = None


class RerankResponse(BaseModel):
    """Response of POST /v1/rerank; results are in the order of their scores."""

    id: str
    object: Literal["list"]
    model: str
    results: list[RerankResult]
    usage: EmbeddingUsage
    meta: dict[str, Any] = Field(description="The same counts in Cohere's form.")
    truncated: int | None = Field(None, description="Number of texts that were cut.")


def make_router(resources: Resources) -> APIRouter:
    """Return the routes of this file: one function at the paths of two versions of Cohere."""
    router = APIRouter(tags=["Rerank"])

    async def rerank_documents(request: Request) -> Response:
        """Return documents in the order of their similarity to a query, best first."""
        body = await resources.read_body(request, RerankBody)
        truncate = resources.allows_truncation(body)
        load_url = resources.url_images(request).load
        query, documents = await asyncio.to_thread(body.parse_items, load_url)
        found = await resources.embed(request, [query], ["query"], is_query=True, truncate=truncate)
        places = [f"documents[{i}]" for i in range(len(documents))]
        embedded = await resources.embed(
            request, documents, places, is_query=False, truncate=truncate
        )
        num_tokens = found.num_tokens + embedded.num_tokens
        num_truncated = found.num_truncated + embedded.num_truncated
        common: dict[str, Any] = {
            "id": f"rerank-{uuid.uuid4().hex}",
            "object": "list",
            "model": resources.name,
            "usage": embedding_usage(num_tokens),
            "meta": {
                "api_version": {"version": "2"},
                "billed_units": {"search_units": 1},
                "tokens": {"input_tokens": num_tokens, "output_tokens": 0},
            },
        }
        if truncate:
            common["truncated"] = num_truncated

        def format_response() -> dict[str, Any]:
            scores = np.round(embedded.vectors @ found.vectors[0], 6)
            results = [
                {"index": i, "relevance_score": round(float(scores[i]), 6)}
                | body.format_document(i)
                for i in rank_scores(scores)[: body.top_n]
            ]
            return common | {"results": results}

        return await json_response(format_response)

    for path in ("/v1/rerank", "/v2/rerank"):
        router.add_api_route(
            path,
            rerank_documents,
            methods=["POST"],
            response_model=RerankResponse,
            openapi_extra=describe_body(RerankBody),
        )
    return router


def rank_scores(scores: np.ndarray) -> list[int]:
    """Return the positions of scores float[N], the highest first, ties in their order."""
    return [int(i) for i in np.argsort(-scores, kind="stable")]
