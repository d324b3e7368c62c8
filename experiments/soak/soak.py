"""Run a server under mixed load for a while, and check that nothing was lost, leaked or broken.

1. index     pictures and texts, with `vlduet index`
2. serve     `vlduet serve` in a process of its own, whose memory, threads and files are sampled
3. load      the clients of `clients.py`, several at a time; the index is updated meanwhile
4. check     no unexpected status, no error in the log, the same answers as at the beginning,
             every document found, bounded memory, and as many threads and files as before

python experiments/soak/soak.py --model DIR [--minutes 30] [--to runs/soak]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from clients import CLIENTS, NUM_PICTURES, Outcomes, Server, draw_picture, picture_part

from vlduet.logs import install_log_handler, logger

COMMAND = [sys.executable, "-m", "vlduet"]
START_SECONDS = 300
SETTLE_SECONDS = 15
"""Time after the load in which connections and buffers of the last requests are released."""
SAMPLE_SECONDS = 2
UPDATE_SECONDS = 20
"""Pause between two updates of the index."""
DOCUMENTS_PER_UPDATE = 3
THREADS_BY_KIND = {"chat, streamed": 2, "embeddings": 2, "search": 2}
"""Clients of a kind at the same time; others have one."""
PAUSE_SECONDS = {"wrong request": 1.0, "reset connection": 1.0, "idle clients": 2.0, "search": 0.1}
"""Longest pause between two requests of one client; others have none."""

MAX_GROWTH_MIB = 128
"""Largest growth of the memory in use, from the second quarter of the run to the last."""
MAX_NEW_THREADS = 2
MAX_NEW_FILES = 16
ERROR_SIGNS = re.compile(r"Traceback|ERROR|CRITICAL|Exception|error:| /v1/\S+ 5\d\d ")


@dataclass(frozen=True)
class Sample:
    """State of the server's process."""

    seconds: float
    rss_mib: float
    threads: int
    files: int


class Collection:
    """Records of an index, which grows; each document is a picture with a text and metadata."""

    def __init__(self, folder: Path, model: Path):
        self.folder, self.model = folder, model
        self.index = folder / "index"
        self.batches: dict[int, list[str]] = {}
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def ids(self) -> set[str]:
        """Ids of all documents."""
        return {identifier for batch in self.batches.values() for identifier in batch}

    def add(self, count: int) -> int:
        """Write `count` new records, index them, and return the number of their batch.

        Raises AssertionError if the command fails.
        """
        batch = len(self.batches)
        first = len(self.ids)
        ids = []
        rows = []
        for number in range(first, first + count):
            colour, data = draw_picture(1000 + number)
            (self.folder / f"{number}.png").write_bytes(data)
            metadata = {"colour": colour, "batch": batch, f"key{batch % 10}": "yes"}
            text = f"picture {number}: a {colour} square"
            row = {"id": f"d{number}", "image": f"{number}.png", "short": text}
            rows.append(json.dumps({**row, "metadata": metadata}) + "\n")
            ids.append(f"d{number}")
        with (self.folder / "records.jsonl").open("a") as file:
            file.writelines(rows)
        command = [*COMMAND, "index", self.model, self.folder / "records.jsonl", "--to", self.index]
        ran = subprocess.run(
            command, check=False, capture_output=True, text=True, timeout=START_SECONDS
        )
        assert ran.returncode == 0, f"vlduet index: {ran.stdout[-300:]} {ran.stderr[-300:]}"
        self.batches[batch] = ids
        return batch

    def check_newest_batch(self, server: Server) -> None:
        """Check that the next search finds what was indexed last."""
        self.check_batch(server, len(self.batches) - 1)

    def check_batch(self, server: Server, batch: int) -> None:
        """Check that a search with a filter finds exactly the documents of a batch."""
        body = {"query": "a square", "k": 100, "where": {"batch": batch}}
        hits = server.expect("/v1/search", body)["data"]
        found, expected = {hit["id"] for hit in hits}, set(self.batches[batch])
        assert found == expected, f"batch {batch}: found {sorted(found)}, not {sorted(expected)}"
        key = {f"key{batch % 10}": "yes"}
        hits = server.expect("/v1/search", {"query": "a square", "k": 1, "where": key})["data"]
        assert hits, f"no document has the new key {key}"


