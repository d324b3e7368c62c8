"""Images at addresses on the web, which a request names: only of listed hosts, and under limits.

A request must not make the server call machines that its sender cannot reach. So the host must be
in a list, each of its addresses must be public after resolution, and the connection is made to the
address that was checked: a second resolution could give another one. Redirects are not followed.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from urllib.parse import SplitResult, urlsplit

import h11

from vlduet.data.records import ImageRef
from vlduet.errors import ConfigError, DataError
from vlduet.serve.hosts import check_host_name

DEFAULT_PORTS = {"http": 80, "https": 443}
GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")
TUNNELS = (ipaddress.ip_network("2002::/16"), ipaddress.ip_network("2001::/32"))
"""Networks of IPv6 (6to4, Teredo) whose addresses contain one of IPv4, which may be private."""
MAX_CONNECTION_TRIES = 3
"""Number of addresses of a host that are tried."""


def resolve_host(host: str, port: int) -> list[str]:
    """Return the addresses of a host, in the order in which the system prefers them."""
    infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(info[4][0]) for info in infos))


def is_public(address: str) -> bool:
    """Return whether an IP address is one of the public internet.

    Not public are private, loopback, link-local, shared (RFC 6598), multicast, reserved and
    unspecified addresses, and IPv6 addresses with an IPv4 address inside, except for mapped ones,
    which count as that IPv4 address.
    """
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(parsed, ipaddress.IPv6Address) and parsed.ipv4_mapped is not None:
        parsed = parsed.ipv4_mapped
    if isinstance(parsed, ipaddress.IPv6Address) and (
        parsed not in GLOBAL_UNICAST or any(parsed in network for network in TUNNELS)
    ):
        return False
    return parsed.is_global and not parsed.is_multicast and not parsed.is_reserved


@dataclass(frozen=True, slots=True)
class ImageUrlPolicy:
    """Conditions under which images at http and https URLs are read."""

    allowed_hosts: Sequence[str] = ()
    """Names of hosts in lower case, or ``NAME:PORT`` for another port than 80 and 443."""
    max_bytes: int = 32 << 20
    max_seconds: float = 10.0
    """Time for connection, request and response together."""
    resolve: Callable[[str, int], list[str]] = resolve_host
    """Function that returns the addresses of a host and port."""
    is_allowed_address: Callable[[str], bool] = is_public


def fetch_image(url: str, policy: ImageUrlPolicy) -> bytes:
    """Return the bytes at an http or https URL. Blocks; not for the thread of an event loop.

    The resolution of the name takes as long as the system lets it, all else `max_seconds`.

    Raises:
        DataError: a URL of another form or of a host that is not allowed, an address that is not
            public, an error of the network or of TLS, a status other than 200 (redirects are not
            followed), or more bytes or time than the policy allows.
    """
    parts, host, port = _check_url(url, policy)
    place = f"{parts.scheme}://{host}"
    try:
        addresses = policy.resolve(host, port)
    except (OSError, UnicodeError) as error:
        raise DataError(f"the host has no address ({error})", place=place) from None
    if not addresses or not all(map(policy.is_allowed_address, addresses)):
        message = "the host has an address that is not of the public internet"
        raise DataError(message, place=place, fix="Send the image as a data: URL")
    try:
        return asyncio.run(_fetch(parts, host, port, addresses=addresses, policy=policy))
    except TimeoutError:
        message = f"no image within {policy.max_seconds:g} s"
        raise DataError(message, place=place, fix="Send it as a data: URL") from None
    except (OSError, h11.ProtocolError) as error:
        raise DataError(f"cannot be read ({error})", place=place) from None


def make_url_loader(policy: ImageUrlPolicy) -> Callable[[str, str], ImageRef]:
    """Return a function that turns a URL and its place in a request into an image, undecoded.

    The function raises DataError as `fetch_image`, with the place.
    """

    def load_url(url: str, place: str) -> ImageRef:
        try:
            return ImageRef(data=fetch_image(url, policy))
        except DataError as error:
            message = f"{error.place}: {error.message}" if error.place else error.message
            raise DataError(message, place=place, fix=error.fix) from None

    return load_url


def check_image_host(name: str, *, option: str) -> str:
    """Return an entry of `ImageUrlPolicy.allowed_hosts` in lower case.

    Raises:
        ConfigError: it is not the name of a host, which ``:PORT`` may follow.
    """
    host, colon, port = name.lower().partition(":")
    if colon and not (port.isdecimal() and 0 < int(port) < 65536):
        fix = "Give HOST or HOST:PORT, such as images.example.org"
        raise ConfigError(f"{name!r} is not the name of a host", place=option, fix=fix)
    return check_host_name(host, option=option) + colon + port


def _check_url(url: str, policy: ImageUrlPolicy) -> tuple[SplitResult, str, int]:
    """Return the parts of a URL, its host in lower case and its port.

    Raises:
        DataError: it is not an http or https URL of an allowed host, or contains a user name,
            blanks or characters that are not ASCII.
    """
    is_clean = url.isascii() and url.isprintable() and " " not in url
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").rstrip("."), parts.port
    except ValueError:
        is_clean = False
    if not is_clean or not host or "@" in parts.netloc or parts.scheme not in DEFAULT_PORTS:
        fix = "Send https://HOST/PATH, or the image as a data: URL"
        raise DataError("not the address of an image", fix=fix)
    default_port = DEFAULT_PORTS[parts.scheme]
    is_allowed = f"{host}:{port or default_port}" in policy.allowed_hosts or (
        host in policy.allowed_hosts and port in (None, default_port)
    )
    if not is_allowed:
        message = f"images of the host {host:.100} are not read"
        fix = "Send a data: URL, or start the server with --allow-image-host HOST"
        raise DataError(message, fix=fix)
    return parts, host, port or default_port


async def _fetch(
    parts: SplitResult, host: str, port: int, *, addresses: Sequence[str], policy: ImageUrlPolicy
) -> bytes:
    """Return the body of the response to a GET request that is sent to one of `addresses`.

    Raises TimeoutError, OSError, h11.ProtocolError, or DataError as `fetch_image`.
    """
    tls = ssl.create_default_context() if parts.scheme == "https" else None
    async with asyncio.timeout(policy.max_seconds):
        reader, writer = await _connect(addresses, port, tls=tls, host=host)
        try:
            connection = h11.Connection(h11.CLIENT)
            target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            is_default = port == DEFAULT_PORTS[parts.scheme]
            shown_host = f"[{host}]" if ":" in host else host
            headers = [
                ("Host", shown_host if is_default else f"{shown_host}:{port}"),
                ("Accept", "image/*"),
                ("Accept-Encoding", "identity"),
                ("User-Agent", "vlduet"),
                ("Connection", "close"),
            ]
            request = h11.Request(method="GET", target=target, headers=headers)
            writer.write(connection.send(request) or b"")
            writer.write(connection.send(h11.EndOfMessage()) or b"")
            await writer.drain()
            return await _read_body(connection, reader, policy, place=f"{parts.scheme}://{host}")
        finally:
            writer.transport.abort()


async def _connect(
    addresses: Sequence[str], port: int, *, tls: ssl.SSLContext | None, host: str
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect to the first address that accepts; TLS checks the certificate of `host`.

    Raises the OSError of the last address that was tried.
    """
    name = host if tls is not None else None
    *others, last = addresses[:MAX_CONNECTION_TRIES]
    for address in others:
        try:
            return await asyncio.open_connection(address, port, ssl=tls, server_hostname=name)
        except OSError:
            continue
    return await asyncio.open_connection(last, port, ssl=tls, server_hostname=name)


async def _read_body(
    connection: h11.Connection, reader: asyncio.StreamReader, policy: ImageUrlPolicy, *, place: str
) -> bytes:
    """Return the body of a response with status 200.

    Raises h11.ProtocolError, or DataError for another status and for too many bytes.
    """
    body = bytearray()
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await reader.read(65536))
        elif isinstance(event, h11.Response):
            if event.status_code != 200:
                is_redirect = 300 <= event.status_code < 400
                fix = "Send the address that it leads to" if is_redirect else None
                raise DataError(f"status {event.status_code}", place=place, fix=fix)
        elif isinstance(event, h11.Data):
            body += event.data
            if len(body) > policy.max_bytes:
                message = f"more than {policy.max_bytes >> 20} MiB"
                raise DataError(message, place=place, fix="Send a smaller image")
        elif isinstance(event, h11.EndOfMessage):
            return bytes(body)
        elif not isinstance(event, h11.InformationalResponse):
            raise h11.RemoteProtocolError("the response ended early")
