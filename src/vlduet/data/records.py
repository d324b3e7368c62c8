"""Records: one training or retrieval sample each, as the user wrote it.

    kind         filled fields                  trains or measures
    pair         image, short, long, negative   an image and its captions
    interleaved  parts                          sentences and images in reading order
    chat         messages                       the answers of the assistant
    retrieval    query, positive, negative      a query with right and wrong candidates

`record_json` reads and writes one JSON object per record, `formats` everything else.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Place:
    """Position of a value in the user's files, printed as ``file:line:field`` in messages."""

    file: str
    line: int | None = None
    """Line or row number, counted from 1; None where the file has no lines (an archive)."""
    field: str | None = None
    """Path of the value in its row, such as ``messages[0].role``."""

    def with_field(self, field: str) -> Place:
        """Return the place of `field` inside this place's field: ``a`` + ``b`` gives ``a.b``.

        A `field` that starts with a bracket is appended without a dot: ``a`` + ``[0]`` = ``a[0]``.
        """
        dot = "" if field.startswith("[") else "."
        return Place(self.file, self.line, f"{self.field}{dot}{field}" if self.field else field)

    def __str__(self) -> str:
        """Return ``file:line:field`` without the components that are None."""
        components = (self.file, self.line, self.field)
        return ":".join(str(component) for component in components if component is not None)


@dataclass(frozen=True, slots=True)
class ByteRange:
    """Bytes inside a file that are a file of their own, such as a member of an archive."""

    file: Path
    offset: int
    """Position of the first byte."""
    size: int
    """Number of bytes."""
    name: str
    """Name for messages, such as ``ARCHIVE:MEMBER``."""
    version: tuple[int, int]
    """Size and time of modification (ns) of `file` when the range was determined. A file of another
    version holds something else there."""


@dataclass(frozen=True, slots=True)
class ImageRef:
    """Reference to an image that is not decoded yet: its file, its encoded bytes, or their range.

    Exactly one of the three fields is set; anything else fails an assertion.
    `vlduet.data.images.load_image` decodes it.
    """

    path: Path | None = None
    """Image file. It need not exist: a missing file is reported when the image is loaded."""
    data: bytes | None = field(default=None, repr=False)
    """Content of an image file (PNG, JPEG, ...), not pixels."""
    byte_range: ByteRange | None = None
    """Range of a larger file that is the content of an image file. It is read when it is loaded."""

    def __post_init__(self) -> None:
        sources = (self.path, self.data, self.byte_range)
        assert sources.count(None) == 2, "an image is a path, bytes, or a range of bytes"

    @property
    def name(self) -> str:
        """Name for messages: the path, the name of the range, or ``bytes:`` and 12 hex digits.

        The digits are the first of the SHA-256 of `data`.
        """
        if self.path is not None:
            return str(self.path)
        if self.byte_range is not None:
            return self.byte_range.name
        assert self.data is not None
        return f"bytes:{hashlib.sha256(self.data).hexdigest()[:12]}"


Part = str | ImageRef
"""One part of a sequence, in the papers one slice: a text or an image."""

Parts = tuple[Part, ...]
"""Texts and images in reading order: a prompt, a document, the content of a message."""


def as_parts(item: Part | Parts) -> Parts:
    """Return `item` as a tuple of parts; a single text or image becomes a tuple of one."""
    return (item,) if isinstance(item, str | ImageRef) else tuple(item)


def extract_images(parts: Iterable[Part]) -> tuple[ImageRef, ...]:
    """Return the images among `parts` in their order, without the texts."""
    return tuple(part for part in parts if isinstance(part, ImageRef))


ROLES = ("system", "user", "assistant")
"""Roles that a message may have."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat."""

    role: str
    """One of `ROLES`."""
    parts: Parts
    """Texts and images of the turn, in reading order."""
    supervised: bool = True
    """Learn the turn, if it is by the assistant; False: it is context only."""


Conversation = tuple[Message, ...]
"""Turns in order, at least one."""


