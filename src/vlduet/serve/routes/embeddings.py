"""POST /v1/embeddings: texts, images and mixtures of both to vectors of unit length."""

from __future__ import annotations

import asyncio
import base64
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field, model_validator

from vlduet.errors import DataError
from vlduet.serve.inputs import INPUTS_DESCRIPTION, NESTING_REMEDY, Inputs, parse_inputs
from vlduet.serve.openapi import describe_body
from vlduet.serve.resources import Resources, json_response
from vlduet.serve.schemas import EmbeddingOptions, EmbeddingUsage, embedding_usage


class EmbeddingsBody(EmbeddingOptions):
    """Body of POST /v1/embeddings."""

    input: Inputs = Field(description=INPUTS_DESCRIPTION)
    input_type: (
        Literal["query", "document", "passage", "search_query", "search_document"] | None
    ) = Field(None, description="Side of a search: query or document, the default.")
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(None, description="Only the model's own number.")

    @model_validator(mode="before")
    @classmethod
    def read_messages(cls, values: Any) -> Any:
        """Move vLLM's `messages` to `input`; raise DataError unless it is one of the user."""
        if not isinstance(values, dict) or "messages" not in values or "input" in values:
            return values
        content = _read_single_message(values["messages"])
        others = {key: value for key, value in values.items() if key != "messages"}
        return others | {"input": [content]}

    @property
    def is_query(self) -> bool:
        """Whether the inputs are embedded as queries."""
        return self.input_type in ("query", "search_query")


class EmbeddingRow(BaseModel):
    """One vector of a response."""

    object: Literal["embedding"]
    index: int
    embedding: Annotated[
        list[float] | str, Field(description="Numbers, or base64 of little-endian float32.")
    ]


class EmbeddingsResponse(BaseModel):
    """Response of POST /v1/embeddings."""

    object: Literal["list"]
    model: str
    data: list[EmbeddingRow]
    usage: EmbeddingUsage
    truncated: int | None = Field(
        None, description="Number of inputs that were cut, where the request allows it."
    )


def make_router(resources: Resources) -> APIRouter:
    """Return the route of this file."""
    router = APIRouter()

    @router.post(
        "/v1/embeddings",
        response_model=EmbeddingsResponse,
        openapi_extra=describe_body(EmbeddingsBody),
        tags=["Embeddings"],
    )
    async def create_embeddings(request: Request) -> Response:
        """Return the unit vector of each input: a text, an image or a mixture of both."""
        body = await resources.read_body(request, EmbeddingsBody)
        dim = resources.worker.model.dim
        if body.dimensions not in (None, dim):
            message = f"{body.dimensions}: the model was trained for vectors of {dim} numbers only"
            raise DataError(message, place="dimensions", fix="Leave it out")
        truncate = resources.allows_truncation(body)
        load_url = resources.url_images(request).load
        items, places = await asyncio.to_thread(parse_inputs, body.input, load_url)
        result = await resources.embed(
            request, items, places, is_query=body.is_query, truncate=truncate
        )
        as_base64 = body.encoding_format == "base64"

        def format_response() -> dict[str, Any]:
            rows = format_vectors(result.vectors, as_base64=as_base64)
            usage = embedding_usage(result.num_tokens)
            cut = {"truncated": result.num_truncated} if truncate else {}
            return {"object": "list", "model": resources.name, "data": rows, "usage": usage} | cut

        return await json_response(format_response)

    return router


def format_vectors(vectors: np.ndarray, *, as_base64: bool) -> list[dict[str, Any]]:
    """Return embeddings float32[N, D] as the rows of a response.

    `as_base64` encodes each as base64 of little-endian float32 instead of a list of numbers.
    """
    rows = []
    for i, vector in enumerate(vectors):
        embedding = vector.tolist()
        if as_base64:
            embedding = base64.b64encode(vector.astype("<f4").tobytes()).decode()
        rows.append({"object": "embedding", "index": i, "embedding": embedding})
    return rows


def _read_single_message(messages: Any) -> Any:
    """Return the content of vLLM's `messages`, which must be one message of the user.

    Raises:
        DataError: another form.
    """
    is_single = isinstance(messages, list) and len(messages) == 1 and isinstance(messages[0], dict)
    if not is_single or messages[0].get("role") != "user" or "content" not in messages[0]:
        message = "only a single message of the user becomes a vector"
        raise DataError(message, place="messages", fix=NESTING_REMEDY)
    return messages[0]["content"]
