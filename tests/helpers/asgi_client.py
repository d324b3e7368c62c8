"""Call an ASGI application without a socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class AsgiResponse:
    """Status, headers and body of a response; names of headers are in lower case."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""

    def json(self) -> Any:
        """Return the JSON value of the body."""
        return json.loads(self.body)


def call(
    app: Any, target: str, *, method: str = "GET", headers: Mapping[str, str] | None = None
) -> AsgiResponse:
    """Send a request without a body from the address 1.2.3.4; return the response.

    `target` is a path, after whose first ``?`` is a query. Exceptions of the application propagate.
    """
    path, _, query = target.partition("?")
    pairs = [(k.lower().encode(), v.encode()) for k, v in (headers or {}).items()]
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "scheme": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": query.encode(),
        "headers": pairs,
        "client": ("1.2.3.4", 5),
        "server": ("127.0.0.1", 80),
    }
    response = AsgiResponse()

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            response.status = message["status"]
            response.headers = {k.decode().lower(): v.decode() for k, v in message["headers"]}
        else:
            response.body += message.get("body", b"")

    asyncio.run(app(scope, receive, send))
    return response