@contextmanager
def run_server(model: Path, index: Path, log: Path) -> Iterator[Server]:
    """Start `vlduet serve` and yield it once it is ready; end it by SIGTERM.

    Raises AssertionError if it does not become ready, or does not end with status 0.
    """
    port = find_free_port()
    options = ["--index", str(index), "--port", str(port)]
    with log.open("w") as file:
        process = subprocess.Popen(
            [*COMMAND, "serve", str(model), *options], stdout=file, stderr=file
        )
        try:
            server = Server(port, process.pid)
            deadline = time.monotonic() + START_SECONDS
            while not is_ready(server):
                assert process.poll() is None, f"the server has ended: {log.read_text()[-500:]}"
                assert time.monotonic() < deadline, "the server is not ready"
                time.sleep(0.5)
            yield server
            process.send_signal(signal.SIGTERM)
            status = process.wait(60)
            assert status == 0, f"the server has ended with status {status}"
        finally:
            process.kill()
            process.wait()


def find_free_port() -> int:
    """Return a port of this machine that nothing uses now."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port: int = listening.getsockname()[1]
    return port


def is_ready(server: Server) -> bool:
    """Return whether the server has loaded its model."""
    with suppress(OSError):
        return server.request("/readyz")[0] == 200
    return False


def read_sample(pid: int, start: float) -> Sample:
    """Return memory, threads and open files of a process (Linux)."""
    fields = {}
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        fields[name] = value.split()
    files = len(os.listdir(f"/proc/{pid}/fd"))
    rss = int(fields["VmRSS"][0]) / 1024
    return Sample(time.monotonic() - start, rss, int(fields["Threads"][0]), files)


def read_reference(server: Server) -> dict[str, Any]:
    """Return answers that must be the same at the end: embeddings, and the hits of a search."""
    inputs = ["a red square", [picture_part(3)], [picture_part(4), {"type": "text", "text": "b"}]]
    data = server.expect("/v1/embeddings", {"input": inputs})["data"]
    body = {"query": "a blue square", "k": 3, "where": {"batch": 0}}
    hits = server.expect("/v1/search", body)["data"]
    messages = [{"role": "user", "content": "What is red?"}]
    chat = {"messages": messages, "max_tokens": 8, "temperature": 0}
    answer = server.expect("/v1/chat/completions", chat)
    return {
        "vectors": [row["embedding"] for row in data],
        "ids": [hit["id"] for hit in hits],
        "answer": answer["choices"][0]["message"]["content"],
    }


def run_load(server: Server, collection: Collection, minutes: float) -> tuple[Outcomes, list[Any]]:
    """Run all clients for so many minutes; return what they saw, and samples of the process."""
    outcomes = Outcomes()
    end = time.monotonic() + 60 * minutes

    def repeat(kind: str, seed: int) -> None:
        rng = random.Random(seed)
        while time.monotonic() < end:
            outcomes.run(kind, lambda: CLIENTS[kind](server, rng))
            time.sleep(PAUSE_SECONDS.get(kind, 0) * rng.random())

    def update() -> None:
        while time.monotonic() < end:
            outcomes.run("index update", lambda: collection.add(DOCUMENTS_PER_UPDATE))
            outcomes.run("new documents", lambda: collection.check_newest_batch(server))
            time.sleep(UPDATE_SECONDS)

    threads = [threading.Thread(target=update)]
    for kind in CLIENTS:
        for number in range(THREADS_BY_KIND.get(kind, 1)):
            threads.append(threading.Thread(target=repeat, args=(kind, number)))
    for thread in threads:
        thread.start()
    start = time.monotonic()
    samples: list[Sample] = []
    reported = start
    while any(thread.is_alive() for thread in threads):
        samples.append(read_sample(server.pid, start))
        if time.monotonic() - reported > 60:
            reported = time.monotonic()
            count = sum(map(len, outcomes.seconds.values()))
            last = samples[-1]
            logger.info(
                f"{last.seconds / 60:.0f} min: {count} requests, {len(outcomes.errors)} errors, "
                f"{last.rss_mib:.0f} MiB, {last.threads} threads, {last.files} files"
            )
        time.sleep(SAMPLE_SECONDS)
    return outcomes, samples


def check_process(samples: list[Sample], final: Sample) -> list[str]:
    """Return what has grown: memory, threads or open files.

    The load changes all three from second to second: the medians of the second and the last quarter
    are compared, and the process after the load with the largest values of the second quarter.
    """
    quarter = max(1, len(samples) // 4)
    early, late = samples[quarter : 2 * quarter] or samples, samples[-quarter:]
    faults = []
    growth = median(late, "rss_mib") - median(early, "rss_mib")
    if growth > MAX_GROWTH_MIB:
        faults.append(f"memory has grown by {growth:.0f} MiB")
    for name, limit in (("threads", MAX_NEW_THREADS), ("files", MAX_NEW_FILES)):
        growth = median(late, name) - median(early, name)
        if growth > limit:
            faults.append(f"{growth:.0f} more {name} than in the second quarter")
        if getattr(final, name) > max(getattr(sample, name) for sample in early):
            faults.append(f"{getattr(final, name)} {name} after the load")
    return faults


def median(samples: list[Sample], name: str) -> float:
    """Return the median of a field."""
    return float(np.median([getattr(sample, name) for sample in samples]))


def check_end(server: Server, collection: Collection, reference: dict[str, Any]) -> list[str]:
    """Return what differs from the beginning, and the documents that are not found."""
    faults = []
    now = read_reference(server)
    differences = np.abs(np.array(now["vectors"]) - np.array(reference["vectors"]))
    if differences.max() > 1e-4:
        faults.append(f"an embedding has changed by {differences.max():.1e}")
    for name in ("ids", "answer"):
        if now[name] != reference[name]:
            faults.append(f"{name}: {now[name]!r}, not {reference[name]!r}")
    for batch in collection.batches:
        try:
            collection.check_batch(server, batch)
        except AssertionError as error:
            faults.append(str(error))
    found = set()
    for batch in collection.batches:  # pages of all documents, without a filter
        body = {"query": "a square", "k": 100, "offset": 100 * batch}
        hits = server.expect("/v1/search", body)["data"]
        found |= {hit["id"] for hit in hits}
        if len(hits) < 100:
            break
    if found != collection.ids:
        faults.append(f"{len(collection.ids - found)} documents are not found")
    return faults


def read_log_errors(log: Path) -> list[str]:
    """Return the lines of the server's log that look like an error."""
    lines = log.read_text(errors="replace").splitlines()
    return [line[:300] for line in lines if ERROR_SIGNS.search(line)]


