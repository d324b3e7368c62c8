"""Searches with queries and filters of every form, and queries that are refused."""

from __future__ import annotations

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
from vlduet.retrieval.filters import Condition
from vlduet.retrieval.index import Index
from vlduet.retrieval.search import search


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
