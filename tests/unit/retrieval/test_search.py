"""Searches with queries and filters of every form, and queries that are refused."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from helpers.fake_embedder import paint, write_records
from vlduet.data.records import ImageRef
from vlduet.errors import ImageError, RetrievalError
from vlduet.retrieval.build import build_index
from vlduet.retrieval.filters import Condition, parse_conditions
from vlduet.retrieval.index import Index, IndexManifest
from vlduet.retrieval.search import SearchOptions, search, search_similar, search_vector


@pytest.fixture
def index(pairs: Path, tmp_path: Path, model: Any) -> Iterator[Index]:
    build_index(model, pairs, to=tmp_path / "index")
    with Index.open(tmp_path / "index", model) as opened:
        yield opened


def ids(hits: Any) -> list[str]:
    return [hit.id for hit in hits]


def test_query_may_be_a_text_an_image_or_both(index: Index, model: Any, tmp_path: Path) -> None:
    blue = ImageRef(path=paint(tmp_path / "blue.png", (0, 0, 255)))
    assert ids(search(index, model, "green", k=1)) == ["green"]
    assert ids(search(index, model, blue, k=1)) == ["blue"]
    image_bytes = (tmp_path / "blue.png").read_bytes()
    assert ids(search(index, model, ImageRef(data=image_bytes), k=1)) == ["blue"]
    assert set(ids(search(index, model, (blue, "red"), k=2))) == {"blue", "red"}
    assert ids(search(index, model, ("red", "green"), k=1)) == ["yellow"]


def test_the_query_is_embedded_as_a_query() -> None:
    model: Any = SimpleNamespace(
        encode_query=lambda items: np.full((len(items), 2), 1.0),
        encode_document=lambda items: np.full((len(items), 2), 2.0),
        score_statistics=None,
    )
    vectors = []

    def search_store(queries: Any, *, k: int, conditions: Any, exact: bool) -> list[list[Any]]:
        vectors.append(queries.tolist())
        return [[]]

    index: Any = SimpleNamespace(
        check_model=lambda model: None,
        manifest=SimpleNamespace(fields={}, dim=2, side="image"),
        store=SimpleNamespace(search=search_store),
    )
    assert search(index, model, "red") == []
    assert vectors == [[[1.0, 1.0]]]


def test_hits_are_ranked_by_score_and_all_returned_for_a_large_k(index: Index, model: Any) -> None:
    hits = search(index, model, "red", k=3)
    assert [hit.rank for hit in hits] == [1, 2, 3]
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    assert ids(search(index, model, "red", k=100))[:3] == ids(hits)
    assert len(search(index, model, "red", k=100)) == 4


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ({"hue": "red"}, {"red"}),
        ({"hue": ["red", "blue", "pink"]}, {"red", "blue"}),
        (["hue!=red"], {"green", "blue", "yellow"}),
        (["year<2002"], {"red", "green"}),
        (["year>=2001", "year<=2002"], {"green", "blue"}),
        (["hue in red, green"], {"red", "green"}),
        (["year>=2001 and warm=true"], {"yellow"}),
        (["tags contains a and hue==blue"], {"blue"}),
        ([Condition("year", ">", 2002), "warm=true"], {"yellow"}),
        ({"warm": False}, {"green", "blue"}),
    ],
)
def test_filters_select_documents(index: Index, model: Any, where: Any, expected: set[str]) -> None:
    assert set(ids(search(index, model, "red", where=where))) == expected


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({"warm": "false"}, "warm holds flags"),
        ({"year": True}, "year holds numbers"),
        (["year<new"], "'new': year holds numbers"),
        ([Condition("hue", "!=", 7)], "hue holds texts"),
    ],
)
def test_a_filter_by_a_value_of_another_kind_is_refused(
    index: Index, model: Any, where: Any, message: str
) -> None:
    with pytest.raises(RetrievalError, match=message):
        search(index, model, "red", where=where)


@pytest.mark.parametrize("query", ["", "  ", (), ("", "red")])
def test_empty_query_is_refused(index: Index, model: Any, query: Any) -> None:
    with pytest.raises(RetrievalError, match="empty query"):
        search(index, model, query)


def test_invalid_k_image_and_filter_are_refused(index: Index, model: Any, tmp_path: Path) -> None:
    with pytest.raises(RetrievalError, match="1 or more"):
        search(index, model, "red", k=0)
    with pytest.raises(ImageError, match="missing"):
        search(index, model, ImageRef(path=tmp_path / "missing.png"))
    with pytest.raises(RetrievalError, match="Did you mean 'year'"):
        search(index, model, "red", where=["yaer=2000"])


def test_empty_index_gives_no_hits_for_any_filter(tmp_path: Path, model: Any) -> None:
    source = write_records(tmp_path / "none.jsonl", [])
    report = build_index(model, source, to=tmp_path / "empty")
    assert report.count == 0
    with Index.open(tmp_path / "empty", model) as index:
        assert search(index, model, "red", where={"hue": "red"}) == []


def test_model_is_checked_once_because_a_fingerprint_hashes_all_weights(
    index: Index, model: Any
) -> None:
    class CountingModel(type(model)):  # type: ignore[misc]
        num_reads = 0

        @property
        def fingerprint(self) -> str:
            CountingModel.num_reads += 1
            return "fake"

        @fingerprint.setter
        def fingerprint(self, value: str) -> None:
            pass

    counting = CountingModel()
    for _ in range(3):
        search(index, counting, "red")
    assert CountingModel.num_reads == 1


@pytest.fixture
def copies(tmp_path: Path, model: Any) -> Iterator[Index]:
    """An index of texts with copies: a0 = a1 = a2, b0 = b1, and c."""
    texts = {"a": "red", "b": "red green", "c": "blue"}
    rows = [
        {"id": f"{name}{i}", "parts": [{"text": texts[name]}], "metadata": {"copy": i}}
        for name, count in (("a", 3), ("b", 2), ("c", 1))
        for i in range(count)
    ]
    source = write_records(tmp_path / "copies.jsonl", rows)
    build_index(model, source, to=tmp_path / "copies", side="text")
    with Index.open(tmp_path / "copies", model) as opened:
        yield opened


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (SearchOptions(), ["a0", "a1", "a2", "b0"]),
        (SearchOptions(offset=2), ["a2", "b0", "b1", "c0"]),
        (SearchOptions(offset=5), ["c0"]),
        (SearchOptions(offset=6), []),
        (SearchOptions(distinct=True), ["a0", "b0", "c0"]),
        (SearchOptions(distinct=True, offset=1), ["b0", "c0"]),
        (SearchOptions(threshold=0.5), ["a0", "a1", "a2", "b0"]),
        (SearchOptions(threshold=0.5, offset=4), ["b1"]),
        (SearchOptions(threshold=0.9, distinct=True), ["a0"]),
        (SearchOptions(threshold=0.9, exact=True), ["a0", "a1", "a2"]),
    ],
)
def test_options_select_a_page_of_the_ranking(
    copies: Index, model: Any, options: SearchOptions, expected: list[str]
) -> None:
    hits = search(copies, model, "red", k=4, options=options)
    assert ids(hits) == expected
    if not options.distinct:
        assert [hit.rank for hit in hits] == [options.offset + i + 1 for i in range(len(hits))]
    vector = model.encode_query(["red"])[0]
    assert search_vector(copies, vector, k=4, options=options) == hits


def test_distinct_searches_behind_many_copies(tmp_path: Path, model: Any) -> None:
    rows = [{"id": f"{i:03d}", "parts": [{"text": "red"}]} for i in range(150)]
    rows.append({"id": "other", "parts": [{"text": "green"}]})
    build_index(model, write_records(tmp_path / "r.jsonl", rows), to=tmp_path / "i", side="text")
    with Index.open(tmp_path / "i", model) as index:
        options = SearchOptions(distinct=True)
        assert ids(search(index, model, "red", k=2, options=options)) == ["000", "other"]
        assert ids(search_similar(index, "007", k=2, options=options)) == ["other"]
        second = SearchOptions(distinct=True, offset=1)
        assert ids(search(index, model, "red", k=2, options=second)) == ["other"]


def test_documents_like_another_one_are_found_without_it(copies: Index) -> None:
    assert ids(search_similar(copies, "a1", k=3)) == ["a0", "a2", "b0"]
    assert ids(search_similar(copies, "a1", k=3, options=SearchOptions(offset=1)))[0] == "a2"
    assert ids(search_similar(copies, "a1", options=SearchOptions(distinct=True))) == ["b0", "c0"]
    assert ids(search_similar(copies, "b0", where="copy>0")) == ["b1", "a1", "a2"]
    with pytest.raises(RetrievalError, match="no document 'zzz'"):
        search_similar(copies, "zzz")
    row = copies.get_row("b1")
    assert row is not None and (row.text, row.metadata) == ("red green", {"copy": 1})
    assert copies.get_row("zzz' OR '1'='1") is None


def test_options_and_vectors_that_mean_nothing_are_refused(copies: Index) -> None:
    for wrong in (1.5, -2, float("nan")):
        with pytest.raises(RetrievalError, match="from -1 to 1"):
            SearchOptions(threshold=wrong)
    with pytest.raises(RetrievalError, match="0 or more"):
        SearchOptions(offset=-1)
    for vector in (np.zeros(3), np.full(64, np.nan), np.zeros((1, 64))):
        with pytest.raises(RetrievalError, match="Give 64 numbers"):
            search_vector(copies, vector)
    with pytest.raises(RetrievalError, match="1 or more"):
        search_similar(copies, "a0", k=0)


def test_an_open_index_is_refreshed_after_an_update_and_refuses_another_model(
    pairs: Path, tmp_path: Path, model: Any, other_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "index"
    build_index(model, pairs, to=folder)
    with Index.open(folder, model) as index:
        num_reads = 0
        read = IndexManifest.read

        def count_reads(path: Path) -> IndexManifest:
            nonlocal num_reads
            num_reads += 1
            return read(path)

        monkeypatch.setattr(IndexManifest, "read", count_reads)
        index.refresh()
        assert num_reads == 0
        paint(pairs.parent / "images" / "pink.png", (255, 100, 100))
        row = {"id": "pink", "image": "images/pink.png", "metadata": {"price": 7}}
        pairs.write_text(pairs.read_text() + json.dumps(row) + "\n")
        build_index(model, pairs, to=folder)
        with pytest.raises(RetrievalError, match="no document has metadata 'price'"):
            search(index, model, "red", where="price=7")
        index.refresh()
        assert ids(search(index, model, "red", where="price=7")) == ["pink"]
        shutil.rmtree(folder)
        with pytest.raises(RetrievalError, match="no index here"):
            index.refresh()
        build_index(model, write_records(pairs, [row]), to=folder)
        index.refresh()
        assert ids(search(index, model, "red")) == ["pink"]
        shutil.rmtree(folder)
        build_index(other_model, pairs, to=folder)
        for _ in range(2):
            with pytest.raises(RetrievalError, match="vectors differ"):
                index.refresh()


def test_time_of_a_filter_is_proportional_to_its_length(copies: Index) -> None:
    def seconds(text: str) -> float:
        times = []
        for _ in range(5):
            start = time.perf_counter()
            with pytest.raises(RetrievalError):
                parse_conditions([text], copies.manifest.fields)
            times.append(time.perf_counter() - start)
        return min(times)

    for unit in (" ", "\t\n", "a ", " in", "'", "x and ", '""', " a,", "copy in 1,", "= "):
        short, long = (unit * (size // len(unit)) for size in (2400, 9600))
        assert seconds(long) < 12 * seconds(short) + 0.002, repr(unit)
