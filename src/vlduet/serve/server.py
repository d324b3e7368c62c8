"""The web server: it listens while the model is loaded, limits its clients and ends in good order.

    request log > host names > CORS > API keys > limit of bodies > probes and metrics > application

GET  /livez     200 while the process answers
GET  /readyz    200 from when the model is warm until the server shuts down, otherwise 503
GET  /metrics   measurements in Prometheus' format
"""

from __future__ import annotations

import asyncio
import queue
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn
from starlette.middleware.cors import CORSMiddleware

from vlduet.serve.asgi import (
    JSON_HEADER,
    ASGIApp,
    Receive,
    Scope,
    Send,
    error_content,
    send_response,
)
from vlduet.serve.auth import ApiKeyMiddleware
from vlduet.serve.connections import LimitedConfig
from vlduet.serve.hosts import HostMiddleware
from vlduet.serve.limits import BodyLimitMiddleware, ServerLimits
from vlduet.serve.metrics import CONTENT_TYPE, ServerMetrics
from vlduet.serve.request_log import RequestLogMiddleware

if TYPE_CHECKING:
    from vlduet.serve.chats import ChatOutput
    from vlduet.serve.worker import Worker


MAX_SHARE_OF_FILES = 0.5
"""Share of the files that a process may open that connections may use up."""
PROBES = ("/livez", "/readyz", "/metrics")
METRICS_HEADER = (b"content-type", CONTENT_TYPE.encode())
SHUTDOWN_SIGNALS = (signal.SIGINT, signal.SIGTERM)
CLOSE_SECONDS = 3.0
"""Time that the model's thread has to end its last step when the server has shut down."""


@dataclass(frozen=True, slots=True)
class AccessRules:
    """Requests that are answered."""

    allowed_hosts: Sequence[str] | None = None
    """Names in the Host header, in lower case; None accepts any."""
    api_keys: Sequence[str] | None = None
    """Keys of which a request must carry one, except for health and probes; None serves anyone."""
    cors_origins: Sequence[str] = ()
    """Origins of web pages of other hosts that may call the server; ``*`` stands for all."""


class Backend:
    """ASGI application that answers probes at once, and other requests once `app` is set.

    Attributes:
        app: application for all other requests; None until it has been loaded.
        metrics: measurements that ``/metrics`` reports.
        is_ending: whether the server shuts down.
    """

    def __init__(self, app: ASGIApp | None = None):
        """Start with an application, or without one: it may be set later, in any thread."""
        self.app = app
        self.metrics = ServerMetrics()
        self.is_ending = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a probe, or let the application answer; without one the status is 503."""
        app, path = self.app, scope.get("path")
        is_ready = app is not None and not self.is_ending
        if path in PROBES:
            scope["probe"] = path
        if scope["type"] != "http":
            raise RuntimeError(f"connections of type {scope['type']} are not served")
        if path in PROBES and scope["method"] not in ("GET", "HEAD"):
            content = error_content("this path accepts GET only")
            await send_response(send, 405, content, headers=[JSON_HEADER, (b"allow", b"GET")])
        elif path == "/metrics":
            content = await asyncio.to_thread(self.metrics.format)
            await send_response(send, 200, content, headers=[METRICS_HEADER])
        elif path == "/livez" or (path == "/readyz" and is_ready):
            await send_response(send, 200, b'{"status": "ok"}', headers=[JSON_HEADER])
        elif path == "/readyz" or app is None:
            state = "shuts down" if self.is_ending else "loads its model"
            content = error_content(f"the server {state}", error_type="server_error")
            headers = [JSON_HEADER, (b"retry-after", b"5")]
            await send_response(send, 503, content, headers=headers)
        else:
            await app(scope, receive, send)


class ModelServer(uvicorn.Server):
    """Web server that SIGINT and SIGTERM end alike.

    The first signal lets running answers end within `ServerLimits.shutdown_seconds`. A second one
    ends the process at once, as it does without a handler.
    """

    def __init__(self, config: uvicorn.Config, backend: Backend):
        """Prepare a server that tells `backend` when it shuts down."""
        super().__init__(config)
        self.backend = backend

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to shut down, and give the signals their default effect."""
        self.backend.is_ending = True
        self.should_exit = True
        for number in SHUTDOWN_SIGNALS:
            signal.signal(number, signal.SIG_DFL)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle the signals during the context, if this is the main thread.

        Unlike uvicorn, the signal is not raised again afterwards: the process ends by returning.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        handlers = {number: signal.signal(number, self.handle_exit) for number in SHUTDOWN_SIGNALS}
        try:
            yield
        finally:
            if not self.backend.is_ending:
                for number, handler in handlers.items():
                    signal.signal(number, handler)


