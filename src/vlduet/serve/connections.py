"""Connections of the web server: their number, and the time that a client may take.

uvicorn bounds neither. `LimitedProtocol` adds timers to its HTTP/1.1 protocol.
"""

from __future__ import annotations

import asyncio
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from vlduet.serve.asgi import ASGIApp, error_content
from vlduet.serve.limits import ServerLimits

ABORT_SECONDS = 2.0
"""Time that the last bytes for a client have to be sent after its connection was closed."""


class LimitedConfig(uvicorn.Config):
    """Configuration of a web server whose connections keep `limits`.

    uvicorn's own log has warnings and errors only; a request is logged by `RequestLogMiddleware`.
    """

    def __init__(self, app: ASGIApp, limits: ServerLimits):
        """Configure a server of `app` with HTTP/1.1 only: no HTTP/2 and no WebSockets."""
        self.limits = limits
        super().__init__(
            app,
            http=LimitedProtocol,
            ws="none",
            log_level="warning",
            access_log=False,
            lifespan="off",
            server_header=False,
            timeout_keep_alive=limits.idle_seconds,  # type: ignore[arg-type]
            timeout_graceful_shutdown=limits.shutdown_seconds,
        )


class LimitedProtocol(H11Protocol):
    """HTTP/1.1 protocol of one connection that ends what takes longer than the limits allow.

    - *head*: request line and headers that are not complete in time get status 408; the body of a
      request that was answered before its end is dropped for as long.
    - *response*: a client that does not read its response is disconnected.
    - *number*: see `ServerLimits.max_connections`.

    The time between two requests is uvicorn's keep-alive timeout.
    """

    def __init__(
        self,
        config: LimitedConfig,
        server_state: ServerState,
        app_state: dict[str, Any],
        *,
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        """Prepare a connection of the server whose state is `server_state`, as uvicorn does."""
        super().__init__(config, server_state, app_state, _loop)
        self.limits = config.limits
        self.waiting_since = self.loop.time()
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._abort_timer: asyncio.TimerHandle | None = None

    @property
    def is_waiting(self) -> bool:
        """Whether the client's request has not begun or is incomplete, and nothing is served."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Accept a connection, and close another one if there are too many."""
        super().connection_made(transport)
        self._start_head_timer()
        connections = [
            connection
            for connection in self.connections
            if isinstance(connection, LimitedProtocol) and not connection.transport.is_closing()
        ]
        if len(connections) <= self.limits.max_connections:
            return
        waiting = [c for c in connections if c.is_waiting and c is not self]
        if waiting:
            min(waiting, key=lambda connection: connection.waiting_since).close()
        else:
            text = "too many connections. Try again later"
            self.close(503, error_content(text, error_type="server_error"))

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop all timers."""
        for timer in (self._head_timer, self._write_timer, self._abort_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Process bytes of the client; start or stop the timer of the head."""
        super().data_received(data)
        if not self.is_waiting:
            self._stop_head_timer()
        elif self._head_timer is None:
            self._start_head_timer()

    def on_response_complete(self) -> None:
        """Note that the connection waits for its next request."""
        self.waiting_since = self.loop.time()
        super().on_response_complete()

    def pause_writing(self) -> None:
        """Give the client a time in which it must read."""
        super().pause_writing()
        self._write_timer = self.loop.call_later(self.limits.write_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """Stop the timer of `pause_writing`."""
        if self._write_timer is not None:
            self._write_timer.cancel()
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP in the form of all other errors, and close the connection."""
        if self.is_waiting:
            self.close(400, error_content(msg))
        else:  # a body that is not HTTP: a response may have begun
            self.close()

    def close(self, status: int | None = None, content: bytes = b"") -> None:
        """Close the connection, after a response with a JSON body if a status is given."""
        if status is not None:
            phrase = {400: "Bad Request", 408: "Request Timeout", 503: "Service Unavailable"}
            head = f"HTTP/1.1 {status} {phrase[status]}\r\nContent-Type: application/json\r\n"
            head += f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n"
            self.transport.write(head.encode() + content)
        self.transport.close()
        if self._abort_timer is None:
            self._abort_timer = self.loop.call_later(ABORT_SECONDS, self.transport.abort)

    def _start_head_timer(self) -> None:
        self._head_timer = self.loop.call_later(self.limits.head_seconds, self._end_head)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _end_head(self) -> None:
        """Close the connection, with status 408 if a part of a head has arrived."""
        has_part_of_head = bool(self.conn.trailing_data[0])
        if has_part_of_head:
            self.close(408, error_content("the head of the request did not arrive in time"))
        else:
            self.close()
