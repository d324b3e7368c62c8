"""HTTP application: requests become work for the one worker, and its results become responses.

GET  /health
GET  /v1/models, /v1/models/NAME
POST /v1/embeddings
POST /v1/chat/completions     streamed if `stream` is true; answered from the index if `retrieval`
                              is given
POST /v1/search               available if an index is served
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, TypeVar

from pydantic import ValidationError

from vlduet.errors import DataError, MissingExtraError, ModelError, VLDuetError
from vlduet.model.generation.continuous import Delta
from vlduet.retrieval.index import Index
from vlduet.retrieval.rag import prepare_prompt
from vlduet.retrieval.search import Hit, search
from vlduet.serve import schemas
from vlduet.serve.auth import ApiKeyMiddleware
from vlduet.serve.scheduler import ChatRequest
from vlduet.serve.worker import ServerBusyError, Worker

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import JSONResponse, Response, StreamingResponse
    from starlette.routing import Route
except ImportError as error:
    message = "serving needs starlette and uvicorn"
    raise MissingExtraError(message, fix="pip install 'vlduet[serve]'") from error

# Not our logger: a server's errors belong in the log of the web server.
logger = logging.getLogger("uvicorn.error")

SHUTDOWN_GRACE_SECONDS = 3
"""Time that running answers have to end in when the server shuts down."""
DISCONNECT_POLL_SECONDS = 1.0
"""Interval at which a waiting request checks whether its client is still connected."""
MAX_REQUEST_BYTES = 64 << 20
DEFAULT_MAX_TOKENS = 256
"""Length limit of an answer whose request gives none."""
CLIENT_CLOSED_REQUEST = 499
"""Status, introduced by nginx, of a request whose client disconnected."""

Body = TypeVar("Body", bound=schemas.RequestBody)
T = TypeVar("T")


class Service:
    """A model, and optionally an index that it built, behind the routes of this module.

    Args:
        worker: worker that owns the model.
        name: name under which clients know the model.
        index: index to search; must be built by the same model.
    """

    def __init__(self, worker: Worker, *, name: str, index: Index | None = None):
        self.worker, self.name, self.index = worker, name, index
        self.created = int(time.time())

    def build_app(
        self, *, allowed_hosts: list[str] | None = None, api_keys: list[str] | None = None
    ) -> Starlette:
        """Return the ASGI application with the routes of this module.

        Errors of a route become JSON responses in OpenAI's format (see `_handle_error`).

        Args:
            allowed_hosts: accepted host names of requests; None accepts any. With a list, no web
                page that the user of this machine visits can reach the server under a host name of
                its own (DNS rebinding).
            api_keys: keys of which a request must carry one, except for /health; None serves
                anyone.
        """
        routes = [
            Route("/health", self.health),
            Route("/v1/models", self.list_models),
            Route("/v1/models/{name}", self.get_model),
            Route("/v1/embeddings", self.create_embeddings, methods=["POST"]),
            Route("/v1/chat/completions", self.create_chat_completion, methods=["POST"]),
            Route("/v1/search", self.search_index, methods=["POST"]),
        ]
        middleware = []
        if allowed_hosts is not None:
            middleware.append(Middleware(TrustedHostMiddleware, allowed_hosts=allowed_hosts))
        if api_keys is not None:
            middleware.append(Middleware(ApiKeyMiddleware, api_keys=api_keys))
        errors = [VLDuetError, ValidationError, HTTPException, ServerBusyError, ClientDisconnect]
        handlers: dict[Any, Any] = dict.fromkeys([*errors, Exception], _handle_error)
        return Starlette(routes=routes, middleware=middleware, exception_handlers=handlers)

    # ------------------------------------------------------------------ routes

    async def health(self, _: Request) -> Response:
        """Respond that the server is running and has loaded its model."""
        return JSONResponse({"status": "ok"})

    async def list_models(self, _: Request) -> Response:
        """Respond with the list of models, which is the one model of this server."""
        return JSONResponse({"object": "list", "data": [self._model_object()]})

    async def get_model(self, request: Request) -> Response:
        """Respond with the model of the name in the path, or with status 404."""
        self._check_model_name(request.path_params["name"])
        return JSONResponse(self._model_object())

    async def create_embeddings(self, request: Request) -> Response:
        """Respond with the unit vector of each input: a text, an image or a mixture of both.

        With `input_type` "query", inputs are embedded as queries, otherwise as documents; with
        `encoding_format` "base64", vectors are base64 instead of lists. Raises DataError for
        `dimensions` other than the model's and for an input that is malformed or cannot be
        embedded, ModelError for a vector that is not finite, ServerBusyError if too many requests
        wait, HTTPException 499 if the client disconnects, which drops the inputs that wait, and as
        `_read_body`.
        """
        body = await self._read_body(request, schemas.EmbeddingsBody)
        dim = self.worker.model.dim
        if body.dimensions not in (None, dim):
            message = f"{body.dimensions}: this model has {dim}"
            raise DataError(message, place="dimensions", fix="Leave it out")
        is_query = body.input_type == "query"
        future = self.worker.submit_embedding(body.parse_inputs(), is_query=is_query)
        result = await _await_while_connected(request, asyncio.wrap_future(future))
        as_base64 = body.encoding_format == "base64"
        return JSONResponse(
            schemas.embeddings_response(result.vectors, model=self.name, as_base64=as_base64)
        )

    async def search_index(self, request: Request) -> Response:
        """Respond with the documents of the index that are nearest to a query, best first.

        Raises DataError without an index and for a query that is malformed or cannot be embedded,
        RetrievalError as `search` (an empty query, an invalid filter), ServerBusyError if too many
        requests wait, HTTPException 499 if the client disconnects, and as `_read_body`.
        """
        body = await self._read_body(request, schemas.SearchBody)
        index = self._require_index()
        query = body.parse_query()
        hits = await self._call_worker(
            request, lambda: search(index, self.worker.model, query, k=body.k, where=body.where)
        )
        return JSONResponse({"object": "list", "data": schemas.hits_response(hits)})

    async def create_chat_completion(self, request: Request) -> Response:
        """Respond with the answer to a conversation, as a whole or as a stream of events.

        With `retrieval`, the last message is answered from the hits that it finds in the index, and
        the response names these sources. The answer has DEFAULT_MAX_TOKENS tokens at most unless
        the body gives a limit. If the client disconnects, the chat is cancelled.

        Raises, before the first token: DataError for a model that cannot generate, a malformed or
        too long conversation, and `retrieval` without an index or with several images;
        RetrievalError as `prepare_prompt`; ServerBusyError if too many requests wait; HTTPException
        499 if the client disconnects; and as `_read_body`. A later error is raised too, or in a
        stream becomes an event.
        """
        body = await self._read_body(request, schemas.ChatBody)
        if not self.worker.can_generate:
            message = "this model embeds and does not generate"
            raise DataError(message, place="model", fix="Serve a generative one")
        messages = body.parse_messages()
        sources = None
        if (options := body.retrieval) is not None:
            question, image = schemas.split_question(messages[-1])
            index, model = self._require_index(), self.worker.model
            k, where = options.k, options.where
            prompt = await self._call_worker(
                request,
                lambda: prepare_prompt(index, model, question, image=image, k=k, where=where),
            )
            messages = (*messages[:-1], *prompt.messages)
            sources = prompt.sources
        queue = _DeltaQueue()
        chat = ChatRequest(
            messages,
            queue.put,
            body.max_completion_tokens or body.max_tokens or DEFAULT_MAX_TOKENS,
            sampling_params=body.sampling_params(),
            stop_strings=body.stop_strings(),
        )
        self.worker.submit_chat(chat)
        # An error before the first token is an error response; later ones are part of the stream.
        try:
            first = await _await_while_connected(request, queue.get())
        except BaseException:
            chat.cancelled = True
            raise
        writer = _CompletionWriter(self.name, sources)
        if body.stream:
            events = _stream_events(writer, first, queue, chat)
            headers = {"Cache-Control": "no-cache"}
            return StreamingResponse(events, media_type="text/event-stream", headers=headers)
        deltas = await _collect_deltas(first, queue, chat, request)
        return JSONResponse(writer.response(deltas))

    # ------------------------------------------------------------------ helpers

    async def _call_worker(self, request: Request, function: Callable[[], T]) -> T:
        """Return `function()`, run in the worker's thread; cancelled if the client disconnects."""
        future = self.worker.submit_call(function)
        return await _await_while_connected(request, asyncio.wrap_future(future))

    async def _read_body(self, request: Request, schema: type[Body]) -> Body:
        """Return the validated JSON body of a request; top-level null values count as missing.

        Raises:
            HTTPException: another content type (415), a body that is too large (413), or another
                model than the one that is served (404).
            DataError: not JSON, no object, or a field that is unknown or not supported.
            ValidationError: a field with an invalid value, or a required one that is missing.
            ClientDisconnect: the client disconnects before the end of the body.
        """
        # A web page can send other content types without the permission of the server (CORS).
        content_type = request.headers.get("content-type", "")
        if content_type.partition(";")[0].strip() != "application/json":
            raise HTTPException(415, "Send Content-Type: application/json")
        data = bytearray()
        async for chunk in request.stream():
            data += chunk
            if len(data) > MAX_REQUEST_BYTES:
                text = f"More than {MAX_REQUEST_BYTES >> 20} MiB. Send fewer or smaller images"
                raise HTTPException(413, text)
        try:
            values = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise DataError(f"the body is not JSON ({error})", fix="Send {...}") from None
        if not isinstance(values, dict):
            raise DataError("the body is not a JSON object", fix="Send {...}")
        body = schema.model_validate({k: v for k, v in values.items() if v is not None})
        body.check_extra_fields()
        if body.model is not None:
            self._check_model_name(body.model)
        return body

    def _check_model_name(self, name: str) -> None:
        """Raise HTTPException 404 unless `name` is the model that is served."""
        if name != self.name:
            text = f"The model {name!a:.80} is not served here, '{self.name}' is"
            raise HTTPException(404, text)

    def _model_object(self) -> dict[str, Any]:
        """Return the model as an object of OpenAI's API."""
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "vlduet"}

    def _require_index(self) -> Index:
        """Return the index; raise DataError if the server has none."""
        if self.index is None:
            raise DataError("no index is served", fix="Start the server with --index INDEX")
        return self.index