def protect_app(backend: Backend, rules: AccessRules, limits: ServerLimits) -> ASGIApp:
    """Return `backend` behind the middleware that is listed at the top of this module."""
    app: ASGIApp = BodyLimitMiddleware(backend, limits)
    if rules.api_keys is not None:
        app = ApiKeyMiddleware(app, rules.api_keys)
    if rules.cors_origins:
        # Outside of the keys: a browser asks for permission without one.
        app = CORSMiddleware(
            app,
            allow_origins=list(rules.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    if rules.allowed_hosts is not None:
        app = HostMiddleware(app, rules.allowed_hosts)
    return RequestLogMiddleware(app, backend.metrics)


def build_server(
    app: ASGIApp | Backend, *, rules: AccessRules | None = None, limits: ServerLimits | None = None
) -> ModelServer:
    """Return a web server that is not running yet; setting its `should_exit` ends it.

    Args:
        app: application, or a `Backend` that gets one later.
        rules: requests that are answered; by default all.
        limits: limits of connections and requests. Connections use at most MAX_SHARE_OF_FILES of
            the files that the process may open.
    """
    backend = app if isinstance(app, Backend) else Backend(app)
    limits = limits or ServerLimits()
    max_connections = min(limits.max_connections, int(MAX_SHARE_OF_FILES * _count_files()))
    limits = replace(limits, max_connections=max_connections)
    protected_app = protect_app(backend, rules or AccessRules(), limits)
    return ModelServer(LimitedConfig(protected_app, limits), backend)


@dataclass(frozen=True, slots=True)
class LoadedApp:
    """An application, and what its measurements need."""

    app: ASGIApp
    worker: Worker
    count_documents: Callable[[], int] | None = None
    """Function that returns the number of documents of the index; None without an index."""


def run_server(
    server: ModelServer,
    load: Callable[[], LoadedApp],
    listening_socket: socket.socket,
    *,
    on_ready: Callable[[], None] = lambda: None,
) -> bool:
    """Serve until SIGINT or SIGTERM; load the model meanwhile, in a thread.

    Requests get status 503 until `load` has returned and the model is warm; then `on_ready` is
    called. Errors of `load` and of the warm-up end the server and are raised.

    Returns:
        Whether all threads have ended. One that has not is loading or computing, and would delay
        the end of the process.
    """
    loaded: list[LoadedApp] = []
    errors: list[BaseException] = []

    def load_and_warm_up() -> None:
        try:
            loaded.append(load())
            warm_up(loaded[0].worker)
        except BaseException as error:  # noqa: BLE001 - it is raised in the main thread
            errors.append(error)
            server.should_exit = True
            return
        worker, backend = loaded[0].worker, server.backend
        backend.metrics.add_worker(worker.read_statistics, loaded[0].count_documents)
        backend.app = loaded[0].app
        on_ready()

    loader = threading.Thread(target=load_and_warm_up, name="loader", daemon=True)
    loader.start()
    server.run(sockets=[listening_socket])
    if errors:
        raise errors[0]
    if loader.is_alive():
        return False
    closing = threading.Thread(target=loaded[0].worker.close, name="closing", daemon=True)
    closing.start()
    closing.join(CLOSE_SECONDS)
    return not closing.is_alive()


def warm_up(worker: Worker) -> None:
    """Embed a text, and generate a token if the model can, so that the first request is fast.

    Raises the error of the model, such as one of weights that give no finite numbers.
    """
    # Not imported above: the server listens and answers probes before torch is imported.
    from vlduet.data.records import Message
    from vlduet.serve.chats import ChatRequest

    worker.submit_embedding(["warm-up"], is_query=False).result()
    if worker.can_generate:
        outputs: queue.Queue[ChatOutput | Exception] = queue.Queue()
        worker.submit_chat(ChatRequest((Message("user", ("warm-up",)),), outputs.put, 1))
        output = outputs.get()
        if isinstance(output, Exception):
            raise output


def _count_files() -> int:
    """Return the number of files that this process may open; sockets count as files."""
    try:
        import resource
    except ImportError:  # Windows
        return 8192
    soft_limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 1 << 20 if soft_limit == resource.RLIM_INFINITY else soft_limit
