"""HTTP: what comes in becomes work for the one worker, and what it tells goes out.

GET  /health
GET  /v1/models, /v1/models/NAME
POST /v1/embeddings
POST /v1/chat/completions     streamed where `stream` is true; answered from the index where `retrieval` is given
POST /v1/search               where an index is served
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
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
    raise MissingExtraError(
        "serving needs starlette and uvicorn", fix="pip install 'vlduet[serve]'"
    ) from error

log = logging.getLogger("uvicorn.error")

SHUTDOWN_GRACE_SECONDS = 3
"""Seconds that answers have to end in when the server does."""
DISCONNECT_POLL_SECONDS = 1.0
"""Seconds after which a request that still waits looks whether its client does."""
MAX_REQUEST_BYTES = 64 << 20
"""Bytes of one request."""
DEFAULT_MAX_TOKENS = 256
"""Tokens of an answer whose request does not say."""

F = TypeVar("F", bound=schemas.RequestBody)
T = TypeVar("T")


class Service:
    """A model, perhaps with an index of its making, behind the routes above.

    Args:
        worker: owns the model.
        name: what clients call it.
        index: what is searched; built by the same model.
    """

    def __init__(self, worker: Worker, *, name: str, index: Index | None = None):
        self.worker, self.name, self.index = worker, name, index
        self.created = int(time.time())

    def build_app(
        self, *, allowed_hosts: list[str] | None = None, api_keys: list[str] | None = None
    ) -> Starlette:
        """The application.

        Args:
            keys: of those who may ask; None for anyone.
            hosts: names that requests may be addressed to; None for any. With it, no web page that the user of this machine
                visits can talk to the server under a name of the page's own.
        """
        posts: dict[str, Callable[[Request], Awaitable[Response]]] = {
            "/v1/embeddings": self.create_embeddings,
            "/v1/chat/completions": self.create_chat_completion,
            "/v1/search": self.search_index,
        }
        routes = [Route("/health", self.health), Route("/v1/models", self.list_models)]
        routes += [Route("/v1/models/{name}", self.get_model)]
        routes += [Route(path, endpoint, methods=["POST"]) for path, endpoint in posts.items()]
        guard = (
            []
            if allowed_hosts is None
            else [Middleware(TrustedHostMiddleware, allowed_hosts=allowed_hosts)]
        )
        guard += [] if api_keys is None else [Middleware(ApiKeyMiddleware, keys=api_keys)]
        handlers: dict[Any, Any] = {
            VLDuetError: _refused,
            ModelError: _broken_model,
            ClientDisconnect: _gone,
            ValidationError: _misformed,
            HTTPException: _http,
            ServerBusyError: _busy,
            Exception: _broken,
        }
        return Starlette(routes=routes, middleware=guard, exception_handlers=handlers)

    # ------------------------------------------------------------------ routes

    async def health(self, _: Request) -> Response:
        """It is up, and has its model."""
        return JSONResponse({"status": "ok"})

    async def list_models(self, _: Request) -> Response:
        """The one model."""
        return JSONResponse({"object": "list", "data": [self._described()]})

    async def get_model(self, request: Request) -> Response:
        """The same, by its name."""
        self._check_name(request.path_params["name"])
        return JSONResponse(self._described())

    async def create_embeddings(self, request: Request) -> Response:
        """Texts, images and mixtures -> unit vectors."""
        form = await self._read(request, schemas.EmbeddingsBody)
        dim = self.worker.model.dim
        if form.dimensions not in (None, dim):
            raise DataError(
                f"{form.dimensions}: this model has {dim}", place="dimensions", fix="Leave it out"
            )
        future = self.worker.submit_embedding(
            form.parse_inputs(), is_query=form.input_type == "query"
        )
        vectors = await _while_there(request, asyncio.wrap_future(future))
        return JSONResponse(
            schemas.embeddings_response(
                vectors, model=self.name, as_base64=form.encoding_format == "base64"
            )
        )

    async def search_index(self, request: Request) -> Response:
        """The nearest documents of the index."""
        form, index = await self._read(request, schemas.SearchBody), self._index()
        parts = form.parse_query()
        asked = self.worker.submit_call(
            lambda: schemas.hits_response(
                search(index, self.worker.model, parts, k=form.k, where=form.where)
            )
        )
        return JSONResponse(
            {"object": "list", "data": await _while_there(request, asyncio.wrap_future(asked))}
        )

    async def create_chat_completion(self, request: Request) -> Response:
        """Answer a conversation; with `retrieval`, from what its last turn finds."""
        form = await self._read(request, schemas.ChatBody)
        if not self.worker.can_generate:
            raise DataError(
                "this model embeds and does not generate",
                place="model",
                fix="Serve a generative one",
            )
        messages, sources = form.parse_messages(), list[Hit]()
        if (wanted := form.retrieval) is not None:
            (question, image), index = schemas.split_question(messages[-1]), self._index()
            asked = self.worker.submit_call(
                lambda: prepare_prompt(
                    index, self.worker.model, question, image=image, k=wanted.k, where=wanted.where
                )
            )
            prompt = await _while_there(request, asyncio.wrap_future(asked))
            messages, sources = (*messages[:-1], *prompt.messages), list(prompt.sources)
        listener = _DeltaQueue()
        longest = form.max_completion_tokens or form.max_tokens or DEFAULT_MAX_TOKENS
        talk = ChatRequest(
            messages,
            listener.tell,
            longest,
            sampling=form.sampling_options(),
            stop=form.stop_strings(),
        )
        self.worker.submit_chat(talk)
        try:  # what is refused before the first word is an error, not a stream
            first = await _while_there(request, listener.next())
        except BaseException:
            talk.cancelled = True
            raise
        answer = _CompletionWriter(self.name, sources if wanted is not None else None)
        if form.stream:
            body = _events(answer, first, listener, talk)
            return StreamingResponse(
                body, media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
            )
        return JSONResponse(answer.whole(await _all(first, listener, talk, request)))

    # ------------------------------------------------------------------ help

    async def _read(self, request: Request, kind: type[F]) -> F:
        """The body as a form, checked. Only JSON: what a web page may send without asking is none."""
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            raise HTTPException(415, "Send Content-Type: application/json")
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_REQUEST_BYTES:
                raise HTTPException(
                    413, f"More than {MAX_REQUEST_BYTES >> 20} MiB. Send fewer or smaller images"
                )
        try:
            raw = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise DataError(f"the body is no JSON ({error})", fix="Mend it") from None
        if not isinstance(raw, dict):
            raise DataError("the body is no JSON object", fix="Send {...}")
        form = kind.model_validate({key: value for key, value in raw.items() if value is not None})
        form.check_extra_fields()
        if form.model is not None:
            self._check_name(form.model)
        return form

    def _check_name(self, model: str) -> None:
        if model != self.name:
            raise HTTPException(
                404, f"The model {model!a:.80} is not served here, '{self.name}' is"
            )

    def _described(self) -> dict[str, Any]:
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "vlduet"}

    def _index(self) -> Index:
        if self.index is None:
            raise DataError("no index is served", fix="Start the server with --index INDEX")
        return self.index


def build_server(app: Starlette) -> uvicorn.Server:
    """What `run` runs, for whoever wants to end it."""
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=SHUTDOWN_GRACE_SECONDS,
    )
    return uvicorn.Server(config)


def run_server(app: Starlette, listening: socket.socket) -> None:
    """Serve until the process is told to end."""
    build_server(app).run(sockets=[listening])


async def _while_there(request: Request, awaited: Awaitable[T]) -> T:
    """What is awaited; it is given up where the client no longer waits for it."""
    task = asyncio.ensure_future(awaited)
    try:
        while not task.done():
            await asyncio.wait({task}, timeout=DISCONNECT_POLL_SECONDS)
            if not task.done() and await request.is_disconnected():
                raise HTTPException(499, "The client went away")
        return task.result()
    finally:
        task.cancel()


class _DeltaQueue:
    """From the worker's thread to a request's coroutine."""

    def __init__(self) -> None:
        self.loop, self.told = asyncio.get_running_loop(), asyncio.Queue[Delta | Exception]()

    def tell(self, piece: Delta | Exception) -> None:
        self.loop.call_soon_threadsafe(self.told.put_nowait, piece)

    async def next(self) -> Delta:
        """Raises what the worker told."""
        piece = await self.told.get()
        if isinstance(piece, Exception):
            raise piece
        return piece


class _CompletionWriter:
    """One answer in OpenAI's two forms."""

    def __init__(self, model: str, sources: list[Hit] | None):
        self.head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }
        self.sources = {} if sources is None else {"sources": schemas.hits_response(sources)}

    def whole(self, pieces: list[Delta]) -> dict[str, Any]:
        last = pieces[-1]
        message = {"role": "assistant", "content": "".join(piece.text for piece in pieces).strip()}
        choice = {
            "index": 0,
            "message": message,
            "finish_reason": last.finish_reason,
            "logprobs": None,
        }
        told = {
            "choices": [choice],
            "usage": schemas.usage_response(last.prompt_tokens, last.completion_tokens),
        }
        return {**self.head, "object": "chat.completion", **told, **self.sources}

    def opening(self) -> str:
        """The first event, which brings the sources."""
        return self._event({"role": "assistant", "content": ""}, None, self.sources)

    def event(self, piece: Delta) -> str:
        """What is new; the last one tells why it ended."""
        told = (
            {"usage": schemas.usage_response(piece.prompt_tokens, piece.completion_tokens)}
            if piece.finish_reason
            else {}
        )
        return self._event({"content": piece.text} if piece.text else {}, piece.finish_reason, told)

    def _event(self, delta: dict[str, str], reason: str | None, more: dict[str, Any]) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": reason}
        return _data({**self.head, "object": "chat.completion.chunk", "choices": [choice], **more})