@dataclass(frozen=True, slots=True)
class Record:
    """One training or retrieval sample. Its `kind` follows from the fields that are filled.

    Two records are equal if all fields but `place` are equal.
    """

    id: str
    """Name of the record, unique in its file."""
    image: ImageRef | None = None
    """Image of a pair."""
    short: tuple[str, ...] = ()
    """Short captions of a pair, each of which describes `image`."""
    long: str | None = None
    """Long caption of a pair."""
    parts: Parts = ()
    """Interleaved sentences and images."""
    messages: tuple[Message, ...] = ()
    """Turns of a chat, at least one of them by the assistant."""
    query: Parts = ()
    """Query of a retrieval record."""
    positive: tuple[Parts, ...] = ()
    """Right candidates for `query`, each a sequence of parts."""
    negative: tuple[Parts, ...] = ()
    """Wrong candidates for `query`, or for the image of a pair: hard negatives."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """JSON values that searches can filter by and that results show."""
    place: Place | None = field(default=None, compare=False)
    """File and line that the record was read from; None for a record made in Python."""

    @property
    def kind(self) -> str:
        """``chat``, ``retrieval``, ``interleaved`` or ``pair``.

        The first of `messages`, `query` and `parts` that is not empty decides; a record without
        any of them is a pair.
        """
        if self.messages:
            return "chat"
        if self.query:
            return "retrieval"
        return "interleaved" if self.parts else "pair"

    def images(self) -> tuple[ImageRef, ...]:
        """Return every image of the record in reading order, repeated ones included."""
        return extract_images(part for _, part in iter_labelled_parts(self))


def iter_labelled_parts(record: Record) -> Iterator[tuple[str, Part]]:
    """Yield (label, text or image) for every part of a record, in the order of its fields.

    The label is ``image``, ``short`` (for each short caption), ``long``, ``part 1`` (counted from
    1), a message's role, ``query``, or ``positive 1`` and ``negative 1`` (the number of the
    candidate; all parts of a candidate or message have the same label). Empty fields yield nothing.
    """
    if record.image is not None:
        yield "image", record.image
    for caption in record.short:
        yield "short", caption
    if record.long is not None:
        yield "long", record.long
    for i, part in enumerate(record.parts, 1):
        yield f"part {i}", part
    groups = [(message.role, message.parts) for message in record.messages]
    groups.append(("query", record.query))
    groups += [(f"positive {i}", parts) for i, parts in enumerate(record.positive, 1)]
    groups += [(f"negative {i}", parts) for i, parts in enumerate(record.negative, 1)]
    for label, parts in groups:
        for part in parts:
            yield label, part


def map_images(record: Record, function: Callable[[ImageRef], ImageRef]) -> Record:
    """Return a copy of `record` with every image replaced by ``function(image)``."""

    def map_parts(parts: Parts) -> Parts:
        return tuple(function(part) if isinstance(part, ImageRef) else part for part in parts)

    return replace(
        record,
        image=function(record.image) if record.image else None,
        parts=map_parts(record.parts),
        messages=tuple(replace(turn, parts=map_parts(turn.parts)) for turn in record.messages),
        query=map_parts(record.query),
        positive=tuple(map_parts(parts) for parts in record.positive),
        negative=tuple(map_parts(parts) for parts in record.negative),
    )


def is_utf8_encodable(text: str) -> bool:
    """Return whether `text` holds no lone surrogate, which UTF-8 cannot encode.

    JSON can spell half a character, and a file name may be any bytes.
    """
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


_SENTENCE_END = re.compile(
    # Western: a mark, closing quotes and white space; then, even after an opening bracket,
    # neither a lower-case letter nor a digit.
    r"""(?<=[.!?…])["'”’)\]]*\s+(?=["'“‘(\[]*[^\s\da-zß-öø-ÿ"'“‘(\[])"""
    r"|\n\s*\n"
    # Chinese and Japanese write no spaces; a closing quote or bracket ends the sentence before it.
    r"|(?<=[。！？])(?![」』”’）)。！？])|(?<=[。！？][」』”’）)])"
)


def split_sentences(text: str) -> list[str]:
    """Split `text` into sentences, stripped of surrounding white space; [] for a blank text.

    A sentence ends at a blank line, and after ``. ! ? …`` with closing quotes and brackets where
    white space follows and then neither a lower-case letter nor a digit (so ``3.5`` and ``e.g.
    this`` stay whole). Full-width marks of Chinese and Japanese need no white space.
    """
    return [text[start:end] for start, end in find_sentences(text)]


def find_sentences(text: str) -> list[tuple[int, int]]:
    """Return the indices [start, end) of the sentences that `split_sentences` returns, in order."""
    cuts = [0, *(match.end() for match in _SENTENCE_END.finditer(text)), len(text)]
    spans = []
    for start, end in itertools.pairwise(cuts):
        sentence = text[start:end].strip()
        if sentence:
            first = text.index(sentence, start)
            spans.append((first, first + len(sentence)))
    return spans
