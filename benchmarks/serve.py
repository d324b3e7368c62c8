"""What one process that answers and embeds gains by taking requests together, over HTTP, by sixteen clients.

    embeddings   requests of one caption each: up to 32 items a forward, against one item a forward
    answers      conversations of 32 tokens: up to 8 side by side, against one after the other
    both         an embedding alone; one while 4 conversations are answered, between their tokens; and how long these
                 went on, which is what it would wait behind a lock around the model

The same server answers all; what differs are its two constants.

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
from vlduet.serve import scheduler
from vlduet.serve import worker as workers
from vlduet.serve.app import Service, build_server
from vlduet.serve.worker import Worker

CLIENTS, TOKENS = 16, 32


@contextmanager
def served(model: DuetModel) -> Iterator[int]:
    """The port of a server."""
    listening = socket.create_server(("127.0.0.1", 0))
    worker = Worker(model)
    serving = build_server(Service(worker, name="bench").build_app())
    thread = threading.Thread(target=serving.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield listening.getsockname()[1]
    finally:
        serving.should_exit = True
        thread.join()
        worker.close()


def post(port: int, path: str, body: dict[str, Any]) -> dict[str, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    told: dict[str, Any] = json.loads(answer.read())
    assert answer.status == 200, told
    return told


def embed(port: int, text: str) -> None:
    post(port, "/v1/embeddings", {"input": text})


def chat(port: int, text: str, *, tokens: int = TOKENS) -> None:
    told = post(
        port,
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": text}], "max_tokens": tokens},
    )
    assert told["usage"]["completion_tokens"] == tokens, "every answer is as long as asked"


def together(work: Callable[[str], None], texts: list[str]) -> None:
    """All of them, by all clients."""
    with ThreadPoolExecutor(CLIENTS) as clients:
        list(clients.map(work, texts))


def waited(
    port: int, texts: list[str], ask: Callable[[int, str], None], *, talks: int
) -> tuple[float, float]:
    """Seconds that something takes, asked half a second into the answers; and those until all of these have ended."""
    answering = [threading.Thread(target=chat, args=(port, text)) for text in texts[:scheduler]]
    for thread in answering:
        thread.start()
    time.sleep(0.5)
    began = time.perf_counter()
    ask(port, texts[scheduler])
    took = time.perf_counter() - began
    for thread in answering:
        thread.join()
    return took, time.perf_counter() - began


def waits(
    port: int, texts: list[str], ask: Callable[[int, str], None], *, title: str, repeats: int
) -> None:
    """Print what somebody waits for `ask`, alone and beside others."""
    alone = [waited(port, texts, ask, talks=0)[0] for _ in range(repeats)]
    beside = [waited(port, texts, ask, talks=4) for _ in range(repeats)]
    rows = {
        "alone": alone,
        "while 4 conversations are answered": [took for took, _ in beside],
        "if it had to wait until they end": [
            took + alone for (_, took), alone in zip(beside, alone, strict=True)
        ],
    }
    print(f"\n{title}, ms")
    for name, took in rows.items():
        print(
            f"  {name:42} {statistics.median(took) * 1e3:12.0f}   {min(took) * 1e3:.0f} - {max(took) * 1e3:.0f}"
        )


def main() -> None:
    options = _bench.arguments(__doc__).parse_args()
    repeats = options.repeats or (1 if options.quick else 5)
    model = DuetModel.from_pretrained(_bench.model_folder(options.model))
    model.renderer.eos_token_ids = []  # every answer is as long as asked
    texts = [caption for record in _bench.pairs(options.data) for caption in record.short][
        : 16 if options.quick else 96
    ]
    _bench.machine()
    with served(model) as port:
        embed(port, texts[0])

        def with_constant(
            module: ModuleType, name: str, value: int, run: Callable[[], None]
        ) -> None:
            with patch.object(module, name, value):
                run()

        items = partial(together, partial(embed, port), texts)
        contenders = {
            "vlduet": items,
            "one item a forward": partial(with_constant, workers, "TURN", 1, items),
        }
        seconds = _bench.interleaved(contenders, repeats)
        _bench.table(
            "embeddings, one a request", "requests/s", seconds, work=len(texts), ours="vlduet"
        )

        answers = partial(together, partial(chat, port), texts[:8])
        contenders = {
            "vlduet": answers,
            "one after the other": partial(with_constant, scheduler, "TALKS", 1, answers),
        }
        seconds = _bench.interleaved(contenders, repeats)
        _bench.table("answers", "tokens/s", seconds, work=8 * TOKENS, ours="vlduet")

        waits(port, texts, embed, title="one embedding", repeats=repeats)
        waits(
            port,
            texts,
            partial(chat, tokens=1),
            title="the first word of an answer",
            repeats=repeats,
        )


if __name__ == "__main__":
    main()
