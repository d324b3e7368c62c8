"""Host names under which the server answers, and web pages that may call it (CORS)."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from urllib.parse import urlsplit

from vlduet.errors import ConfigError
from vlduet.logs import strip_control_characters
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

LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "::1")
"""Names of this machine that no other machine can use for it."""


def split_host(value: str) -> str:
    """Return the name or address in a Host header: in lower case, without port and brackets.

    A single dot at the end is dropped; for a value of another form the result is empty.
    """
    match = re.fullmatch(r"(?:\[([0-9a-f:.]+)\]|([^\s:\[\]/@]+?)\.?)(?::\d*)?", value.lower())
    return "" if match is None else match[1] or match[2]


def check_host_name(name: str, *, option: str) -> str:
    """Return a host name of an option in lower case.

    Raises:
        ConfigError: it is not a name or an address alone, such as one with a scheme or a port.
    """
    lowered = name.lower()
    if lowered and "*" not in lowered and (split_host(lowered) == lowered or _is_ipv6(lowered)):
        return lowered
    message = f"{name!r} is not the name of a host"
    fix = "Give the name alone, without a scheme, port or *, such as photos.example.org"
    raise ConfigError(message, place=option, fix=fix)


def _is_ipv6(text: str) -> bool:
    try:
        return ipaddress.ip_address(text).version == 6
    except ValueError:
        return False


def check_origin(origin: str, *, option: str) -> str:
    """Return an origin of an option as browsers send it; ``*`` stands for all.

    Raises:
        ConfigError: it is not ``http://HOST`` or ``https://HOST``, with a port if it is not the
            default one.
    """
    if origin == "*":
        return origin
    lowered = origin.lower().removesuffix("/")
    try:
        parts = urlsplit(lowered)
        has_host = parts.hostname is not None and parts.port != 0
    except ValueError:
        has_host = False
    if has_host and parts.scheme in ("http", "https"):
        expected = f"{parts.scheme}://{parts.netloc}"
        if expected == lowered and "@" not in lowered:
            return lowered
    message = f"{origin!r} is not the origin of a web page"
    raise ConfigError(message, place=option, fix="Give one such as https://photos.example.org")


class HostMiddleware:
    """ASGI middleware that answers only requests whose Host header has one of the known names.

    Otherwise a web page that the user of this machine visits could reach the server under a name of
    its own (DNS rebinding).
    """

    def __init__(self, app: ASGIApp, allowed_hosts: Sequence[str]):
        """Pass on to `app` the requests for `allowed_hosts`, which are in lower case."""
        self.app, self.allowed_hosts = app, frozenset(allowed_hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on a request for a known name; answer any other with status 400 as JSON."""
        if scope["type"] == "http":
            values = [value.decode("latin-1") for value in find_headers(scope, b"host")]
            host = split_host(values[0]) if len(values) == 1 else ""
            if host not in self.allowed_hosts:
                shown = strip_control_characters(host)[:100] or "without a name"
                text = f"the host {shown} is not served. If it is a name of this server, such as "
                text += f"that of a proxy, start it with --allow-host {host[:100] or 'NAME'}"
                content = error_content(text, place="Host")
                await send_response(send, 400, content, headers=[JSON_HEADER])
                return
        await self.app(scope, receive, send)
