"""Compare searches of an index: exact, approximate, and those of FAISS and usearch.

All contenders hold the same vectors and answer the same queries, one at a time, in every repeat.
The vectors are drawn from clusters in 64 dimensions that are embedded in 384, with a little noise:
embeddings of images and texts have clusters and a low dimension too, and uniform vectors do not.
Queries are drawn in the same way and are not among the vectors. Recall is the share of the ten
nearest rows by a matrix product that a contender returns.

FAISS and usearch return the numbers of rows; the index of vlduet also checks its files for a newer
version, reads texts and metadata from the disk, and scores its hits again in float64.

    python benchmarks/index.py --rows 1000000
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from _bench import build_parser, installed_version, peak_memory_gb, print_machine

from vlduet.logs import logger
from vlduet.retrieval.stores.base import IndexRow, RowHashes
from vlduet.retrieval.stores.lance import NUM_PROBES, LanceStore

DIM = 384
NUM_CLUSTERS = 2000
K = 10
ROWS_PER_WRITE = 20_000
ROWS_PER_UPDATE = 256
PACKAGES = ("vlduet", "lancedb", "faiss-cpu", "usearch", "numpy")

PEERS = ("faiss", "usearch")

Contender = Callable[[np.ndarray], list[int]]
"""Function that returns the numbers of the ten rows that are nearest to a query, float32[D]."""


class Vectors:
    """Distribution that the vectors and the queries are drawn from."""

    def __init__(self, seed: int):
        """Draw the clusters and the embedding of their space."""
        self.rng = np.random.default_rng(seed)
        self.centres = self.rng.normal(size=(NUM_CLUSTERS, 64)).astype(np.float32)
        self.projection = self.rng.normal(size=(64, DIM)).astype(np.float32) / 8

    def draw(self, count: int) -> np.ndarray:
        """Return unit vectors, float32[count, D]."""
        points = self.centres[self.rng.integers(0, NUM_CLUSTERS, count)]
        points = points + 0.6 * self.rng.normal(size=points.shape).astype(np.float32)
        vectors = points @ self.projection
        vectors += 0.03 * self.rng.normal(size=vectors.shape).astype(np.float32)
        unit: np.ndarray = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        return unit


def make_rows(first: int, count: int) -> list[IndexRow]:
    """Return rows with a caption and metadata, numbered from `first`."""
    return [
        IndexRow(
            id=f"{number:08d}",
            hashes=RowHashes(f"{number:064x}", f"{number:064x}"),
            text=f"a caption of about the usual length, number {number}",
            image_path=f"/photos/{number}.jpg",
            relative_image_path=f"../photos/{number}.jpg",
            metadata={"year": 1990 + number % 35},
            filter_values={"year": float(1990 + number % 35)},
        )
        for number in range(first, first + count)
    ]


def write_store(folder: Path, vectors: np.ndarray) -> LanceStore:
    """Write vectors float32[N, D] to a new store without a search index; return it, open."""
    store = LanceStore(folder, dim=DIM, write=True)
    for first in range(0, len(vectors), ROWS_PER_WRITE):
        chunk = vectors[first : first + ROWS_PER_WRITE]
        store.upsert(make_rows(first, len(chunk)), chunk)
    return store


def search_store(store: LanceStore, *, exact: bool) -> Contender:
    """Return a contender that searches a store."""

    def find(query: np.ndarray) -> list[int]:
        (rows,) = store.search(query[None], k=K, exact=exact)
        return [int(scored.row.id) for scored in rows]

    return find


def build_faiss(vectors: np.ndarray) -> Contender:
    """Return FAISS's IVF_FLAT, with as many groups and probes as the index of vlduet."""
    import faiss

    groups = int(len(vectors) ** 0.5)
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(DIM), DIM, groups, faiss.METRIC_INNER_PRODUCT)
    index.train(vectors[np.random.default_rng(0).permutation(len(vectors))[: groups * 64]])
    index.add(vectors)
    index.nprobe = NUM_PROBES

    def find(query: np.ndarray) -> list[int]:
        numbers: list[int] = index.search(query[None], K)[1][0].tolist()
        return numbers

    return find


def build_usearch(vectors: np.ndarray) -> Contender:
    """Return usearch's graph (HNSW) with its default settings."""
    from usearch.index import Index

    index = Index(ndim=DIM, metric="ip", dtype="f32")
    index.add(np.arange(len(vectors)), vectors, threads=torch.get_num_threads())

    def find(query: np.ndarray) -> list[int]:
        numbers: list[int] = index.search(query, K).keys.tolist()
        return numbers

    return find


def find_truth(vectors: np.ndarray, queries: np.ndarray) -> list[set[int]]:
    """Return the numbers of the ten nearest vectors of each query, by a matrix product."""
    nearest = []
    for query in queries:
        scores = vectors @ query  # [N]
        nearest.append(set(np.argpartition(-scores, K)[:K].tolist()))
    return nearest