def build_server(app: Starlette) -> uvicorn.Server:
    """Return a web server that is not running yet; setting its `should_exit` ends it."""
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=SHUTDOWN_GRACE_SECONDS,
    )
    return uvicorn.Server(config)


def run_server(app: Starlette, listening_socket: socket.socket) -> None:
    """Serve `app` on a listening socket until the process is interrupted."""
    build_server(app).run(sockets=[listening_socket])


async def _await_while_connected(request: Request, awaitable: Awaitable[T]) -> T:
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


class _DeltaQueue:
    """Queue from the worker's thread to the coroutine of one request, which creates it."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue = asyncio.Queue[Delta | Exception]()

    def put(self, output: Delta | Exception) -> None:
        """Append an output; may be called in any thread."""
        self._loop.call_soon_threadsafe(self._queue.put_nowait, output)

    async def get(self) -> Delta:
        """Wait for the next output; return it if it is a delta, and raise it if it is an error."""
        output = await self._queue.get()
        if isinstance(output, Exception):
            raise output
        return output


class _CompletionWriter:
    """Formats one answer as OpenAI's response body or as its stream events.

    Args:
        model: name of the model.
        sources: hits that the prompt quotes; None if the chat did not use the index.
    """

    def __init__(self, model: str, sources: Sequence[Hit] | None):
        answer_id = f"chatcmpl-{uuid.uuid4().hex}"
        self.common = {"id": answer_id, "created": int(time.time()), "model": model}
        self.sources = {} if sources is None else {"sources": schemas.hits_response(sources)}

    def response(self, deltas: list[Delta]) -> dict[str, Any]:
        """Return the response body for all deltas of the answer, which must be at least one.

        The text is stripped of white space at both ends. Finish reason and usage are those of the
        last delta; `sources` is a field only if the chat used the index.
        """
        last = deltas[-1]
        text = "".join(delta.text for delta in deltas).strip()
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": last.finish_reason}
        choice["logprobs"] = None
        usage = schemas.usage_response(last.prompt_tokens, last.completion_tokens)
        body = {"object": "chat.completion", "choices": [choice], "usage": usage}
        return {**self.common, **body, **self.sources}

    def opening_event(self) -> str:
        """Return the first event of a stream, which contains the role and the sources."""
        return self._event({"role": "assistant", "content": ""}, None, self.sources)

    def delta_event(self, delta: Delta) -> str:
        """Return one delta as a server-sent event, a text ``data: {...}`` with a blank line.

        Only a delta with a finish reason, the last one, has the usage too.
        """
        extra = {}
        if delta.finish_reason:
            usage = schemas.usage_response(delta.prompt_tokens, delta.completion_tokens)
            extra = {"usage": usage}
        content = {"content": delta.text} if delta.text else {}
        return self._event(content, delta.finish_reason, extra)

    def _event(
        self, delta: dict[str, str], finish_reason: str | None, extra: dict[str, Any]
    ) -> str:
        """Return a chunk with one choice, and the fields of `extra`, as a server-sent event."""
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
        chunk = {**self.common, "object": "chat.completion.chunk", "choices": [choice], **extra}
        return _server_sent_event(chunk)


async def _collect_deltas(
    first: Delta, queue: _DeltaQueue, chat: ChatRequest, request: Request
) -> list[Delta]:
    """Wait for all deltas of an answer and return them, `first` included.

    The chat is marked as cancelled at the end in every case. Raises HTTPException with status 499
    if the client disconnects, and the error of the chat.
    """
    deltas = [first]
    try:
        while deltas[-1].finish_reason is None:
            if await request.is_disconnected():
                raise HTTPException(CLIENT_CLOSED_REQUEST, "The client disconnected")
            deltas.append(await queue.get())
    finally:
        chat.cancelled = True
    return deltas


async def _stream_events(
    writer: _CompletionWriter, delta: Delta, queue: _DeltaQueue, chat: ChatRequest
) -> AsyncIterator[str]:
    """Yield the server-sent events of an answer with first delta `delta`, then ``data: [DONE]``.

    Deltas without text are skipped, except the last one. An error is logged and becomes an event
    without details, because the status has been sent long before. The chat is marked as cancelled
    at the end, also if the client disconnects.
    """
    try:
        yield writer.opening_event()
        while delta.finish_reason is None:
            if delta.text:
                yield writer.delta_event(delta)
            delta = await queue.get()
        yield writer.delta_event(delta)
    except Exception as error:
        logger.exception("an answer ended with an error", exc_info=error)
        text = "the answer ended with an error; see the server's log"
        yield _server_sent_event(schemas.error_response(text, error_type="server_error"))
    finally:
        chat.cancelled = True
    yield "data: [DONE]\n\n"


def _server_sent_event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"


# ------------------------------------------------------------------ errors


async def _handle_error(_: Request, error: Exception) -> Response:
    """Return the response for an error, with its status, in OpenAI's format.

    The status is 400 for invalid requests (VLDuetError, ValidationError), 500 for ModelError, 503
    with Retry-After for ServerBusyError, 499 for a disconnected client, and an HTTPException's own.
    Any other error is our own or a lack of memory: status 500 without details. The web server, not
    this function, logs its traceback.
    """
    error_type, place, headers = "invalid_request_error", None, None
    if isinstance(error, HTTPException):
        status, text, headers = error.status_code, error.detail, error.headers
    elif isinstance(error, ClientDisconnect):
        status, text = CLIENT_CLOSED_REQUEST, "the client disconnected"
    elif isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = ".".join(map(str, first["loc"]))
        status, text = 400, f"{place}: {first['msg']}"
    elif isinstance(error, VLDuetError):
        status, text, place = 400, str(error), error.place
        if isinstance(error, ModelError):
            status, error_type = 500, "server_error"
    elif isinstance(error, ServerBusyError):
        status, text = 503, "too many requests are waiting. Try again later"
        error_type, headers = "server_error", {"Retry-After": "5"}
    else:
        status, text = 500, "an error inside the server; see its log"
        error_type = "server_error"
    body = schemas.error_response(text, error_type=error_type, place=place)
    return JSONResponse(body, status, headers=headers)
