"""Pairs and retrieval records as questions: what is asked, what is right, and what is known to be wrong.

pair, asked by its image       it stays one: query [image], positive: every short caption
pair, asked by its captions    query [caption]    positive: the image; one question a caption, named id#0, id#1, ...
retrieval                      as it stands
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, get_args

from vlduet.data.records import Parts, Record
from vlduet.errors import ConfigError, DataError, suggest_name

QuerySide = Literal["image", "text"]
"""Which side of a pair is the query."""


def split_into_queries(record: Record, *, query_side: QuerySide = "image") -> list[Record]:
    """One record -> records that may have negatives: retrieval records, or the pair itself.

    Args:
        record: a pair with a short caption, or a retrieval record.
        asking: the side of a pair that is the query; retrieval records ask what they ask.

    Raises:
        DataError: another kind, or a pair without a short caption. ConfigError: an unknown side.
    """
    if query_side not in get_args(QuerySide):
        raise ConfigError(
            f"'{query_side}'", place="--query", fix=suggest_name(query_side, get_args(QuerySide))
        )
    if record.kind == "retrieval":
        return [record]
    if record.kind != "pair":
        what = f"a record of kind {record.kind} has no right answer to tell wrong ones from"
        raise DataError(what, place=record.place, fix="Give pairs or retrieval records")
    if not record.short:
        fix = "Write one: vlduet caption MODEL FILE --to OUT.jsonl"
        raise DataError("a pair without a short caption", place=record.place, fix=fix)
    assert record.image is not None
    if query_side == "image":
        return [record]
    bare = Record(record.id, metadata=record.metadata, place=record.place)
    named = (
        [f"{record.id}#{i}" for i in range(len(record.short))]
        if len(record.short) > 1
        else [record.id]
    )
    return [
        replace(bare, id=name, query=(caption,), positive=((record.image,),))
        for name, caption in zip(named, record.short, strict=True)
    ]


def get_query_and_positives(question: Record) -> tuple[Parts, tuple[Parts, ...]]:
    """What asks, and all that is right, of one of `questions`."""
    if question.image is not None:
        return (question.image,), tuple((caption,) for caption in question.short)
    return question.query, question.positive
