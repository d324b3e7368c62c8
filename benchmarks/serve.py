"""Measure `vlduet serve` over HTTP, beside `transformers serve` and vLLM where they are installed.

    gaps         time between two tokens of a streamed chat, alone and while lists of texts of 1,500
                 characters are embedded
    chats        tokens a second and time to the first token, with 1, 8 and 32 clients
    embeddings   captions a second, one in a request, with 1, 8 and 32 clients

Every server is a process of its own with the same model. All measurements have a fixed time: what
is not answered then does not count.

    python benchmarks/serve.py [--quick] [--model DIR] [--data FILE]
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import _bench
import numpy as np

from vlduet.logs import logger

CLIENT_COUNTS = (1, 8, 32)
ANSWER_TOKENS = 32
CHUNK_CHARS = 1500
CHUNKS_PER_REQUEST = 8
NUM_INGESTING_CLIENTS = 2
START_SECONDS = 300


@dataclass(frozen=True)
class Contender:
    """A server that is started, measured and ended."""

    name: str
    command: list[str]
    """Program and arguments, without those that name the port."""
    model: str
    """Name of the model in requests."""
    embeds: bool = True


@dataclass
class Stream:
    """Times at which the tokens of one streamed answer arrived."""

    start: float
    token_times: list[float] = field(default_factory=list)

    @property
    def first_token_seconds(self) -> float | None:
        """Time to the first token; None if none arrived."""
        return self.token_times[0] - self.start if self.token_times else None

    @property
    def gaps(self) -> list[float]:
        """Seconds between neighbouring tokens."""
        return list(np.diff(self.token_times))


def list_contenders(model: Path) -> list[Contender]:
    """Return all servers that are installed, ours first."""
    folder = str(model.resolve())
    contenders = [
        Contender("vlduet serve", [sys.executable, "-m", "vlduet", "serve", folder], model.name)
    ]
    scripts = Path(sys.executable).parent
    transformers = shutil.which("transformers", path=str(scripts))
    if transformers:
        command = [transformers, "serve", folder, "--host", "127.0.0.1"]
        contenders.append(Contender("transformers serve", command, folder, embeds=False))
    vllm = shutil.which("vllm", path=str(scripts))
    if vllm:
        command = [vllm, "serve", folder, "--host", "127.0.0.1"]
        contenders.append(Contender("vllm serve", command, folder, embeds=False))
    else:
        print("vLLM is not installed here")
    return contenders


@contextmanager
def run_server(contender: Contender) -> Iterator[int]:
    """Start a server, yield its port once it answers, and end it."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port: int = listening.getsockname()[1]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile() as log:
        command = [*contender.command, "--port", str(port)]
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env=environment, start_new_session=True
        )
        try:
            deadline = time.monotonic() + START_SECONDS
            while not is_healthy(port):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise SystemExit(f"{contender.name}: {log.read()[-500:].decode()}")
                time.sleep(0.5)
            yield port
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def is_healthy(port: int) -> bool:
    """Return whether a server answers with status 200."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def chat(port: int, model: str, text: str, *, deadline: float) -> Stream:
    """Read a streamed answer, at most until the deadline, and return when its tokens arrived."""
    stream = Stream(time.monotonic())
    timeout = max(0.1, deadline - stream.start)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    messages = [{"role": "user", "content": text}]
    body = {"model": model, "messages": messages, "max_tokens": ANSWER_TOKENS, "stream": True}
    headers = {"Content-Type": "application/json"}
    try:
        connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        response = connection.getresponse()
        assert response.status == 200, response.read()
        while time.monotonic() < deadline and (line := response.readline()):
            if line.startswith(b"data: {"):
                choices = json.loads(line[6:])["choices"]
                if choices and choices[0]["delta"].get("content"):
                    stream.token_times.append(time.monotonic())
    except TimeoutError:
        pass  # what has arrived counts
    finally:
        connection.close()
    return stream


def embed(port: int, model: str, texts: list[str], *, deadline: float) -> int:
    """Request embeddings and return their number; 0 if they do not arrive before the deadline."""
    timeout = max(0.1, deadline - time.monotonic())
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    headers = {"Content-Type": "application/json"}
    try:
        body = json.dumps({"model": model, "input": texts})
        connection.request("POST", "/v1/embeddings", body, headers)
        response = connection.getresponse()
        content = response.read()
        assert response.status == 200, content
        return len(json.loads(content)["data"])
    except TimeoutError:
        return 0
    finally:
        connection.close()


def run_clients(count: int, send: Callable[[int, float], None], seconds: float) -> None:
    """Let `count` clients call `send(number of the call, deadline)` for so many seconds."""
    deadline = time.monotonic() + seconds

    def repeat(client: int) -> None:
        number = client
        while time.monotonic() < deadline:
            send(number, deadline)
            number += count

    threads = [threading.Thread(target=repeat, args=(client,)) for client in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def measure_chats(
    port: int, model: str, texts: list[str], *, num_clients: int, seconds: float
) -> list[Stream]:
    """Return the streams of so many clients that chat all the time."""
    streams: list[Stream] = []

    def send(number: int, deadline: float) -> None:
        text = texts[number % len(texts)]
        streams.append(chat(port, model, text, deadline=deadline))

    run_clients(num_clients, send, seconds)
    return streams


def measure_embeddings(
    port: int, model: str, texts: list[str], *, num_clients: int, seconds: float
) -> float:
    """Return the embeddings a second of so many clients with one text in a request."""
    counts: list[int] = []

    def send(number: int, deadline: float) -> None:
        counts.append(embed(port, model, [texts[number % len(texts)]], deadline=deadline))

    run_clients(num_clients, send, seconds)
    return sum(counts) / seconds


def measure_gaps_during_ingestion(
    port: int, model: str, texts: list[str], *, seconds: float
) -> tuple[list[Stream], float]:
    """Return the streams of one client, and the chunks a second that others embed meanwhile."""
    long_text = " ".join(texts)
    long_text *= 1 + CHUNKS_PER_REQUEST * CHUNK_CHARS // len(long_text)
    chunks = [
        long_text[start : start + CHUNK_CHARS]
        for start in range(0, CHUNKS_PER_REQUEST * CHUNK_CHARS, CHUNK_CHARS)
    ]
    counts: list[int] = []

    def send(number: int, deadline: float) -> None:
        counts.append(embed(port, model, chunks, deadline=deadline + START_SECONDS))

    ingestion = threading.Thread(
        target=run_clients, args=(NUM_INGESTING_CLIENTS, send, seconds), daemon=True
    )
    start = time.monotonic()
    ingestion.start()
    time.sleep(0.5)
    streams = measure_chats(port, model, texts, num_clients=1, seconds=seconds)
    ingestion.join()
    return streams, sum(counts) / (time.monotonic() - start)


def format_percentiles(values: list[float]) -> str:
    """Return median, 95th percentile and largest value in milliseconds."""
    if not values:
        return f"{'none':>10}"
    p50, p95, largest = np.percentile(values, [50, 95, 100])
    return f"{1e3 * p50:10.0f} {1e3 * p95:10.0f} {1e3 * largest:10.0f}"


def print_gaps(port: int, model: str, texts: list[str], seconds: float) -> None:
    """Measure and print the gaps between two tokens, alone and during ingestion."""
    print("\ngap between two tokens of a chat, ms           p50        p95    largest")
    alone = measure_chats(port, model, texts, num_clients=1, seconds=seconds)
    busy, rate = measure_gaps_during_ingestion(port, model, texts, seconds=2 * seconds)
    for name, streams in (("alone", alone), ("while chunks are embedded", busy)):
        gaps = [gap for stream in streams for gap in stream.gaps]
        print(f"  {name:38} {format_percentiles(gaps)}", flush=True)
    print(f"  {CHUNK_CHARS}-character chunks embedded meanwhile: {rate:.2f} a second")


def print_rates(contender: Contender, port: int, texts: list[str], seconds: float) -> None:
    """Measure and print chats and embeddings of all numbers of clients."""
    print(f"\n{contender.name}")
    print("  clients   tokens/s   first token, ms: p50        p95    largest   embeddings/s")
    model = contender.model
    for count in CLIENT_COUNTS:
        streams = measure_chats(port, model, texts, num_clients=count, seconds=seconds)
        rate = sum(len(stream.token_times) for stream in streams) / seconds
        waits = [s.first_token_seconds for s in streams if s.first_token_seconds is not None]
        embeddings = "-"
        if contender.embeds:
            value = measure_embeddings(port, model, texts, num_clients=count, seconds=seconds / 2)
            embeddings = f"{value:.1f}"
        waits_text = format_percentiles(waits)
        print(f"  {count:7} {rate:10.1f}   {waits_text:>43} {embeddings:>14}", flush=True)


def main() -> None:
    """Run the benchmark."""
    options = _bench.build_parser(__doc__).parse_args()
    seconds = 15.0 if options.quick else 60.0
    model = _bench.find_model_folder(options.model)
    texts = [caption for record in _bench.load_pairs(options.data) for caption in record.short]
    texts = texts[:256]
    _bench.print_environment(options, model)
    for contender in list_contenders(model):
        logger.info(f"starting {contender.name}")
        with run_server(contender) as port:
            chat(port, contender.model, texts[0], deadline=time.monotonic() + START_SECONDS)
            if contender.embeds:
                print_gaps(port, contender.model, texts, seconds)
            print_rates(contender, port, texts, seconds)


if __name__ == "__main__":
    main()