async def _all(
    first: Delta, listener: _DeltaQueue, talk: ChatRequest, request: Request
) -> list[Delta]:
    """Every piece; an answer that nobody waits for any more is broken off."""
    pieces = [first]
    try:
        while pieces[-1].finish_reason is None:
            if await request.is_disconnected():
                raise HTTPException(499, "The client went away")
            pieces.append(await listener.next())
    finally:
        talk.cancelled = True
    return pieces


async def _events(
    answer: _CompletionWriter, piece: Delta, listener: _DeltaQueue, talk: ChatRequest
) -> AsyncIterator[str]:
    """Server-sent events. A client that goes away ends them, and with them the answer."""
    try:
        yield answer.opening()
        while piece.finish_reason is None:
            if piece.text:
                yield answer.event(piece)
            piece = await listener.next()
        yield answer.event(piece)
    except Exception as error:  # the status is long sent: the error goes the way of the words
        log.exception("an answer was broken off", exc_info=error)
        yield _data(
            schemas.error_response(
                "the answer was broken off; the server's log tells more", error_type="server_error"
            )
        )
    finally:
        talk.cancelled = True
    yield "data: [DONE]\n\n"


def _data(value: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"


# ------------------------------------------------------------------ errors


async def _refused(_: Request, error: VLDuetError) -> Response:
    return JSONResponse(schemas.error_response(str(error), place=error.place), 400)


async def _broken_model(_: Request, error: ModelError) -> Response:
    return JSONResponse(
        schemas.error_response(str(error), error_type="server_error", place=error.place), 500
    )


async def _gone(_: Request, __: ClientDisconnect) -> Response:
    return JSONResponse(schemas.error_response("the client went away"), 499)


async def _misformed(_: Request, error: ValidationError) -> Response:
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    place = ".".join(map(str, first["loc"]))
    return JSONResponse(schemas.error_response(f"{place}: {first['msg']}", place=place), 400)


async def _http(_: Request, error: HTTPException) -> Response:
    return JSONResponse(
        schemas.error_response(error.detail), error.status_code, headers=error.headers
    )


async def _busy(_: Request, __: ServerBusyError) -> Response:
    told = schemas.error_response(
        "too many requests wait. Try again later", error_type="server_error"
    )
    return JSONResponse(told, 503, headers={"Retry-After": "5"})


async def _broken(_: Request, __: Exception) -> Response:
    """Of our own mistakes and of memory that is not there; the log has the traceback."""
    return JSONResponse(
        schemas.error_response(
            "an error inside the server; its log tells more", error_type="server_error"
        ),
        500,
    )
