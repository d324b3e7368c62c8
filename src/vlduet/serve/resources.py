"""Resources of the endpoints: the worker, the index, and how a request is read and embedded.

Nothing here blocks the event loop: bodies are parsed, and the index is searched, in threads.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import numpy as np
from fastapi import HTTPException, Request, Response
from pydantic import ValidationError

from vlduet.data.records import ImageRef
from vlduet.errors import DataError, ModelError, RetrievalError
from vlduet.model.embedding import Embeddable
from vlduet.model.limits import TRUNCATION_REMEDY
from vlduet.retrieval.calibration import find_content_kind, judge_hits
from vlduet.retrieval.filters import Where
from vlduet.retrieval.index import Index
from vlduet.retrieval.search import DEFAULT_OPTIONS, Hit, SearchOptions, search_vector
from vlduet.serve.asgi import CLIENT_CLOSED_REQUEST
from vlduet.serve.content import UrlLoader
from vlduet.serve.embedding_jobs import EmbeddingResult
from vlduet.serve.fields import check_fields
from vlduet.serve.index_images import UrlImages, format_image_url
from vlduet.serve.schemas import EmbeddingOptions, RequestBody
from vlduet.serve.validation import describe_validation_error
from vlduet.serve.worker import Worker

logger = logging.getLogger("uvicorn.error")

DISCONNECT_POLL_SECONDS = 1.0
"""Interval at which a waiting request checks whether its client is still connected."""
MAX_JSON_DELIMITERS = 500_000
"""Number of commas and opening brackets in a body. Python decodes JSON without a pause for other
threads: a body of 64 MiB that consists of them would stop the server for seconds."""

Body = TypeVar("Body", bound=RequestBody)
T = TypeVar("T")


class Resources:
    """Model and index that the endpoints use.

    Args:
        worker: worker that owns the model.
        name: name under which clients know the model.
        index: index to search; must be built by the same model.
        strict: whether fields of requests that this server does not know are always refused.
        load_url: function for images at http(s) URLs of other servers; None refuses them.
    """

    def __init__(
        self,
        worker: Worker,
        *,
        name: str,
        index: Index | None = None,
        strict: bool = False,
        load_url: UrlLoader | None = None,
    ):
        self.worker, self.name, self.strict = worker, name, strict
        self._load_url, self._index = load_url, index
        self._refresh_lock = threading.Lock()
        self.created = int(time.time())

    # ------------------------------------------------------------------ requests

    async def read_body(self, request: Request, schema: type[Body]) -> Body:
        """Return the validated JSON body of a request; top-level null values count as missing.

        Raises:
            HTTPException: another content type (415), another model than the one that is served
                (404), or a client that disconnects (499). `limits.BodyLimitMiddleware` raises
                others for bodies that are too large or too slow.
            DataError: not JSON, no object, or a field that is missing, invalid or not served.
        """
        # A web page can send other content types without the permission of the server (CORS).
        content_type = request.headers.get("content-type", "")
        if content_type.partition(";")[0].strip().lower() != "application/json":
            raise HTTPException(415, "Send Content-Type: application/json")
        data = bytearray()
        has_more = True
        while has_more:
            event = await request.receive()
            if event["type"] == "http.disconnect":
                raise HTTPException(CLIENT_CLOSED_REQUEST, "The client disconnected")
            data += event.get("body", b"")
            has_more = event.get("more_body", False)
        body = await asyncio.to_thread(self._parse_body, data, schema)
        if body.model is not None:
            self.check_model_name(body.model)
        return body

    def _parse_body(self, data: bytearray, schema: type[Body]) -> Body:
        """Return the body of a request from its bytes; raises DataError as `read_body`."""
        if sum(map(data.count, (b",", b"[", b"{"))) > MAX_JSON_DELIMITERS:
            message = f"the body has more than {MAX_JSON_DELIMITERS} commas and brackets"
            raise DataError(message, fix="Send fewer inputs in one request")
        try:
            values = json.loads(data, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise DataError(f"the body is not JSON ({error})", fix="Send {...}") from None
        if not isinstance(values, dict):
            raise DataError("the body is not a JSON object", fix="Send {...}")
        values = {key: value for key, value in values.items() if value is not None}
        try:
            body = schema.model_validate(values)
        except ValidationError as error:
            raise describe_validation_error(error, values) from None
        check_fields(body, strict=self.strict)
        return body

    def check_model_name(self, name: str) -> None:
        """Raise HTTPException 404 unless `name` is the model that is served."""
        if name != self.name:
            text = f"The model {name!a:.80} is not served here, '{self.name}' is"
            raise HTTPException(404, text)

    # ------------------------------------------------------------------ model

    @property
    def temperature(self) -> float:
        """Divisor of cosines with which the model was trained."""
        return float(np.exp(-self.worker.model.logit_scale.item()))

    async def embed(
        self,
        request: Request,
        items: Sequence[Embeddable],
        places: Sequence[str],
        *,
        is_query: bool,
        truncate: bool = False,
    ) -> EmbeddingResult:
        """Return the embeddings of a request's items, made by the worker.

        Args:
            request: request that waits; if its client disconnects, the items are dropped.
            items: contents to embed.
            places: path of each item in the body, for errors.
            is_query: embed the items as queries, else as documents.
            truncate: cut texts that are too long, instead of raising DataError.

        Raises:
            DataError: an item that cannot be embedded, at its place.
            ModelError: a vector that is not finite.
            ServerBusyError: too many requests wait.
            HTTPException: 499 if the client disconnects.
        """
        future = self.worker.submit_embedding(items, is_query=is_query, truncate=truncate)
        try:
            return await await_while_connected(request, asyncio.wrap_future(future))
        except (DataError, ModelError) as error:
            numbered = {f"input[{i}]": place for i, place in enumerate(places)}
            place = numbered.get(str(error.place), error.place)
            fix = error.fix
            if fix == TRUNCATION_REMEDY:
                fix = "Send less, or cut texts with truncate: true"
            raise type(error)(error.message, place=place, fix=fix) from error

    def allows_truncation(self, body: EmbeddingOptions) -> bool:
        """Return whether a request allows its texts to be cut to the model's limit."""
        return body.allows_truncation(self.worker.max_tokens)

    # ------------------------------------------------------------------ index

    def require_index(self) -> Index:
        """Return the index; raise DataError if the server has none."""
        if self._index is None:
            raise DataError("no index is served", fix="Start the server with --index INDEX")
        return self._index

    async def query_index(self, function: Callable[[Index], T]) -> T:
        """Return `function(index)`, run in a thread by `read_index`; raises as it does."""
        self.require_index()
        return await asyncio.to_thread(self.read_index, function)

    def read_index(self, function: Callable[[Index], T]) -> T:
        """Return `function(index)` after the index was refreshed; for any thread that may block.

        Raises:
            DataError: the server has no index.
            HTTPException: 503 if the index was rebuilt by another model or cannot be read.
        """
        index = self.require_index()
        try:
            # Only one thread reads an update, and none puts an older state in its place.
            with self._refresh_lock:
                index.refresh()
        except RetrievalError as error:
            logger.error("the served index cannot be used any more: %s", error)
            text = "The index was changed so that this model cannot search it: it was rebuilt "
            text += "with another model, or is gone. The server must be started again"
            raise HTTPException(503, text) from None
        return function(index)

    def url_images(self, request: Request) -> UrlImages:
        """Return the images that a request may name by URL."""
        host = request.headers.get("host", "")
        return UrlImages(host, self.read_index, self._load_url)

    async def search(
        self,
        query: Embeddable,
        vector: np.ndarray,
        *,
        k: int,
        where: Where = None,
        options: SearchOptions = DEFAULT_OPTIONS,
    ) -> list[Hit]:
        """Return the hits of a query with the embedding `vector`, float32[D], in a thread.

        They have their `p` if the model has statistics of scores. Arguments and errors are those of
        `search_vector` and `query_index`.
        """
        statistics = self.worker.model.score_statistics
        kind = find_content_kind([query] if isinstance(query, str | ImageRef) else query)

        def find_hits(index: Index) -> list[Hit]:
            hits = search_vector(index, vector, k=k, where=where, options=options)
            return judge_hits(hits, statistics, query=kind, side=index.manifest.side)

        return await self.query_index(find_hits)


