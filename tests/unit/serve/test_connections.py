"""Slow, idle and greedy clients over real sockets: each is ended in time and blocks no other."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from vlduet.serve.limits import ServerLimits
from vlduet.serve.server import build_server

LONG = 30.0
"""Limit in seconds that no test reaches."""
MAX_WAIT = 10.0
"""Seconds after which a client gives up, and its test fails."""


async def measure_body(request: Request) -> Response:
    """Respond with the size of the body."""
    return PlainTextResponse(str(len(await request.body())))


async def ignore_body(_: Request) -> Response:
    return PlainTextResponse("ignored")


async def stream_for_ever(request: Request) -> Response:
    async def parts():
        try:
            while True:
                await asyncio.sleep(0)
                yield b"x" * 65536
        finally:
            request.app.state.stream_ended.set()

    return StreamingResponse(parts())


async def wait(request: Request) -> Response:
    """Respond after the event that the test sets."""
    await asyncio.to_thread(request.app.state.release.wait, LONG)
    return PlainTextResponse("waited")


@contextmanager
def serve(**limits: float) -> Iterator[tuple[int, Starlette]]:
    """Serve the routes of this file with other limits; yield the port and the application."""
    routes = [
        Route("/body", measure_body, methods=["GET", "POST"]),
        Route("/ignore", ignore_body, methods=["POST"]),
        Route("/stream", stream_for_ever),
        Route("/wait", wait),
    ]
    app = Starlette(routes=routes)
    app.state.stream_ended, app.state.release = threading.Event(), threading.Event()
    all_limits = {"head_seconds": LONG, "body_seconds": LONG, "idle_seconds": LONG} | limits
    server = build_server(app, limits=ServerLimits(**all_limits))  # type: ignore[arg-type]
    listening_socket = socket.create_server(("127.0.0.1", 0))
    port = listening_socket.getsockname()[1]
    thread = threading.Thread(
        target=server.run, kwargs={"sockets": [listening_socket]}, daemon=True
    )
    thread.start()
    try:
        yield port, app
    finally:
        app.state.release.set()
        server.should_exit = True
        thread.join(LONG)
        assert not thread.is_alive()


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=MAX_WAIT)


def read_to_end(client: socket.socket) -> bytes:
    """Return what the server sends until it closes the connection, in whatever way."""
    data = b""
    try:
        while part := client.recv(65536):
            data += part
    except ConnectionResetError:
        pass
    return data


def read_response(client: socket.socket) -> bytes:
    """Return one response with a Content-Length; the connection stays open."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += client.recv(1)
    length = int(data.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
    while not data.partition(b"\r\n\r\n")[2][length - 1 :] and length:
        data += client.recv(65536)
    return data


def get(port: int, path: str = "/body") -> bytes:
    """Return the response to a GET request on a connection of its own."""
    with connect(port) as client:
        client.sendall(f"GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n".encode())
        return read_to_end(client)


def trickle(client: socket.socket, *, seconds: float) -> bytes:
    """Send one byte every few milliseconds until the server closes; return its response."""
    client.settimeout(0.02)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            client.send(b"a")
            data = client.recv(65536)
            return data + read_to_end(client)
        except TimeoutError:
            continue
        except OSError:
            return b""
    pytest.fail("the server waits for a client that sends one byte at a time")


def test_a_head_that_arrives_byte_by_byte_is_ended_with_408():
    with serve(head_seconds=0.2) as (port, _), connect(port) as client:
        client.sendall(b"GET /body HTTP/1.1\r\nHost: a\r\nX: ")
        response = trickle(client, seconds=10)
    assert response.startswith(b"HTTP/1.1 408 ")
    body = json.loads(response.partition(b"\r\n\r\n")[2])
    assert "head of the request" in body["error"]["message"]


def test_a_body_that_arrives_byte_by_byte_is_ended_with_408():
    with serve(body_seconds=0.2) as (port, _), connect(port) as client:
        client.sendall(b"POST /body HTTP/1.1\r\nHost: a\r\nContent-Length: 99999\r\n\r\n")
        response = trickle(client, seconds=10)
    assert response.startswith(b"HTTP/1.1 408 ") and b"connection: close" in response.lower()


def test_a_body_at_a_fair_rate_may_take_longer():
    # 0.2 s, and a second for each kilobyte: enough for parts that need 0.6 s.
    with serve(body_seconds=0.2, min_body_rate=1000) as (port, _), connect(port) as client:
        client.sendall(b"POST /body HTTP/1.1\r\nHost: a\r\nContent-Length: 7000\r\n\r\n")
        for _ in range(7):
            client.sendall(b"a" * 1000)
            time.sleep(0.08)
        assert read_response(client).endswith(b"7000")


def test_a_connection_without_a_request_is_closed_silently():
    with serve(head_seconds=0.1) as (port, _), connect(port) as client:
        assert read_to_end(client) == b""


def test_a_connection_is_closed_some_time_after_its_last_response():
    with serve(idle_seconds=0.1) as (port, _), connect(port) as client:
        for _ in range(2):
            client.sendall(b"GET /body HTTP/1.1\r\nHost: a\r\n\r\n")
            assert read_response(client).endswith(b"0")
        assert read_to_end(client) == b""


def test_the_time_for_a_second_head_begins_with_its_first_byte():
    with serve(head_seconds=0.1) as (port, _), connect(port) as client:
        client.sendall(b"GET /body HTTP/1.1\r\nHost: a\r\n\r\n")
        read_response(client)
        client.sendall(b"GET")
        assert b" 408 " in read_to_end(client)


def test_a_body_after_its_response_is_not_read_for_ever():
    with serve(head_seconds=0.2) as (port, _), connect(port) as client:
        client.sendall(b"POST /ignore HTTP/1.1\r\nHost: a\r\nContent-Length: 99999\r\n\r\n")
        assert read_response(client).endswith(b"ignored")
        assert trickle(client, seconds=10) == b""


def test_fifty_idle_clients_block_nobody():
    with serve(max_connections=8) as (port, _), ExitStack() as stack:
        for number in range(50):
            client = stack.enter_context(connect(port))
            if number % 2:
                client.sendall(b"GET /body HTTP/1.1\r\nHo")
        for _ in range(3):
            assert get(port).endswith(b"0")


def test_the_connection_that_has_waited_longest_is_closed_for_a_new_one():
    with serve(max_connections=2) as (port, _), connect(port) as first, connect(port) as second:
        for client in (second, first):
            client.sendall(b"GET /body HTTP/1.1\r\nHost: a\r\n\r\n")
            read_response(client)
        assert get(port).endswith(b"0")
        assert read_to_end(second) == b"", "the second one was served first"
        first.sendall(b"GET /body HTTP/1.1\r\nHost: a\r\n\r\n")
        assert read_response(first).endswith(b"0")


def test_a_request_that_is_served_keeps_its_connection():
    with serve(max_connections=1) as (port, app), connect(port) as client:
        client.sendall(b"GET /wait HTTP/1.1\r\nHost: a\r\n\r\n")
        time.sleep(0.1)
        response = get(port)
        assert response.startswith(b"HTTP/1.1 503 ") and b"too many connections" in response
        app.state.release.set()
        assert read_response(client).endswith(b"waited")


def test_a_client_that_does_not_read_is_disconnected():
    with serve(write_seconds=0.2) as (port, app), connect(port) as client:
        client.sendall(b"GET /stream HTTP/1.1\r\nHost: a\r\n\r\n")
        assert app.state.stream_ended.wait(10)


@pytest.mark.parametrize("is_announced", [True, False])
def test_a_large_body_is_refused_after_it_was_sent(is_announced):
    with serve(max_body_bytes=100_000) as (port, _), connect(port) as client:
        if is_announced:
            client.sendall(b"POST /body HTTP/1.1\r\nHost: a\r\nContent-Length: 150000\r\n\r\n")
            client.sendall(b"a" * 150_000)
        else:
            client.sendall(b"POST /body HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
            for _ in range(15):
                client.sendall(b"2710\r\n" + b"a" * 10_000 + b"\r\n")
            client.sendall(b"0\r\n\r\n")
        assert read_to_end(client).startswith(b"HTTP/1.1 413 ")


def test_a_large_body_that_waits_for_permission_is_refused_before():
    with serve(max_body_bytes=100) as (port, _), connect(port) as client:
        head = (
            b"POST /body HTTP/1.1\r\nHost: a\r\nContent-Length: 101\r\nExpect: 100-continue\r\n\r\n"
        )
        client.sendall(head)
        assert read_to_end(client).startswith(b"HTTP/1.1 413 ")


def test_a_body_of_the_largest_size_is_accepted():
    with serve(max_body_bytes=100) as (port, _), connect(port) as client:
        client.sendall(
            b"POST /body HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n" + b"a" * 100
        )
        assert read_response(client).endswith(b"100")


@pytest.mark.parametrize("data", [b"\x16\x03\x01\x02\x00\x01\x00", b"GET\r\n\r\n", b"\0" * 100_000])
def test_other_protocols_get_an_error_as_json(data):
    with serve() as (port, _), connect(port) as client:
        client.sendall(data + b"\r\n\r\n")
        response = read_to_end(client)
        assert response.startswith(b"HTTP/1.1 400 ") or not response
        assert get(port).endswith(b"0")
