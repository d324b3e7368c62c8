"""Who may ask: requests bring one of the keys, as OpenAI's clients do (`Authorization: Bearer KEY`)."""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlduet.errors import ConfigError
from vlduet.serve import schemas

PUBLIC_PATHS = ("/health",)
"""Paths that tell nothing and are asked by machines without a key."""


def read_api_keys(path: Path) -> list[str]:
    """The keys of a file, one a line; blank lines and those that begin with # are none.

    Raises:
        ConfigError: it cannot be read, has no key, or one that no header can carry.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"cannot be read: {error}", place=path, fix="Give a text file with one key a line"
        ) from None
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise ConfigError(
            "no keys", place=path, fix="Write one a line, such as `openssl rand -hex 24` makes"
        )
    for number, line in enumerate(lines, 1):
        if line in keys and not (line.isascii() and line.isprintable() and " " not in line):
            raise ConfigError(
                "not a key: letters, digits and marks without blanks",
                place=f"{path}:{number}",
                fix="Mend the line",
            )
    return keys


class ApiKeyMiddleware:
    """ASGI middleware: what brings no key that is known gets 401, in OpenAI's form, before anything is read of it."""

    def __init__(self, app: Any, keys: Sequence[str]):
        self.app, self.known = app, [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """One request."""
        if (
            scope["type"] != "http"
            or scope["path"] in PUBLIC_PATHS
            or self._knows(scope["headers"])
        ):
            await self.app(scope, receive, send)
            return
        told = schemas.error_response(
            "Incorrect API key: send Authorization: Bearer KEY", place="Authorization"
        )
        headers = [(b"content-type", b"application/json"), (b"www-authenticate", b"Bearer")]
        await send({"type": "http.response.start", "status": 401, "headers": headers})
        await send({"type": "http.response.body", "body": json.dumps(told).encode()})

    def _knows(self, headers: Sequence[tuple[bytes, bytes]]) -> bool:
        given = [value for name, value in headers if name == b"authorization"]
        kind, _, key = (given[0] if len(given) == 1 else b"").partition(b" ")
        found = _digest(key.strip())
        # All of them, in equal time: how long a refusal takes must not tell how near a guess was.
        return (
            bool(sum(hmac.compare_digest(found, known) for known in self.known))
            and kind.lower() == b"bearer"
        )


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