def format_hits(hits: Sequence[Hit]) -> list[dict[str, Any]]:
    """Return hits as JSON objects of rank, score, id, text and metadata, in order.

    A hit with an image has its URL on this server as `image`: paths of the server's files stay
    private. A hit whose id no URL can contain has none (`format_image_url`). NaN and infinities in
    metadata, which Python's JSON can spell and JSON cannot, become null.
    """
    rows = []
    for hit in hits:
        metadata = json.dumps(dict(hit.metadata))
        row = {"rank": hit.rank, "score": hit.score, "id": hit.id, "text": hit.text}
        row["metadata"] = json.loads(metadata, parse_constant=lambda _: None)
        url = None if hit.image is None else format_image_url(hit.id)
        if url is not None:
            row["image"] = url
        if hit.p is not None:
            row["p"] = hit.p
        rows.append(row)
    return rows


async def json_response(function: Callable[[], dict[str, Any]]) -> Response:
    """Return a response with the JSON of `function()`; both are computed in a thread."""

    def encode() -> bytes:
        return json.dumps(function(), allow_nan=False).encode()

    return Response(await asyncio.to_thread(encode), media_type="application/json")


async def await_while_connected(request: Request, awaitable: Awaitable[T]) -> T:
    """Return the result of `awaitable`; cancel it if the client disconnects or the caller ends.

    A disconnection is noticed within DISCONNECT_POLL_SECONDS and raises HTTPException with status
    499. Errors of `awaitable` propagate.
    """
    task = asyncio.ensure_future(awaitable)
    try:
        while not task.done():
            await asyncio.wait({task}, timeout=DISCONNECT_POLL_SECONDS)
            if not task.done() and await request.is_disconnected():
                raise HTTPException(CLIENT_CLOSED_REQUEST, "The client disconnected")
        return task.result()
    finally:
        task.cancel()


def _refuse_constant(name: str) -> None:
    """Raise ValueError for NaN and infinities, which Python's decoder accepts as numbers."""
    raise ValueError(f"{name} is no JSON")
