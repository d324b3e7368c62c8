"""Access log: one line and one measurement for each request, under an id that the client gets."""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import MutableMapping
from typing import Any
from urllib.parse import quote

from vlduet.serve.asgi import CLIENT_CLOSED_REQUEST, ASGIApp, Receive, Scope, Send, find_headers
from vlduet.serve.metrics import ServerMetrics

logger = logging.getLogger("vlduet.requests")
"""Logger of the requests; its messages reach the handlers of the logger ``vlduet``."""

REQUEST_ID_HEADER = b"x-request-id"
SAFE_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:/+=-]{1,100}")
"""Ids of clients that are used; another one is replaced, because it ends up in logs."""
MAX_LOGGED_PATH = 200
"""Number of characters of a path in the log."""


class RequestLogMiddleware:
    """ASGI middleware that gives each request an id, logs it when it ends, and measures it.

    The id is the client's ``X-Request-Id`` if that is short and harmless, otherwise a new one. The
    response has it in the same header, and the application in ``scope["state"]["request_id"]``.
    Neither query strings nor headers are logged, which may contain secrets.
    """

    def __init__(self, app: ASGIApp, metrics: ServerMetrics):
        """Log the requests to `app`, and count them in `metrics`."""
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Call the application; log the request when its response has ended or failed."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        response = _LoggedResponse(scope, send)
        with self.metrics.track_request():
            try:
                await self.app(scope, receive, response.send)
            except Exception:
                response.status = response.status or 500
                raise
            finally:
                # Routing notes the route in the scope; others are not told apart, so that
                # nobody can make up time series.
                route = getattr(scope.get("route"), "path", None) or scope.get("probe", "other")
                self.metrics.count_request(
                    route=route,
                    status=response.status or CLIENT_CLOSED_REQUEST,
                    seconds=time.perf_counter() - response.started,
                    first_byte_seconds=response.first_byte_seconds,
                )
                logger.info(response.format_line())


class _LoggedResponse:
    """Response to one request: its status, size and times."""

    def __init__(self, scope: Scope, send: Send):
        """Choose the request's id and start the clock."""
        self.scope, self._send = scope, send
        received_ids = find_headers(scope, REQUEST_ID_HEADER)
        self.request_id = uuid.uuid4().hex.encode()
        if len(received_ids) == 1 and SAFE_REQUEST_ID.fullmatch(received_ids[0]):
            self.request_id = received_ids[0]
        scope.setdefault("state", {})["request_id"] = self.request_id.decode()
        self.started = time.perf_counter()
        self.status: int | None = None
        self.first_byte_seconds: float | None = None
        self.num_bytes = 0

    async def send(self, message: MutableMapping[str, Any]) -> None:
        """Send a message of the response; add the id to its headers."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = [*message.get("headers", []), (REQUEST_ID_HEADER, self.request_id)]
            message = {**message, "headers": headers}
        elif message["type"] == "http.response.body":
            self.num_bytes += len(message.get("body", b""))
            if self.first_byte_seconds is None:
                self.first_byte_seconds = time.perf_counter() - self.started
        await self._send(message)

    def format_line(self) -> str:
        """Return the line of the log: time of the end, id, client, method, path, status and size.

        The time is UTC, the duration in seconds. A path is encoded as in a URL, so that it contains
        no blanks and control characters.
        """
        client = (self.scope.get("client") or ("-",))[0]
        path = quote(self.scope["path"], safe="/:@!$&'()*+,;=~")[:MAX_LOGGED_PATH]
        method = quote(self.scope["method"], safe="")[:20]
        status = self.status or CLIENT_CLOSED_REQUEST
        seconds = time.perf_counter() - self.started
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        request = f"{now} {self.request_id.decode()} {client} {method} {path}"
        return f"{request} {status} {self.num_bytes} bytes {seconds:.3f} s"
