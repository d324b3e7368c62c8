"""Documents: what an index holds. One record gives one or several of them, depending on the side that is embedded.

    side      pair                     interleaved           chat                     retrieval
    image     its image                every image           every image asked about  every image of a candidate
    text      every short caption,     every sentence        the first question       every text of a candidate
              else the long one
    record    image + first caption    all slices in order   first question, images   every candidate
                                                             and text in order

The `text` of a document is what `ask` quotes: captions, sentences, question and answer. Of a retrieval record the candidates
(positives, then negatives) are documents, never the query.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from vlduet.data.formats import read_records
from vlduet.data.images import content_key
from vlduet.data.records import ImageRef, Message, Part, Parts, Place, Record
from vlduet.errors import DataError, RetrievalError, closest

Side = Literal["image", "text", "record"]

OnError = Callable[[Record | Place | None, DataError], object]
"""Told of everything that is left out, and why; `Quarantine.add` is one."""


@dataclass(frozen=True, slots=True)
class Document:
    """One thing that can be found."""

    id: str
    """The record's id where the record gives one document, else that id with ``#0``, ``#1``, ..."""
    parts: Parts
    """What is embedded."""
    text: str
    """What `ask` quotes and `search` shows; may be empty."""
    image: ImageRef | None = None
    """What `search` shows; embedded only if it is one of the parts."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    key: str = ""
    """Hash of the parts, image bytes included: equal keys have equal vectors."""
    place: Place | None = field(default=None, compare=False)
    """Where its record stands."""

    def named(self) -> Record:
        """Id and place alone, as a quarantine wants them."""
        return Record(self.id, place=self.place)


def documents(source: Path, *, side: Side, on_error: OnError) -> Iterator[Document]:
    """The documents of a file of records, or of a folder of images, lazily and in order.

    Args:
        source: anything that `data.formats.read_records` reads.
        side: what of a record is embedded.
        on_error: told of every record or document that is left out; the rest goes on.

    Raises:
        RetrievalError: an unknown side.
        DataError: the source as a whole cannot be read.
    """
    if side not in get_args(Side):
        raise RetrievalError(f"'{side}'", place="--side", fix=closest(side, get_args(Side)))
    taken: set[str] = set()
    for record in read_records(source, on_error=on_error):
        try:
            found = of_record(record, side)
        except DataError as error:
            on_error(record, error)
            continue
        for document in found:
            try:
                if document.id in taken:
                    fix = "Give every record an id of its own"
                    raise DataError(f"id '{document.id}' appears twice", place=record.place, fix=fix)
                key = key_of(document.parts)
            except DataError as error:
                on_error(document.named(), error)
                continue
            taken.add(document.id)
            yield replace(document, key=key)


def of_record(record: Record, side: Side) -> list[Document]:
    """The documents of one record, their keys still empty.

    Raises:
        DataError: the record holds nothing of this side.
    """
    embedded = _embedded(record, side)
    if not embedded:
        what = "image" if side == "image" else "text"
        raise DataError(
            f"a record without {what}", place=record.place, fix="Index another --side, or leave it out"
        )
    quoted, shown = clean(_quoted(record)), next(iter(record.images()), None)
    identity = clean(record.id)
    found = []
    for i, parts in enumerate(embedded):
        parts = tuple(clean(p) if isinstance(p, str) else p for p in parts)
        own = [p for p in parts if isinstance(p, str)]
        alone = side == "text" or record.kind == "retrieval"
        found.append(
            Document(
                id=identity if len(embedded) == 1 else f"{identity}#{i}",
                parts=parts,
                text="\n".join(own) if alone and record.kind != "chat" else quoted,
                image=next(
                    (p for p in parts if isinstance(p, ImageRef)), None if alone and not own else shown
                ),
                metadata=record.metadata,
                place=record.place,
            )
        )
    return found


def _embedded(record: Record, side: Side) -> list[Parts]:
    """What each document of the record embeds."""
    if record.kind == "pair":
        captions = record.short or ((record.long,) if record.long else ())
        assert record.image is not None
        whole: list[Parts] = [(record.image, *captions[:1])]
        texts: tuple[str, ...] = captions
    elif record.kind == "interleaved":
        whole, texts = [record.parts], _texts(record.parts)
    elif record.kind == "chat":
        question = _first(record.messages, "user")
        whole, texts = [question] if question else [], tuple(filter(None, [" ".join(_texts(question))]))
    else:
        whole = [*record.positive, *record.negative]
        texts = tuple(text for parts in whole for text in _texts(parts))
    if side == "record":
        return whole
    if side == "text":
        return [(text,) for text in texts]
    return [(part,) for parts in whole for part in parts if isinstance(part, ImageRef)]


def _quoted(record: Record) -> str:
    """The text of the whole record."""
    if record.kind == "pair":
        return "\n".join([*record.short, *([record.long] if record.long else [])])
    if record.kind == "interleaved":
        return " ".join(_texts(record.parts))
    question, answer = (" ".join(_texts(_first(record.messages, role))) for role in ("user", "assistant"))
    return f"Question: {question}\nAnswer: {answer}" if record.messages else ""


def _texts(parts: tuple[Part, ...]) -> tuple[str, ...]:
    return tuple(p for p in parts if isinstance(p, str))


def _first(messages: tuple[Message, ...], role: str) -> Parts:
    return next((m.parts for m in messages if m.role == role), ())


def clean(text: str) -> str:
    """Text without lone surrogates: JSON can spell them, but neither a tokenizer nor a database takes them."""
    return text.encode("utf-8", "replace").decode("utf-8")


def key_of(parts: Parts) -> str:
    """Hash of content: texts and image bytes, in order.

    Raises:
        DataError, ImageError: an image that cannot be read.
    """
    digest = hashlib.sha256()
    for part in parts:
        name = f"text:{part}" if isinstance(part, str) else f"image:{content_key(part)}"
        encoded = name.encode("utf-8", "replace")
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.hexdigest()
