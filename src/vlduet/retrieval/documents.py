"""Documents: what an index holds. One record gives one or several, depending on the side that is embedded.

    side    pair                  interleaved  chat                            retrieval
    image   its image             each image   each image of the question      each image of each candidate
    text    each short caption,   each slice   the question's text             each text of each candidate
            else the long one     of text
    record  image, first caption  all slices   the question, images and text   each candidate

The `text` of a document is what `ask` quotes: captions, slices of text, question and answer. The question of
a chat is its first user turn. The candidates of a retrieval record are its positives, then its negatives.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from vlduet.data.formats import read_records
from vlduet.data.images import image_key
from vlduet.data.records import ImageRef, Parts, Place, Record, extract_images
from vlduet.errors import DataError, RetrievalError, suggest_name

Side = Literal["image", "text", "record"]

DocumentErrorCallback = Callable[[Record | None, DataError], object]
"""Told of every record or document that is left out (None: it could not even be read), and why; `Quarantine.add` is one."""


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
    content_hash: str = ""
    """Hash of the parts, image bytes included: equal keys have equal vectors."""
    place: Place | None = field(default=None, compare=False)
    """Where its record stands."""

    def to_quarantine_record(self) -> Record:
        """Id and place alone, as a quarantine wants them."""
        return Record(self.id, place=self.place)


def read_documents(
    source: Path, *, side: Side, on_error: DocumentErrorCallback
) -> Iterator[Document]:
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
        raise RetrievalError(f"'{side}'", place="--side", fix=suggest_name(side, get_args(Side)))
    taken: set[str] = set()
    for record in read_records(source, on_error=lambda error: on_error(None, error)):
        try:
            found = split_record(record, side)
        except DataError as error:
            on_error(record, error)
            continue
        for document in found:
            try:
                if document.id in taken:
                    fix = "Give every record an id of its own"
                    raise DataError(
                        f"id '{document.id}' appears twice", place=record.place, fix=fix
                    )
                key = hash_parts(document.parts)
            except DataError as error:
                on_error(document.to_quarantine_record(), error)
                continue
            taken.add(document.id)
            yield replace(document, content_hash=key)


def split_record(record: Record, side: Side) -> list[Document]:
    """The documents of one record, their keys still empty.

    Raises:
        DataError: the record holds nothing of this side.
    """
    found = []
    for scope in _scopes(record):
        shown = extract_images(scope.whole)
        for parts in scope.embedded(side):
            parts = tuple(replace_lone_surrogates(p) if isinstance(p, str) else p for p in parts)
            text = (
                parts[0]
                if side == "text" and record.kind != "chat"
                else replace_lone_surrogates(scope.quoted)
            )
            image = next(iter(extract_images(parts) or shown), None)
            assert isinstance(text, str)
            found.append(
                Document(
                    replace_lone_surrogates(record.id),
                    parts,
                    text,
                    image,
                    record.metadata,
                    place=record.place,
                )
            )
    if not found:
        what = "image" if side == "image" else "text"
        raise DataError(
            f"a record without {what}",
            place=record.place,
            fix="Index another --side, or leave it out",
        )
    return found if len(found) == 1 else [replace(d, id=f"{d.id}#{i}") for i, d in enumerate(found)]


@dataclass(frozen=True, slots=True)
class _Scope:
    """What belongs together: a record, or one candidate of a retrieval record."""

    whole: Parts
    texts: tuple[str, ...]
    quoted: str

    def embedded(self, side: Side) -> list[Parts]:
        """What each document embeds."""
        if side == "record":
            return [self.whole] if self.whole else []
        return [(part,) for part in (self.texts if side == "text" else extract_images(self.whole))]


def _scopes(record: Record) -> list[_Scope]:
    if record.kind == "pair":
        assert record.image is not None
        long = () if record.long is None else (record.long,)
        captions = record.short or long
        return [_Scope((record.image, *captions[:1]), captions, "\n".join(record.short + long))]
    if record.kind == "chat":
        asked, answered = (
            next((m.parts for m in record.messages if m.role == role), ())
            for role in ("user", "assistant")
        )
        question, answer = " ".join(_texts(asked)), " ".join(_texts(answered))
        return [
            _Scope(
                asked, (question,) if question else (), f"Question: {question}\nAnswer: {answer}"
            )
        ]
    wholes = (
        [record.parts] if record.kind == "interleaved" else [*record.positive, *record.negative]
    )
    return [_Scope(whole, _texts(whole), " ".join(_texts(whole))) for whole in wholes]


def _texts(parts: Parts) -> tuple[str, ...]:
    return tuple(p for p in parts if isinstance(p, str))


def replace_lone_surrogates(text: str) -> str:
    """Text without lone surrogates: JSON can spell them, but no tokenizer and no database takes them."""
    return text.encode("utf-8", "replace").decode("utf-8")


def hash_parts(parts: Parts) -> str:
    """Hash of content: texts and image bytes, in order.

    Raises:
        DataError, ImageError: an image that cannot be read.
    """
    digest = hashlib.sha256()
    for part in parts:
        name = f"text:{part}" if isinstance(part, str) else f"image:{image_key(part)}"
        encoded = name.encode("utf-8", "replace")
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.hexdigest()
