"""Pairs and retrieval records as queries with right and wrong candidates.

pair, queried by its image      stays a pair: the image against every short caption
pair, queried by its captions   one retrieval record per caption, id#0, id#1, ...
retrieval record                stays as it is
"""

from __future__ import annotations

from typing import Literal, get_args

from vlduet.data.records import Parts, Record
from vlduet.errors import ConfigError, DataError, suggest_name

QuerySide = Literal["image", "text"]
"""Side of a pair that is the query."""


def split_into_queries(record: Record, *, query_side: QuerySide = "image") -> list[Record]:
    """Return the records, one per query, that can be given hard negatives.

    Args:
        record: a pair with a short caption, or a retrieval record, which is returned unchanged.
        query_side: ``image`` returns a pair unchanged; ``text`` returns a retrieval record for
            each short caption, whose only positive is the image, without the pair's negatives. Its
            id is ``ID#0``, ``ID#1``, ..., or that of the pair if it has one caption.

    Raises:
        DataError: a record of another kind, or a pair without a short caption.
        ConfigError: an unknown side, for any record.
    """
    if query_side not in get_args(QuerySide):
        fix = suggest_name(query_side, get_args(QuerySide))
        raise ConfigError(f"'{query_side}'", place="--query", fix=fix)
    if record.kind == "retrieval":
        return [record]
    if record.kind != "pair":
        message = f"a record of kind {record.kind} has no right answer to tell wrong ones from"
        raise DataError(message, place=record.place, fix="Give pairs or retrieval records")
    if not record.short:
        fix = "Write one: vlduet caption MODEL FILE --to OUT.jsonl"
        raise DataError("a pair without a short caption", place=record.place, fix=fix)
    if query_side == "image":
        return [record]
    assert record.image is not None
    is_single = len(record.short) == 1
    return [
        Record(
            id=record.id if is_single else f"{record.id}#{i}",
            query=(caption,),
            positive=((record.image,),),
            metadata=record.metadata,
            place=record.place,
        )
        for i, caption in enumerate(record.short)
    ]


def get_query_and_positives(record: Record) -> tuple[Parts, tuple[Parts, ...]]:
    """Return (query, right candidates) of a record of `split_into_queries`.

    A pair is queried by its image, and its candidates are its short captions.
    """
    if record.image is not None:
        return (record.image,), tuple((caption,) for caption in record.short)
    return record.query, record.positive