def print_table(result: dict[str, Any]) -> None:
    """Print the result of a run."""
    print(f"{'load':20} {'requests':>9} {'p50, s':>8} {'p95, s':>8} {'errors':>7}")
    for kind, row in result["load"].items():
        errors = result["errors_by_kind"].get(kind, 0)
        print(f"{kind:20} {row['requests']:9} {row['p50']:8.2f} {row['p95']:8.2f} {errors:7}")
    for name in ("rss_mib", "threads", "files"):
        values = [f"{point} {result['process'][point][name]:.0f}" for point in result["process"]]
        print(f"{name:20} {', '.join(values)}")
    print(f"{result['documents']} documents, {result['minutes']} minutes")
    for fault in result["faults"]:
        print(f"FAULT {fault}")
    print("no fault" if not result["faults"] else f"{len(result['faults'])} faults")


def main() -> None:
    """Run the load, write the result, and exit with status 1 if there is a fault."""
    install_log_handler()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--model", type=Path, required=True, help="a model folder")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--to", type=Path, default=Path("runs/soak"), help="a new folder")
    options = parser.parse_args()
    collection = Collection(options.to / "documents", options.model)
    assert not (options.to / "result.json").exists(), f"{options.to} has a result: name another"
    collection.add(2 * NUM_PICTURES)
    log = options.to / "server.log"
    with run_server(options.model, collection.index, log) as server:
        start = time.monotonic()
        reference = read_reference(server)
        idle = read_sample(server.pid, start)
        outcomes, samples = run_load(server, collection, options.minutes)
        time.sleep(SETTLE_SECONDS)
        final = read_sample(server.pid, start)
        faults = [*outcomes.errors, *check_process(samples, final)]
        faults += check_end(server, collection, reference)
    faults += [f"log: {line}" for line in read_log_errors(log)]
    quarter = max(1, len(samples) // 4)
    points = {"idle": idle, "warm": samples[quarter], "end": samples[-1], "after": final}
    result = {
        "minutes": options.minutes,
        "model": options.model.name,
        "load": outcomes.summarize(),
        "errors_by_kind": outcomes.count_errors(),
        "process": {name: asdict(sample) for name, sample in points.items()},
        "documents": len(collection.ids),
        "faults": faults,
    }
    text = json.dumps(result | {"samples": [asdict(sample) for sample in samples]}, indent=1)
    (options.to / "result.json").write_text(text + "\n")
    print_table(result)
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
