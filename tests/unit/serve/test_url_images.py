"""Images at URLs: which addresses are read, from where, and for how long."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from vlduet.errors import ConfigError, DataError
from vlduet.serve.url_images import (
    ImageUrlPolicy,
    check_image_host,
    fetch_image,
    is_public,
    make_url_loader,
    resolve_host,
)

HOST = "images.example.org"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nbits"


@contextmanager
def serve(*parts: bytes, pause: float = 0.0) -> Iterator[tuple[int, list[bytes]]]:
    """Answer connections to a local port with `parts`; yield the port and the requests."""
    requests: list[bytes] = []
    listener = socket.create_server(("127.0.0.1", 0))

    def answer() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            with client:
                requests.append(client.recv(65536))
                try:
                    for part in parts:
                        client.sendall(part)
                        time.sleep(pause)
                except OSError:
                    continue

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1], requests
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(10)


def make_policy(port: int, **options: object) -> ImageUrlPolicy:
    """Return a policy for a local server under the name HOST."""
    defaults: dict[str, object] = {
        "allowed_hosts": [f"{HOST}:{port}"],
        "resolve": lambda host, port: ["127.0.0.1"],
        "is_allowed_address": lambda address: address == "127.0.0.1",
        "max_seconds": 10.0,
    }
    return ImageUrlPolicy(**(defaults | options))  # type: ignore[arg-type]


def test_an_image_of_an_allowed_host_is_read():
    with serve(OK) as (port, requests):
        assert fetch_image(f"http://{HOST}:{port}/a%20b.png?x=1", make_policy(port)) == b"bits"
    head, _, _ = requests[0].partition(b"\r\n\r\n")
    assert head.startswith(b"GET /a%20b.png?x=1 HTTP/1.1\r\n")
    assert f"Host: {HOST}:{port}".encode() in head


def test_a_loader_returns_the_bytes_undecoded_and_names_the_field():
    with serve(OK) as (port, _):
        load_url = make_url_loader(make_policy(port))
        assert load_url(f"http://{HOST}:{port}/", "input[0]").data == b"bits"
    with pytest.raises(DataError, match=r"^input\[1\]: images of the host other.example"):
        load_url("http://other.example/", "input[1]")


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "127.8.8.8", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254",
        "100.64.0.1", "0.0.0.0", "224.0.0.1", "239.1.1.1", "240.0.0.1", "255.255.255.255",
        "198.18.0.1", "192.0.2.1", "::", "::1", "fe80::1", "fe80::1%eth0", "fc00::1", "fd12::1",
        "ff02::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254",
        "64:ff9b::7f00:1", "64:ff9b:1::a00:1", "2002:7f00:1::", "2001:0:7f00:1::", "2001:db8::1",
        "::127.0.0.1", "fec0::1", "", "localhost",
    ],
)  # fmt: skip
def test_addresses_that_are_not_public_are_refused(address):
    assert not is_public(address)


@pytest.mark.parametrize(
    "address", ["93.184.215.14", "8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8"]
)
def test_public_addresses_are_accepted(address):
    assert is_public(address)


@pytest.mark.parametrize(
    "addresses", [["127.0.0.1"], ["8.8.8.8", "10.0.0.1"], ["::ffff:127.0.0.1"], []]
)
def test_a_name_with_any_address_that_is_not_public_is_refused(addresses):
    with serve(OK) as (port, requests):
        policy = ImageUrlPolicy([f"{HOST}:{port}"], resolve=lambda host, port: addresses)
        with pytest.raises(DataError, match="not of the public internet"):
            fetch_image(f"http://{HOST}:{port}/", policy)
        assert requests == []


def test_the_connection_is_made_to_the_address_that_was_checked():
    answers = iter([["127.0.0.1"], ["127.0.0.2"]])
    with serve(OK) as (port, requests):
        policy = make_policy(port, resolve=lambda host, port: next(answers))
        assert fetch_image(f"http://{HOST}:{port}/", policy) == b"bits"
    assert len(requests) == 1 and next(answers) == ["127.0.0.2"], "resolved once"


@pytest.mark.parametrize(
    "url",
    [
        "http://other.example/", f"http://{HOST}/", f"http://{HOST}:22/", f"https://{HOST}:443/",
        f"http://sub.{HOST}:PORT/", "file:///etc/passwd", "ftp://images.example.org:PORT/",
        "http:///x", f"http://user@{HOST}:PORT/", f"http://{HOST}:PORT\\@127.0.0.1/", "http://[::1/",
        f"http://{HOST}:99999/", f"http://{HOST}:PORT/a\r\nX: y", f"http://{HOST}:PORT/a b",
        "http://127.0.0.1:PORT/", "http://2130706433:PORT/", f"http://{HOST}：PORT/",
    ],
)  # fmt: skip
def test_other_urls_are_refused_without_a_connection(url):
    with serve(OK) as (port, requests):
        with pytest.raises(DataError):
            fetch_image(url.replace("PORT", str(port)), make_policy(port))
        assert requests == []


@pytest.mark.parametrize("status", [b"301 Moved", b"302 Found", b"307 T", b"404 No", b"500 No"])
def test_redirects_and_errors_are_refused(status):
    head = b"HTTP/1.1 " + status + b"\r\nLocation: http://127.0.0.1/\r\nContent-Length: 0\r\n\r\n"
    message = f"status {status[:3].decode()}"
    with serve(head) as (port, requests), pytest.raises(DataError, match=message):
        fetch_image(f"http://{HOST}:{port}/", make_policy(port))
    assert len(requests) == 1


@pytest.mark.parametrize("head", [b"Content-Length: 999999", b"Connection: close"])
def test_a_large_image_is_not_read_to_its_end(head):
    parts = [b"HTTP/1.1 200 OK\r\n" + head + b"\r\n\r\n", *[b"x" * 10_000] * 99]
    with serve(*parts) as (port, _), pytest.raises(DataError, match="more than"):
        fetch_image(f"http://{HOST}:{port}/", make_policy(port, max_bytes=20_000))


@pytest.mark.parametrize(
    "parts",
    [
        [b"H", *[b"T"] * 100],
        [b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n", *[b"x"] * 100],
        [b"HTTP/1.1 200 OK\r\n", *[b"X-A: b\r\n"] * 100],
    ],
)
def test_a_slow_response_ends_in_time(parts):
    with serve(*parts, pause=0.02) as (port, _), pytest.raises(DataError, match=r"within 0\.2 s"):
        fetch_image(f"http://{HOST}:{port}/", make_policy(port, max_seconds=0.2))


@pytest.mark.parametrize(
    "parts", [[], [b"no HTTP\r\n\r\n"], [OK[:-1]], [b"HTTP/1.1 200 OK\r\n" + b"X" * 99999]]
)
def test_a_broken_response_is_an_error(parts):
    with serve(*parts) as (port, _), pytest.raises(DataError, match="cannot be read"):
        fetch_image(f"http://{HOST}:{port}/", make_policy(port))


def test_a_server_without_tls_is_an_error_at_https():
    with serve(OK) as (port, _), pytest.raises(DataError, match="cannot be read"):
        fetch_image(f"https://{HOST}:{port}/", make_policy(port))


def test_an_unknown_host_is_an_error():
    def fail(host: str, port: int) -> list[str]:
        raise socket.gaierror(-2, "Name or service not known")

    policy = ImageUrlPolicy([HOST], resolve=fail)
    with pytest.raises(DataError, match="no address"):
        fetch_image(f"http://{HOST}/", policy)


def test_the_next_address_is_tried_if_one_refuses():
    with serve(OK) as (port, _):
        policy = make_policy(
            port, resolve=lambda host, port: ["127.0.0.3", "127.0.0.1"], is_allowed_address=bool
        )
        assert fetch_image(f"http://{HOST}:{port}/", policy) == b"bits"


def test_addresses_are_resolved_without_repetition():
    assert resolve_host("127.0.0.1", 80) == ["127.0.0.1"]


@pytest.mark.parametrize(("name", "entry"), [("A.example", "a.example"), ("a.b:8080", "a.b:8080")])
def test_hosts_of_the_option_are_compared_in_lower_case(name, entry):
    assert check_image_host(name, option="--x") == entry


@pytest.mark.parametrize("name", ["", "*", "https://a.b", "a.b:", "a.b:0", "a.b:x", "a b", "a.b/c"])
def test_other_values_of_the_option_are_refused(name):
    with pytest.raises(ConfigError, match="--x"):
        check_image_host(name, option="--x")