def warm_up(contenders: dict[str, Contender], queries: np.ndarray) -> None:
    """Let every contender answer queries that are not measured.

    A contender that keeps its vectors on the disk has read most of them then, as in a server that
    has run for a while. An exact search reads all vectors for every query.
    """
    for name, find in contenders.items():
        for query in queries[:1] if "exact" in name else queries:
            find(query)


def measure_searches(
    contenders: dict[str, Contender], queries: np.ndarray, truth: list[set[int]], repeats: int
) -> None:
    """Print recall@10 and times of one search of every contender.

    A turn of a contender answers all queries; the contenders take turns. p50 and p95 are of all its
    searches, CPU is the mean over all threads.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    cpu_seconds, recall = dict.fromkeys(contenders, 0.0), dict.fromkeys(contenders, 0.0)
    for _ in range(repeats):
        for name, find in contenders.items():
            # An exact search of a million rows takes a second.
            selection = queries[:20] if "exact" in name else queries
            cpu_start, results = time.process_time(), []
            for query in selection:
                start = time.perf_counter()
                results.append(find(query))
                seconds[name].append(time.perf_counter() - start)
            cpu_seconds[name] += time.process_time() - cpu_start
            shares = [len(truth[i] & set(numbers)) / K for i, numbers in enumerate(results)]
            recall[name] = statistics.mean(shares)
    print(f"\n  {'search':34} {'recall@10':>9} {'p50 ms':>8} {'p95 ms':>8} {'CPU ms':>8}")
    for name, times in seconds.items():
        p50, p95 = (float(np.percentile(times, q)) * 1000 for q in (50, 95))
        cpu = cpu_seconds[name] / len(times) * 1000
        print(f"  {name:34} {recall[name]:9.3f} {p50:8.1f} {p95:8.1f} {cpu:8.1f}", flush=True)


def measure_updates(store: LanceStore, distribution: Vectors, num_rows: int) -> None:
    """Print the median time to add, and to replace, 256 rows of a store with a search index."""
    for name, first in (("add 256 rows", num_rows), ("replace 256 rows", 0)):
        seconds = []
        for repeat in range(5):
            rows = make_rows(first + repeat * ROWS_PER_UPDATE, ROWS_PER_UPDATE)
            vectors = distribution.draw(ROWS_PER_UPDATE)
            start = time.perf_counter()
            store.upsert(rows, vectors)
            seconds.append(time.perf_counter() - start)
        print(f"  {name:34} {statistics.median(seconds) * 1000:8.1f} ms", flush=True)


def run(options: argparse.Namespace, folder: Path) -> None:
    """Build all contenders, and print the times of builds, searches and updates."""
    num_rows = options.rows or (20_000 if options.quick else 100_000)
    distribution = Vectors(options.seed)
    vectors = np.empty((num_rows, DIM), np.float32)
    for first in range(0, num_rows, ROWS_PER_WRITE):
        count = min(ROWS_PER_WRITE, num_rows - first)
        vectors[first : first + count] = distribution.draw(count)
    queries = distribution.draw(50 if options.quick else 200)
    truth = find_truth(vectors, queries)
    print(f"data      {num_rows} vectors of {DIM} numbers, {len(queries)} queries")
    contenders: dict[str, Contender] = {}
    builds: dict[str, Callable[[], object]] = {}
    stores: list[LanceStore] = []

    def build_store() -> None:
        stores.append(write_store(folder / "store", vectors))

    builds["vlduet: write rows"] = build_store
    builds["vlduet: approximate search index"] = lambda: stores[0].update_search_index("on")
    if "faiss" in options.peers:
        builds[f"FAISS IVF_FLAT, {NUM_PROBES} probes"] = lambda: build_faiss(vectors)
    if "usearch" in options.peers:
        builds["usearch HNSW"] = lambda: build_usearch(vectors)
    print(f"\n  {'build':34} {'seconds':>9}")
    for name, build in builds.items():
        start = time.perf_counter()
        result = build()
        print(f"  {name:34} {time.perf_counter() - start:9.1f}", flush=True)
        if callable(result):
            contenders[name] = result
    store = stores[0]
    contenders = {
        "vlduet, exact": search_store(store, exact=True),
        "vlduet, approximate": search_store(store, exact=False),
        **contenders,
    }
    repeats = options.repeats or (1 if options.quick else 3)
    warm_up(contenders, distribution.draw(len(queries)))
    measure_searches(contenders, queries, truth, repeats)
    print("\n  update of a store with a search index")
    measure_updates(store, distribution, num_rows)
    logger.info(f"peak memory {peak_memory_gb():.1f} GB")


def main() -> None:
    """Parse the options and run the benchmark in a temporary folder."""
    parser = build_parser(__doc__)
    parser.add_argument("--rows", type=int, help="number of vectors (default: 100,000)")
    parser.add_argument(
        "--peers",
        nargs="*",
        choices=PEERS,
        default=PEERS,
        help="libraries to compare with; usearch takes long to build with a million rows",
    )
    options = parser.parse_args()
    print_machine()
    print(f"versions  {', '.join(f'{name} {installed_version(name)}' for name in PACKAGES)}")
    folder = Path(tempfile.mkdtemp(prefix="vlduet-index-"))
    try:
        run(options, folder)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
