"""Limits that keep one client from using up the server, and the one for bodies of requests."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from starlette.exceptions import HTTPException

from vlduet.serve.asgi import ASGIApp, Receive, Scope, Send, find_headers


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """Limits of connections and requests. Times are in seconds."""

    max_connections: int = 512
    """Open connections. Beyond it, the one that has been waiting for a request longest is closed,
    and if all are being served, the new one is answered with status 503."""
    idle_seconds: float = 15.0
    """Time that a connection may stay open after a response without a new request."""
    head_seconds: float = 10.0
    """Time for the request line and the headers, from the connection or from their first byte."""
    body_seconds: float = 20.0
    """Time for the body of a request, besides the time that `min_body_rate` grants."""
    min_body_rate: int = 16 << 10
    """Bytes per second: every so many bytes of a body extend its time by one second."""
    max_body_bytes: int = 64 << 20
    """Size of the body of a request."""
    write_seconds: float = 60.0
    """Time that a client may leave a response of more than 64 KiB unread."""
    shutdown_seconds: int = 5
    """Time that running answers have to end in when the server shuts down."""


class BodyLimitMiddleware:
    """ASGI middleware that bounds the size of a request's body and the time in which it arrives.

    A body that is too large or too slow raises HTTPException 413 or 408 where the application reads
    it, so that the response has the form of the application's errors. The body is not collected
    here.
    """

    def __init__(self, app: ASGIApp, limits: ServerLimits):
        """Bound the bodies that `app` reads by `limits`."""
        self.app, self.limits = app, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Call the application with a bounded `receive`; only HTTP requests are bounded."""
        if scope["type"] == "http":
            receive = _BoundedBody(scope, receive, self.limits).receive
        await self.app(scope, receive, send)


class _BoundedBody:
    """Body of one request, whose size and waiting time are counted while it is read."""

    def __init__(self, scope: Scope, receive: Receive, limits: ServerLimits):
        """Count the messages of `receive`, which belong to the request of `scope`."""
        self._receive, self.limits = receive, limits
        lengths = find_headers(scope, b"content-length")
        self.announced_bytes = int(lengths[0]) if lengths and lengths[0].isdigit() else 0
        self.expects_continue = bool(find_headers(scope, b"expect"))
        self.num_bytes = 0
        self.waited_seconds = 0.0
        self.is_complete = False

    async def receive(self) -> dict[str, object]:
        """Return the next message of the request.

        Raises:
            HTTPException: 413 for a body that is announced as, or is, larger than the limit, once
                its rest was read and dropped; 408 if the client is too slow.
        """
        if self.is_complete:
            return dict(await self._receive())  # waits for the end of the connection
        is_too_large = self.announced_bytes > self.limits.max_body_bytes
        if not (is_too_large and self.expects_continue):
            body = await self._receive_part()
            is_too_large |= self.num_bytes > self.limits.max_body_bytes
            if not is_too_large:
                return body
            await self._drop_rest()
        self.is_complete = True
        text = f"More than {self.limits.max_body_bytes >> 20} MiB. Send fewer or smaller images"
        raise HTTPException(413, text, headers={"Connection": "close"})

    async def _receive_part(self) -> dict[str, object]:
        """Return the next message and count it; raise HTTPException 408 if it is too late."""
        limits, loop = self.limits, asyncio.get_running_loop()
        seconds = limits.body_seconds + self.num_bytes / limits.min_body_rate - self.waited_seconds
        started = loop.time()
        try:
            async with asyncio.timeout(seconds):
                body = dict(await self._receive())
        except TimeoutError:
            self.is_complete = True
            text = "The body of the request did not arrive in time"
            raise HTTPException(408, text, headers={"Connection": "close"}) from None
        self.waited_seconds += loop.time() - started
        part = body.get("body", b"")
        self.num_bytes += len(part) if isinstance(part, bytes) else 0
        self.is_complete = not body.get("more_body", False)
        return body

    async def _drop_rest(self) -> None:
        """Read and drop the rest of the body, of at most twice the limit.

        Most clients send everything before they read; closing the connection earlier would lose
        them the response.
        """
        while not self.is_complete and self.num_bytes < 2 * self.limits.max_body_bytes:
            await self._receive_part()
