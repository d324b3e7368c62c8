"""API keys: requests must carry one of the known keys as OpenAI's clients send it.

The header is `Authorization: Bearer KEY`.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from pathlib import Path

from vlduet.errors import ConfigError
from vlduet.serve.asgi import (
    JSON_HEADER,
    ASGIApp,
    Receive,
    Scope,
    Send,
    error_content,
    find_headers,
    send_response,
)
from vlduet.serve.page_files import PAGE_FILES

PUBLIC_PATHS = frozenset({"/health", "/livez", "/readyz", *PAGE_FILES})
"""Paths that need no key: they reveal nothing. Probes request them without one, and so does a
browser that opens the web page, which asks for the key."""


def read_api_keys(path: Path) -> list[str]:
    """Return the keys of a text file in order, one per line without white space at its ends.

    Blank lines and those that start with # are skipped.

    Raises:
        ConfigError: the file cannot be read as UTF-8, holds no key, or holds one that no header can
            carry (a blank inside, or a character that is not printable ASCII).
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        fix = "Give a text file with one key per line"
        message = f"cannot be read ({getattr(error, 'strerror', None) or error})"
        raise ConfigError(message, place=path, fix=fix) from None
    keys = []
    for number, line in enumerate(lines, 1):
        if not line or line.startswith("#"):
            continue
        if not (line.isascii() and line.isprintable()) or " " in line:
            message = "not a key: a key has ASCII letters, digits and punctuation, and no blanks"
            raise ConfigError(message, place=f"{path}:{number}", fix="Correct the line")
        keys.append(line)
    if not keys:
        fix = "Write one key per line, such as `openssl rand -hex 24` makes"
        raise ConfigError("no keys", place=path, fix=fix)
    return keys


class ApiKeyMiddleware:
    """ASGI middleware that answers requests without a known key with status 401.

    The body of such a request is not read. The answer has the form of OpenAI's errors.

    Args:
        app: ASGI application that handles authorised requests.
        api_keys: known keys; only their hashes are stored.
    """

    def __init__(self, app: ASGIApp, api_keys: Sequence[str]):
        self.app = app
        self.key_hashes = [_hash_key(key.encode()) for key in api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass an authorised request to the application; answer any other with status 401.

        Paths in PUBLIC_PATHS and connections other than HTTP need no key. The answer is sent as
        JSON in the form of OpenAI's errors, without reading the request's body.
        """
        is_public = scope["type"] != "http" or scope["path"] in PUBLIC_PATHS
        if is_public or self._is_authorised(scope):
            await self.app(scope, receive, send)
            return
        message = "Incorrect API key: send Authorization: Bearer KEY"
        content = error_content(message, place="Authorization")
        headers = [JSON_HEADER, (b"www-authenticate", b"Bearer")]
        await send_response(send, 401, content, headers=headers)

    def _is_authorised(self, scope: Scope) -> bool:
        """Return whether there is exactly one Authorization header, ``Bearer KEY`` of a known key.

        The case of the scheme does not matter.
        """
        values = find_headers(scope, b"authorization")
        if len(values) != 1:
            return False
        auth_scheme, _, key = values[0].partition(b" ")
        key_hash = _hash_key(key.strip())
        # All keys are compared, each in constant time: the duration must not reveal anything.
        matches = [hmac.compare_digest(key_hash, other_hash) for other_hash in self.key_hashes]
        return any(matches) and auth_scheme.lower() == b"bearer"


def _hash_key(key: bytes) -> bytes:
    """Return the SHA-256 of a key, so that keys of any length compare in constant time."""
    return hashlib.sha256(key).digest()
