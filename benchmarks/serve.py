"""Measure what the server gains by batching requests, over HTTP, with sixteen clients.

    embeddings   requests of one caption each: up to 32 items per forward pass, against one item
    chats        answers of 32 tokens: up to 8 concurrent chats, against one after the other
    both         latency of an embedding and of a first token: alone, and while 4 chats run; and the
                 time until these chats end, which a lock around the model would add

The same server serves all contenders, which differ in its two constants.

    python benchmarks/serve.py [--quick] [--model DIR] [--data FILE]
"""

from __future__ import annotations

import http.client
import json
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import Any
from unittest.mock import patch

import _bench

from vlduet.model.duet import DuetModel
from vlduet.serve import scheduler as scheduler_module
from vlduet.serve import worker as worker_module
from vlduet.serve.app import Service, build_server
from vlduet.serve.worker import Worker

NUM_CLIENTS = 16
ANSWER_TOKENS = 32
"""Length of every answer; the model's end tokens are removed."""
NUM_RUNNING_CHATS = 4
"""Number of chats that run while a latency is measured."""

Send = Callable[[int, str], None]
"""Function that sends a request with a text to a port and waits for the response."""


@contextmanager
def run_server(model: DuetModel) -> Iterator[int]:
    """Serve a model in a thread and yield the port."""
    listening_socket = socket.create_server(("127.0.0.1", 0))
    worker = Worker(model)
    server = build_server(Service(worker, name="bench").build_app())
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening_socket]})
    thread.start()
    try:
        yield listening_socket.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()
        worker.close()


def post(port: int, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """Send a request and return the body of the response, whose status must be 200."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    values: dict[str, Any] = json.loads(response.read())
    assert response.status == 200, values
    return values


def embed(port: int, text: str) -> None:
    """Request the embedding of a text."""
    post(port, "/v1/embeddings", {"input": text})


def chat(port: int, text: str, *, num_tokens: int = ANSWER_TOKENS) -> None:
    """Request an answer, which must have exactly `num_tokens` tokens."""
    messages = [{"role": "user", "content": text}]
    body = {"messages": messages, "max_tokens": num_tokens}
    usage = post(port, "/v1/chat/completions", body)["usage"]
    assert usage["completion_tokens"] == num_tokens


def send_all(port: int, texts: list[str], send: Send) -> None:
    """Send one request per text from all clients and wait for the responses."""
    with ThreadPoolExecutor(NUM_CLIENTS) as clients:
        list(clients.map(partial(send, port), texts))


def send_all_with_constant(
    port: int, texts: list[str], send: Send, *, module: ModuleType, constant: str
) -> None:
    """Send all requests while a constant of the server is 1, which turns batching off."""
    with patch.object(module, constant, 1):
        send_all(port, texts, send)


def measure_latency(
    port: int, texts: list[str], send: Send, *, num_chats: int
) -> tuple[float, float]:
    """Measure one request that starts half a second after `num_chats` chats.

    Returns:
        Seconds until its response, and seconds until that and the end of all chats.
    """
    threads = [threading.Thread(target=chat, args=(port, text)) for text in texts[:num_chats]]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    start = time.perf_counter()
    send(port, texts[num_chats])
    latency = time.perf_counter() - start
    for thread in threads:
        thread.join()
    return latency, time.perf_counter() - start


def print_latencies(port: int, texts: list[str], send: Send, *, title: str, repeats: int) -> None:
    """Print the latency of a request: alone, during chats, and if it waited for their end."""
    alone, during_chats, after_chats = [], [], []
    for _ in range(repeats):
        latency, _ = measure_latency(port, texts, send, num_chats=0)
        alone.append(latency)
    for latency_alone in alone:
        latency, end = measure_latency(port, texts, send, num_chats=NUM_RUNNING_CHATS)
        during_chats.append(latency)
        after_chats.append(end + latency_alone)
    print(f"\n{title}, ms")
    rows = {
        "alone": alone,
        f"while {NUM_RUNNING_CHATS} chats run": during_chats,
        "if it had to wait for their end": after_chats,
    }
    for name, seconds in rows.items():
        low, middle, high = min(seconds), statistics.median(seconds), max(seconds)
        print(f"  {name:42} {middle * 1e3:12.0f}   {low * 1e3:.0f} - {high * 1e3:.0f}")


def main() -> None:
    """Run the benchmark."""
    options = _bench.build_parser(__doc__).parse_args()
    repeats = options.repeats or (1 if options.quick else 5)
    model = DuetModel.from_pretrained(_bench.find_model_folder(options.model))
    model.renderer.eos_token_ids = []
    texts = [caption for record in _bench.load_pairs(options.data) for caption in record.short]
    texts = texts[: 16 if options.quick else 96]
    _bench.print_machine()
    with run_server(model) as port:
        embed(port, texts[0])

        requests = (port, texts, embed)
        unbatched = {"module": worker_module, "constant": "TEXTS_PER_EMBEDDING_TURN"}
        contenders = {
            "vlduet": partial(send_all, *requests),
            "one item per forward": partial(send_all_with_constant, *requests, **unbatched),
        }
        seconds = _bench.time_in_turns(contenders, repeats)
        title = "embeddings, one per request"
        _bench.print_ratios(title, "requests/s", seconds, work=len(texts), reference="vlduet")

        requests = (port, texts[:8], chat)
        unbatched = {"module": scheduler_module, "constant": "MAX_CONCURRENT_CHATS"}
        contenders = {
            "vlduet": partial(send_all, *requests),
            "one chat after the other": partial(send_all_with_constant, *requests, **unbatched),
        }
        seconds = _bench.time_in_turns(contenders, repeats)
        _bench.print_ratios(
            "chats", "tokens/s", seconds, work=8 * ANSWER_TOKENS, reference="vlduet"
        )

        print_latencies(port, texts, embed, title="one embedding", repeats=repeats)
        first_token = partial(chat, num_tokens=1)
        print_latencies(port, texts, first_token, title="first token of an answer", repeats=repeats)


if __name__ == "__main__":
    main()
