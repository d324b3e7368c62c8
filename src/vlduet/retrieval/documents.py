"""Documents, the units that an index holds. A record gives one or several, depending on the side.

    side    pair                  interleaved      chat                        retrieval
    image   its image             each image       each image of the question  candidates' images
    text    each short caption,   each text slice  the question's text         candidates' texts
            else the long one
    record  image, first caption  all slices       the question                each candidate

The table shows what is embedded. `Document.text` is what `ask` quotes: captions, text slices, or
question and answer. The question of a chat is its first user turn. The candidates of a retrieval
record are its positives, then its negatives.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

from vlduet.data.images import image_key
from vlduet.data.records import ImageRef, Parts, Place, Record, extract_images
from vlduet.errors import DataError, RetrievalError, suggest_name

if TYPE_CHECKING:
    from vlduet.data.readers.rows import IgnoredData
    from vlduet.data.sources import SourceLike

Side = Literal["image", "text", "record"]
"""Part of a record that is embedded."""

DocumentErrorCallback = Callable[[Record | None, DataError], object]
"""Function called with each record or document that is left out, and the reason. The record is None
if it could not even be read. `Quarantine.add` is such a function."""

ImageHash = Callable[[ImageRef], str]
"""Function that returns the SHA-256 of an image's bytes, as `images.image_key`."""


