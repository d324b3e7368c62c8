"""Recall of the approximate search of an index."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from helpers.fake_embedder import write_records
from vlduet.errors import RetrievalError
from vlduet.retrieval.build import BuildOptions, build_index
from vlduet.retrieval.index import Index
from vlduet.retrieval.recall import measure_recall
from vlduet.retrieval.stores import lance
from vlduet.retrieval.stores.base import ScoredRow


def write_texts(path: Path, count: int) -> Path:
    """Write records whose texts are mixtures of two words, no two in the same proportion."""
    rows = [
        {"id": str(i), "parts": [{"text": " ".join(["red"] * i + ["green"] * (count + 7))}]}
        for i in range(count)
    ]
    return write_records(path, rows)


def test_recall_is_the_share_of_neighbours_that_a_search_finds(
    tmp_path: Path, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_texts(tmp_path / "r.jsonl", 40)
    build_index(model, source, to=tmp_path / "index", side="text", options=BuildOptions(ann="on"))
    with Index.open(tmp_path / "index", model) as index:
        report = measure_recall(index, sample=5)
        assert report.is_approximate and report.recall == 1.0, "all 6 groups are compared"
        search_all = index.store.search

        def search_every_second(queries: Any, *, k: int, exact: bool) -> list[list[ScoredRow]]:
            (rows,) = search_all(queries, k=40, exact=True)
            return [rows[:k] if exact else rows[: 2 * k : 2]]

        monkeypatch.setattr(index.store, "search", search_every_second)
        report = measure_recall(index, sample=5)
        assert report.recall == pytest.approx(0.5, abs=0.03)
        assert (report.k, report.sample, report.count) == (10, 5, 40)


def test_updates_keep_the_kind_of_search_that_was_chosen_last(
    tmp_path: Path, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lance, "MIN_ROWS_FOR_APPROXIMATE_SEARCH", 4)
    source, to = write_texts(tmp_path / "r.jsonl", 5), tmp_path / "index"

    def is_approximate_after(options: BuildOptions) -> bool:
        build_index(model, source, to=to, side="text", options=options)
        with Index.open(to, model) as index:
            return index.store.has_search_index()

    chosen = [BuildOptions(), BuildOptions(ann="off"), BuildOptions(), BuildOptions(ann="auto")]
    assert list(map(is_approximate_after, chosen)) == [True, False, False, True]


def test_an_exact_index_has_full_recall_and_a_tiny_one_none(tmp_path: Path, model: Any) -> None:
    source = write_texts(tmp_path / "r.jsonl", 12)
    build_index(model, source, to=tmp_path / "index", side="text")
    with Index.open(tmp_path / "index", model) as index:
        report = measure_recall(index, sample=100)
        assert (report.recall, report.sample, report.is_approximate) == (1.0, 12, False)
        with pytest.raises(RetrievalError, match="Give 1 or more"):
            measure_recall(index, sample=0)
    build_index(model, write_texts(source, 1), to=tmp_path / "one", side="text")
    one = Index.open(tmp_path / "one", model)
    with one, pytest.raises(RetrievalError, match="fewer than two"):
        measure_recall(one)
