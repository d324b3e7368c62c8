"""Pairs and retrieval records as queries."""

from __future__ import annotations

import pytest

from helpers import tiny
from vlduet.data.records import Record
from vlduet.data.tools.queries import get_query_and_positives, split_into_queries
from vlduet.errors import ConfigError, DataError

IMAGE = tiny.random_image()
PAIR = Record(
    "p", image=IMAGE, short=("first", "second"), long="A long one.", metadata={"key": "value"}
)


def test_a_pair_queried_by_its_image_stays_a_pair() -> None:
    assert split_into_queries(PAIR) == [PAIR]
    assert get_query_and_positives(PAIR) == ((IMAGE,), (("first",), ("second",)))


def test_a_pair_queried_by_its_captions_becomes_a_record_per_caption() -> None:
    queries = split_into_queries(PAIR, query_side="text")
    assert [query.id for query in queries] == ["p#0", "p#1"]
    assert all(query.metadata == {"key": "value"} for query in queries)
    assert get_query_and_positives(queries[1]) == (("second",), ((IMAGE,),))
    (single,) = split_into_queries(Record("q", image=IMAGE, short=("x",)), query_side="text")
    assert single.id == "q" and single.kind == "retrieval"


@pytest.mark.parametrize("side", ["image", "text"])
def test_a_retrieval_record_stays_as_it_is(side: str) -> None:
    record = Record("r", query=("q",), positive=(("a",),))
    assert split_into_queries(record, query_side=side) == [record]  # type: ignore[arg-type]
    assert get_query_and_positives(record) == (("q",), (("a",),))


def test_unusable_records_and_sides_are_refused() -> None:
    with pytest.raises(ConfigError, match="--query"):
        split_into_queries(PAIR, query_side="images")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="without a short caption"):
        split_into_queries(Record("p", image=IMAGE, long="Long."))
    with pytest.raises(DataError, match="of kind interleaved"):
        split_into_queries(Record("i", parts=("text",)))