@dataclass(frozen=True, slots=True)
class Document:
    """One unit that a search can return."""

    id: str
    """Id of its record, with the suffix ``#0``, ``#1``, ... if the record gives several."""
    parts: Parts
    """Texts and images that are embedded."""
    text: str
    """Text that `ask` quotes and `search` shows; may be empty."""
    image: ImageRef | None = None
    """Image that `search` shows; embedded only if it is one of the parts."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    content_hash: str = ""
    """Hash of the parts, image bytes included: equal hashes have equal embeddings."""
    place: Place | None = field(default=None, compare=False)
    """File and line of its record."""

    def to_quarantine_record(self) -> Record:
        """Return a record with only the id and the place, for `Quarantine.add`."""
        return Record(self.id, place=self.place)


def read_documents(
    source: SourceLike,
    *,
    side: Side,
    on_error: DocumentErrorCallback,
    hash_image: ImageHash = image_key,
    ignored: IgnoredData | None = None,
) -> Iterator[Document]:
    """Yield the documents of a file of records, or of a folder of images, lazily and in order.

    Their `content_hash` is set. Left out are broken records, records without anything that `side`
    embeds, documents whose id was yielded before, and documents with an image that cannot be read.

    Args:
        source: file or folder with any settings. What is not read is logged.
        side: part of each record that is embedded.
        on_error: called with every record or document that is left out, and the reason: with None
            for a row that could not be parsed, and for a document with a record of only its id and
            place.
        hash_image: returns the SHA-256 of an image's bytes, or raises ImageError.
        ignored: counter of what is not read, whose files are not logged then (`RecordSource.read`).

    Raises:
        RetrievalError: an unknown side.
        DataError: the source as a whole cannot be read; or, if it is strict, it has a broken row or
            holds something that is not read.
    """
    # A search needs no readers, whose import takes 0.2 s.
    from vlduet.data.sources import as_source

    if side not in get_args(Side):
        raise RetrievalError(f"'{side}'", place="--side", fix=suggest_name(side, get_args(Side)))
    ids: set[str] = set()
    records = as_source(source).read(on_error=lambda error: on_error(None, error), ignored=ignored)
    for record in records:
        try:
            documents = split_record(record, side)
        except DataError as error:
            on_error(record, error)
            continue
        for document in documents:
            try:
                if document.id in ids:
                    fix = "Give every record an id of its own"
                    raise DataError(
                        f"id '{document.id}' appears twice", place=record.place, fix=fix
                    )
                content_hash = hash_parts(document.parts, hash_image)
            except DataError as error:
                on_error(document.to_quarantine_record(), error)
                continue
            ids.add(document.id)
            yield replace(document, content_hash=content_hash)


def split_record(record: Record, side: Side) -> list[Document]:
    """Return the documents of one record in order; their `content_hash` is empty.

    Several documents get the ids ``ID#0``, ``ID#1``, ... Lone surrogates in ids and texts become
    "?". For side "text", except of a chat, `text` is the embedded text itself. `image` is the first
    embedded image, else the first one of the record (of the candidate in a retrieval record).
    Images are not opened. Raises DataError if the record contains nothing that this side embeds.
    """
    documents = []
    for scope in _split_scopes(record):
        for parts in scope.select_parts(side):
            cleaned = [replace_lone_surrogates(p) if isinstance(p, str) else p for p in parts]
            text = replace_lone_surrogates(scope.quote)
            if side == "text" and record.kind != "chat":
                text = str(cleaned[0])  # the embedded caption or slice itself
            images = extract_images(parts) or extract_images(scope.parts)
            image = images[0] if images else None
            identity, metadata = replace_lone_surrogates(record.id), record.metadata
            document = Document(identity, tuple(cleaned), text, image, metadata, place=record.place)
            documents.append(document)
    if not documents:
        content = "image" if side == "image" else "text"
        fix = "Index another --side, or remove the record"
        raise DataError(f"a record without {content}", place=record.place, fix=fix)
    if len(documents) == 1:
        return documents
    return [replace(document, id=f"{document.id}#{i}") for i, document in enumerate(documents)]


@dataclass(frozen=True, slots=True)
class _Scope:
    """Parts that describe one subject: a whole record, or one candidate of a retrieval record.

    Side "record" embeds `parts`, "image" the images among them, "text" each of `texts`. `quote`
    is what `ask` quotes.
    """

    parts: Parts
    texts: tuple[str, ...]
    quote: str

    def select_parts(self, side: Side) -> list[Parts]:
        """Return the parts of each document; an empty list if there is nothing to embed.

        "record" gives one document of all `parts`, "text" one per text of `texts`, and "image" one
        per image of `parts`.
        """
        if side == "record":
            return [self.parts] if self.parts else []
        contents = self.texts if side == "text" else extract_images(self.parts)
        return [(content,) for content in contents]


def _split_scopes(record: Record) -> list[_Scope]:
    """Return the scopes of a record: one, or in a retrieval record one per candidate.

    Candidates are the positives, then the negatives. A pair has its image and first caption as
    parts, and as texts its short captions, else the long one; all captions are quoted. A chat has
    the parts of its first user turn, whose joined texts are the only text, and quotes this question
    with the first answer. An interleaved record and a candidate have all their parts and texts, and
    quote the joined texts.
    """
    if record.kind == "pair":
        assert record.image is not None
        long = () if record.long is None else (record.long,)
        captions = record.short or long
        parts: Parts = (record.image, *captions[:1])
        return [_Scope(parts, captions, "\n".join(record.short + long))]
    if record.kind == "chat":
        turns = {message.role: message.parts for message in reversed(record.messages)}
        question_parts = turns.get("user", ())
        question = " ".join(_texts_of(question_parts))
        answer = " ".join(_texts_of(turns.get("assistant", ())))
        texts = (question,) if question else ()
        return [_Scope(question_parts, texts, f"Question: {question}\nAnswer: {answer}")]
    if record.kind == "interleaved":
        candidates: tuple[Parts, ...] = (record.parts,)
    else:
        candidates = (*record.positive, *record.negative)
    return [_Scope(parts, _texts_of(parts), " ".join(_texts_of(parts))) for parts in candidates]


def _texts_of(parts: Parts) -> tuple[str, ...]:
    return tuple(part for part in parts if isinstance(part, str))


def replace_lone_surrogates(text: str) -> str:
    """Return `text` with "?" for lone surrogates, which JSON can spell but tokenizers refuse."""
    return text.encode("utf-8", "replace").decode("utf-8")


def hash_parts(parts: Parts, hash_image: ImageHash = image_key) -> str:
    """Return the SHA-256 of the texts and image bytes of `parts`, in order, as 64 hex digits.

    Images are read by `hash_image`, not decoded. Raises ImageError for one that is missing or
    unreadable.
    """
    digest = hashlib.sha256()
    for part in parts:
        name = f"text:{part}" if isinstance(part, str) else f"image:{hash_image(part)}"
        encoded = name.encode("utf-8", "replace")
        # The length comes first, so that ("ab", "c") and ("a", "bc") differ.
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.hexdigest()
