"""Clients of a server under mixed load: each sends one kind of request again and again.

Server      port and process of a running `vlduet serve`, and one request to it
Outcomes    what all clients saw: counts, latencies, and everything that was not expected
CLIENTS     kind of load -> function that sends one request of it
"""

from __future__ import annotations

import base64
import http.client
import json
import random
import socket
import struct
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vlduet.data import images

REQUEST_SECONDS = 300
"""Longest time that a response may take: a busy server is slow, and one that hangs is wrong."""
COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (40, 60, 220)}
NUM_PICTURES = 24
"""Number of different pictures that are embedded, so that the cache of features has an end."""
NUM_IDLE_CONNECTIONS = 20
IDLE_SECONDS = 10
SLOW_PIECE_BYTES = 16
SLOW_PAUSE_SECONDS = 0.25


@dataclass(frozen=True)
class Server:
    """A running server."""

    port: int
    pid: int

    def request(self, path: str, body: object = None) -> tuple[int, Any]:
        """Send a GET request, or a POST request with a body, and return status and JSON body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=REQUEST_SECONDS)
        try:
            data = None if body is None else json.dumps(body)
            headers = {"Content-Type": "application/json"}
            connection.request("GET" if body is None else "POST", path, data, headers)
            response = connection.getresponse()
            content = response.read()
            return response.status, json.loads(content) if content else None
        finally:
            connection.close()

    def expect(self, path: str, body: object, status: int = 200) -> Any:
        """Return the body of the response to a request; raise AssertionError for another status."""
        received, content = self.request(path, body)
        assert received == status, f"{path}: status {received}, not {status}: {content}"[:500]
        return content

    def open_request(self, path: str, body: object) -> socket.socket:
        """Send a POST request and return the connection; nothing is read."""
        data = json.dumps(body).encode()
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=REQUEST_SECONDS)
        connection.sendall(request_head(path, len(data)) + data)
        return connection


@dataclass
class Outcomes:
    """What the clients saw; several threads add to it."""

    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    """Kind of load -> duration of every request that went as expected."""
    errors: list[str] = field(default_factory=list)
    """Everything that did not, with its kind and the time since the start."""
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _start: float = field(default_factory=time.monotonic)

    def run(self, kind: str, function: Callable[[], None]) -> None:
        """Call a function that sends a request, and note its duration or its error."""
        start = time.monotonic()
        try:
            function()
        except Exception as error:  # noqa: BLE001 - reported at the end
            elapsed = time.monotonic() - self._start
            with self._lock:
                text = f"{type(error).__name__}: {error}"[:500]
                self.errors.append(f"{elapsed:.0f} s: {kind}: {text}")
            time.sleep(1)  # a server that has ended is not asked thousands of times
        else:
            with self._lock:
                self.seconds[kind].append(time.monotonic() - start)

    def summarize(self) -> dict[str, dict[str, float]]:
        """Return kind of load -> number of requests, and their median and 95th percentile in s."""
        rows = {}
        for kind, seconds in sorted(self.seconds.items()):
            p50, p95 = np.percentile(seconds, [50, 95])
            rows[kind] = {"requests": len(seconds), "p50": round(p50, 3), "p95": round(p95, 3)}
        return rows

    def count_errors(self) -> dict[str, int]:
        """Return kind of load -> number of errors."""
        return dict(Counter(error.split(":")[1].strip() for error in self.errors))


def request_head(path: str, num_bytes: int) -> bytes:
    """Return the head of a POST request with a JSON body of so many bytes."""
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: 127.0.0.1",
        "Content-Type: application/json",
        f"Content-Length: {num_bytes}",
        "",
        "",
    ]
    return "\r\n".join(lines).encode()


def draw_picture(seed: int) -> tuple[str, bytes]:
    """Return the name of a colour and a PNG of a square of it on noise; the same for a seed."""
    generator = np.random.default_rng(seed)
    name = list(COLOURS)[seed % len(COLOURS)]
    pixels = generator.integers(0, 256, (48, 48, 3), dtype=np.uint8)
    pixels[12:36, 12:36] = COLOURS[name]
    return name, images.encode_png(images.from_pixels(pixels))


def picture_part(seed: int) -> dict[str, Any]:
    """Return the part of a content that holds a picture."""
    _, data = draw_picture(seed)
    url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


# ------------------------------------------------------------------ kinds of load


def chat_whole(server: Server, rng: random.Random) -> None:
    """Ask about a picture or from the index, and read the answer as a whole."""
    question: Any = "What is a red square?"
    body: dict[str, Any] = {"max_tokens": rng.randint(1, 12), "temperature": 0}
    if rng.random() < 0.5:
        body["retrieval"] = {"k": 2}
    else:
        question = [picture_part(rng.randrange(NUM_PICTURES)), {"type": "text", "text": "What?"}]
    body["messages"] = [{"role": "user", "content": question}]
    answer = server.expect("/v1/chat/completions", body)
    assert answer["usage"]["completion_tokens"] <= body["max_tokens"], answer
    assert answer["choices"][0]["finish_reason"] in ("stop", "length"), answer
    assert "retrieval" not in body or len(answer["sources"]) == 2, answer


def chat_streamed(server: Server, rng: random.Random) -> None:
    """Read an answer as a stream of events, which must end with [DONE]."""
    messages = [{"role": "user", "content": "Tell me about " + rng.choice(list(COLOURS))}]
    body = {"messages": messages, "max_tokens": rng.randint(2, 24), "stream": True}
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=REQUEST_SECONDS)
    try:
        data = json.dumps(body)
        connection.request(
            "POST", "/v1/chat/completions", data, {"Content-Type": "application/json"}
        )
        response = connection.getresponse()
        text = response.read().decode()
        assert response.status == 200, f"status {response.status}: {text[:200]}"
    finally:
        connection.close()
    events = [line.removeprefix("data: ") for line in text.splitlines() if line]
    assert events[-1] == "[DONE]" and '"error"' not in text, events[-2:]
    assert json.loads(events[-2])["choices"][0]["finish_reason"] in ("stop", "length"), events[-2]


def embed(server: Server, rng: random.Random) -> None:
    """Embed texts of many lengths, pictures and mixtures, and check their norms."""
    inputs: list[Any] = []
    for _ in range(rng.randint(1, 6)):
        text = "a square of one colour " * rng.choice([1, 1, 2, 10, 60])
        part = picture_part(rng.randrange(NUM_PICTURES))
        inputs.append(rng.choice([text, [part], [part, {"type": "text", "text": text}]]))
    result = server.expect("/v1/embeddings", {"input": inputs})
    vectors = np.array([row["embedding"] for row in result["data"]])
    assert len(vectors) == len(inputs) and result["usage"]["total_tokens"] > 0, result["usage"]
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-3), "not of unit length"


def search(server: Server, rng: random.Random) -> None:
    """Search with a filter on the colour, which every hit must have."""
    colour = rng.choice(list(COLOURS))
    query: Any = f"a {colour} square"
    if rng.random() < 0.3:
        query = [picture_part(rng.randrange(NUM_PICTURES))]
    body = {"query": query, "k": rng.randint(1, 10), "where": {"colour": colour}}
    hits = server.expect("/v1/search", body)["data"]
    assert 0 < len(hits) <= body["k"], hits
    assert {hit["metadata"]["colour"] for hit in hits} == {colour}, hits


def send_wrong_request(server: Server, rng: random.Random) -> None:
    """Send a request that cannot be answered, which must get status 400."""
    wrong = [
        ("/v1/embeddings", {"input": "long " * 20_000}),
        ("/v1/embeddings", {"input": []}),
        ("/v1/search", {"query": "a", "where": {"no such key": 1}}),
        ("/v1/chat/completions", {"messages": []}),
    ]
    path, body = rng.choice(wrong)
    content = server.expect(path, body, 400)
    assert content["error"]["message"], content


def reset_connection(server: Server, rng: random.Random) -> None:
    """Send a request, read nothing or a little, and reset the connection (RST)."""
    chat = {"messages": [{"role": "user", "content": "Go on"}], "max_tokens": 200, "stream": True}
    bodies = [("/v1/chat/completions", chat), ("/v1/embeddings", {"input": ["a b c"] * 20})]
    connection = server.open_request(*rng.choice(bodies))
    with connection:
        time.sleep(rng.random())
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def send_slowly(server: Server, rng: random.Random) -> None:
    """Send a request in small pieces with pauses; it is answered, or its connection is closed."""
    data = json.dumps({"input": ["slow"] * rng.randint(1, 20)}).encode()
    data = request_head("/v1/embeddings", len(data)) + data
    with socket.create_connection(("127.0.0.1", server.port), timeout=REQUEST_SECONDS) as client:
        for start in range(0, len(data), SLOW_PIECE_BYTES):
            client.sendall(data[start : start + SLOW_PIECE_BYTES])
            time.sleep(SLOW_PAUSE_SECONDS)
        response = client.recv(64)
    assert response.startswith((b"HTTP/1.1 200", b"HTTP/1.1 408")), response


def stay_idle(server: Server, rng: random.Random) -> None:
    """Open connections that send nothing for a while; the server may close them."""
    connections = [
        socket.create_connection(("127.0.0.1", server.port), timeout=REQUEST_SECONDS)
        for _ in range(NUM_IDLE_CONNECTIONS)
    ]
    time.sleep(IDLE_SECONDS * rng.random())
    for connection in connections:
        connection.close()


CLIENTS: dict[str, Callable[[Server, random.Random], None]] = {
    "chat, whole": chat_whole,
    "chat, streamed": chat_streamed,
    "embeddings": embed,
    "search": search,
    "wrong request": send_wrong_request,
    "reset connection": reset_connection,
    "slow client": send_slowly,
    "idle clients": stay_idle,
}
