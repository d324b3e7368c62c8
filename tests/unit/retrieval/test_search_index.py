"""Index for approximate search of a LanceStore, and the cost of updates."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from helpers.stores import AXES, DIM, ids_of, make_row, normalize, open_for_writing
from vlduet.retrieval.filters import Condition
from vlduet.retrieval.stores import lance
from vlduet.retrieval.stores.lance import LanceStore


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LanceStore:
    """A store of 900 rows that counts as large, with vectors of 32 numbers and no search index."""
    monkeypatch.setattr(lance, "MIN_ROWS_FOR_APPROXIMATE_SEARCH", 500)
    monkeypatch.setattr(lance, "NUM_PROBES", 3)
    store = open_for_writing(tmp_path, dim=32)
    store.upsert([make_row(f"{i:04d}", half=i % 2) for i in range(900)], LARGE_VECTORS[:900])
    return store


LARGE_VECTORS = normalize(np.random.default_rng(0).normal(size=(2400, 32)))


def test_a_large_store_gets_a_search_index_that_exact_searches_bypass(large: LanceStore) -> None:
    queries = LARGE_VECTORS[2000:2100]
    expected = [ids_of(rows) for rows in large.search(queries, k=10)]
    large.update_search_index("off")
    assert not large.has_search_index()
    large.update_search_index("auto")
    assert large.has_search_index()
    assert [ids_of(rows) for rows in large.search(queries, k=10, exact=True)] == expected
    results = [ids_of(rows) for rows in large.search(queries, k=10)]
    pairs = list(zip(results, expected, strict=True))
    recall = np.mean([len(set(ids) & set(best)) / 10 for ids, best in pairs])
    assert 0.1 < recall < 0.9, "3 of 30 groups of random vectors cannot hold all neighbours"
    scores = queries.astype(np.float64) @ LARGE_VECTORS[:900].T.astype(np.float64)
    for i, rows in enumerate(large.search(queries, k=10)):
        for match in rows:
            assert match.score == pytest.approx(scores[i, int(match.row.id)], abs=1e-6)
    large.update_search_index("off")
    assert not large.has_search_index()
    assert [ids_of(rows) for rows in large.search(queries, k=10)] == expected


def test_few_rows_that_match_a_filter_are_all_found(large: LanceStore) -> None:
    large.update_search_index("auto")
    query, odd = LARGE_VECTORS[2000:2001], [Condition("half", "=", 1)]
    expected = large.search(query, k=20, conditions=odd, exact=True)
    assert large.search(query, k=20, conditions=odd) == expected and len(expected[0]) == 20
    none = [Condition("half", "=", 2)]
    assert large.search(query, k=20, conditions=none) == [[]]


def test_rows_behind_a_search_index_are_found_replaced_and_removed(large: LanceStore) -> None:
    large.update_search_index("auto")
    large.upsert([make_row("new"), make_row("0003", version=1)], LARGE_VECTORS[900:902])
    large.delete(["0005"])
    for vector, expected in ((900, "new"), (901, "0003")):
        (matches,) = large.search(LARGE_VECTORS[vector : vector + 1], k=1)
        assert ids_of(matches) == [expected] and matches[0].score == 1.0
    for gone in (3, 5):
        (matches,) = large.search(LARGE_VECTORS[gone : gone + 1], k=900)
        assert matches[0].score < 1
    assert large.count() == len(large.read_ids()) == 900
    large.close()
    reader = LanceStore(large.folder, dim=32, write=False)
    assert reader.has_search_index() and reader.read_ids() == large.read_ids()
    assert ids_of(reader.search(LARGE_VECTORS[900:901], k=1)[0]) == ["new"]


def test_a_search_index_follows_the_growth_of_the_store(large: LanceStore) -> None:
    def describe() -> tuple[str, int]:
        (index,) = [i for i in large._table.list_indices() if i.columns == ["vector"]]
        return index.name, index.num_unindexed_rows

    large.update_search_index("auto")
    assert describe() == ("vector_30", 0)
    large.upsert([make_row(f"b{i}") for i in range(20)], LARGE_VECTORS[900:920])
    large.update_search_index("auto")
    assert describe() == ("vector_30", 20), "a few rows are searched without it"
    large.upsert([make_row(f"c{i}") for i in range(80)], LARGE_VECTORS[920:1000])
    large.update_search_index("auto")
    assert describe() == ("vector_30", 0)
    large.upsert([make_row(f"d{i}") for i in range(1400)], LARGE_VECTORS[1000:])
    large.update_search_index("on")
    assert describe() == ("vector_48", 0)


def test_the_cost_of_an_update_does_not_grow_with_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes that are read and written are counted, for 64 replaced rows of 2,000 and 16,000."""
    monkeypatch.setattr(lance, "MIN_ROWS_FOR_APPROXIMATE_SEARCH", 100)
    io_counts = Path("/proc/self/io")
    if not io_counts.exists():
        pytest.skip("only Linux counts what a process reads and writes")

    def count_bytes() -> int:
        lines = dict(line.split(": ") for line in io_counts.read_text().splitlines())
        return int(lines["rchar"]) + int(lines["wchar"])

    costs = []
    for number in (2000, 16_000):
        store = open_for_writing(tmp_path / str(number))
        vectors = np.tile(AXES, (number // DIM, 1))
        store.upsert([make_row(f"{i:05d}") for i in range(number)], vectors)
        store.update_search_index("auto")
        store.upsert([make_row(f"{i:05d}", 1) for i in range(64)], vectors[:64])
        before = count_bytes()
        store.upsert([make_row(f"{i:05d}", 2) for i in range(64, 128)], vectors[:64])
        costs.append(count_bytes() - before)
    assert costs[1] < 2 * costs[0], costs
