"""Types of ASGI applications, and error responses that a middleware sends by itself."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]

JSON_HEADER = (b"content-type", b"application/json")
CLIENT_CLOSED_REQUEST = 499
"""Status, introduced by nginx, of a request whose client disconnected."""


def error_content(
    message: str, *, error_type: str = "invalid_request_error", place: str | None = None
) -> bytes:
    """Return an error in OpenAI's format as JSON; `place` names the field or header at fault."""
    error = {"message": message, "type": error_type, "param": place, "code": None}
    return json.dumps({"error": error}).encode()


async def send_response(
    send: Send, status: int, content: bytes, *, headers: Sequence[tuple[bytes, bytes]]
) -> None:
    """Send a complete response with `content` as its body; Content-Length is added."""
    length = (b"content-length", str(len(content)).encode())
    start = {"type": "http.response.start", "status": status, "headers": [*headers, length]}
    await send(start)
    await send({"type": "http.response.body", "body": content})


def find_headers(scope: Scope, name: bytes) -> list[bytes]:
    """Return the values of all headers of a request with a name in lower case, in order."""
    return [value for key, value in scope["headers"] if key == name]
