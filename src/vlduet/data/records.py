"""A record: one training or retrieval sample as the user wrote it.

One JSON object a line, in one of four kinds, told apart by their keys:

    pair         {"id", "image", "short", "long"}          short may be a list; either caption may be missing
    interleaved  {"id", "parts": [{"text"}, {"image"}, ...]}
    chat         {"id", "messages": [{"role", "content"}, ...]}
    retrieval    {"id", "query": [parts], "positive": [[parts], ...], "negative": [[parts], ...]}

Any kind may carry "metadata": {...}. Images are written as a path relative to the file, a ``data:`` URL, or
``{"bytes": base64}``; `parse` makes `ImageRef`s of them without touching the pixels.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

from vlduet.errors import DataError, suggest_name


@dataclass(frozen=True, slots=True)
class Place:
    """Where something stands: printed as ``file:line:field``."""

    file: str
    line: int | None = None
    field: str | None = None

    def with_field(self, field: str) -> Place:
        """The same line, at `field`."""
        dot = "" if field.startswith("[") else "."
        return Place(self.file, self.line, f"{self.field}{dot}{field}" if self.field else field)

    def __str__(self) -> str:
        return ":".join(str(x) for x in (self.file, self.line, self.field) if x is not None)


@dataclass(frozen=True, slots=True)
class ImageRef:
    """An image by path or by its encoded bytes; exactly one of the two is set."""

    path: Path | None = None
    data: bytes | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        assert (self.path is None) != (self.data is None), "an image is a path or bytes"

    @property
    def name(self) -> str:
        """What to call this image in messages."""
        if self.path is not None:
            return str(self.path)
        assert self.data is not None
        return f"bytes:{hashlib.sha256(self.data).hexdigest()[:12]}"


Part = str | ImageRef
"""One slice: a sentence or an image."""

Parts = tuple[Part, ...]


def as_parts(item: Part | Parts) -> Parts:
    """A text or an image alone -> a tuple of one."""
    return (item,) if isinstance(item, str | ImageRef) else tuple(item)


def extract_images(parts: Iterable[Part]) -> tuple[ImageRef, ...]:
    """The images among parts, in their order."""
    return tuple(part for part in parts if isinstance(part, ImageRef))


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat: role is system, user or assistant."""

    role: str
    parts: Parts


@dataclass(frozen=True, slots=True)
class Record:
    """One sample. Which fields are filled says its `kind`."""

    id: str
    image: ImageRef | None = None
    short: tuple[str, ...] = ()
    long: str | None = None
    parts: Parts = ()
    messages: tuple[Message, ...] = ()
    query: Parts = ()
    positive: tuple[Parts, ...] = ()
    negative: tuple[Parts, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    place: Place | None = field(default=None, compare=False)

    @property
    def kind(self) -> str:
        """pair, interleaved, chat or retrieval."""
        if self.messages:
            return "chat"
        if self.query:
            return "retrieval"
        return "interleaved" if self.parts else "pair"

    def images(self) -> tuple[ImageRef, ...]:
        """Every image of the record, in reading order."""
        groups: list[Parts] = [self.parts, *(m.parts for m in self.messages), self.query]
        groups += [*self.positive, *self.negative]
        return ((self.image,) if self.image else ()) + extract_images(
            itertools.chain.from_iterable(groups)
        )


KEYS_BY_KIND: dict[str, frozenset[str]] = {
    "pair": frozenset({"image", "short", "long", "negative"}),
    "interleaved": frozenset({"parts"}),
    "chat": frozenset({"messages"}),
    "retrieval": frozenset({"query", "positive", "negative"}),
}
COMMON_KEYS = frozenset({"id", "metadata"})
AMBIGUOUS_KEYS = frozenset({"negative"})
"""Keys of two kinds, which tell neither."""
ROLES = ("system", "user", "assistant")


def parse_record(raw: Any, *, place: Place, root: Path) -> Record:
    """One JSON value -> Record.

    Args:
        raw: the decoded JSON.
        place: file and line, for messages.
        root: the folder that relative image paths start from.

    Raises:
        DataError: with file, line, field, and what to do.
    """
    if not isinstance(raw, dict):
        raise DataError(f"a record is a JSON object, this is {_kind_of(raw)}", place=place)
    kinds = [kind for kind, keys in KEYS_BY_KIND.items() if (keys - AMBIGUOUS_KEYS) & raw.keys()]
    if len(kinds) != 1:
        what = (
            f"keys of {' and '.join(kinds)} in one record"
            if kinds
            else f"no known key among {sorted(raw)}"
        )
        raise DataError(
            what,
            place=place,
            fix="A record is a pair, interleaved, chat or retrieval: see docs/data-format.md",
        )
    unknown = sorted(raw.keys() - KEYS_BY_KIND[kinds[0]] - COMMON_KEYS)
    if unknown:
        known = KEYS_BY_KIND[kinds[0]] | COMMON_KEYS
        raise DataError(
            f"unknown key '{unknown[0]}'",
            place=place.with_field(unknown[0]),
            fix=suggest_name(unknown[0], known),
        )
    identity = raw.get("id")
    if not isinstance(identity, str | int) or isinstance(identity, bool) or identity == "":
        raise DataError(
            f"id is {_kind_of(identity)}",
            place=place.with_field("id"),
            fix="Give every record a string id of its own",
        )
    if not is_utf8_encodable(str(identity)):
        raise DataError(
            f"id is {identity!a}", place=place.with_field("id"), fix="Write it again as UTF-8"
        )
    metadata = raw.get("metadata", {})
    if not isinstance(metadata, dict):
        raise DataError(
            f"metadata is {_kind_of(metadata)}",
            place=place.with_field("metadata"),
            fix="Write an object",
        )
    fields = {"pair": _pair, "interleaved": _interleaved, "chat": _chat, "retrieval": _retrieval}[
        kinds[0]
    ]
    return Record(id=str(identity), metadata=metadata, place=place, **fields(raw, place, root))


def _pair(raw: dict[str, Any], place: Place, root: Path) -> dict[str, Any]:
    if "image" not in raw:
        raise DataError(
            "a pair without image",
            place=place.with_field("image"),
            fix='Add "image": a path or a data: URL',
        )
    short = raw.get("short") or []
    if not isinstance(short, str | list):
        fix = "Write a string or a list of strings"
        raise DataError(f"short is {_kind_of(short)}", place=place.with_field("short"), fix=fix)
    if isinstance(short, str):
        short = [parse_text(short, place.with_field("short"))]
    for i, caption in enumerate(short):
        parse_text(caption, place.with_field(f"short[{i}]"))
    long = raw.get("long")
    if long is not None:
        parse_text(long, place.with_field("long"))
    image = parse_image(raw["image"], place.with_field("image"), root)
    return {
        "image": image,
        "short": tuple(short),
        "long": long,
        "negative": parse_candidates(raw, "negative", place, root=root),
    }


def _interleaved(raw: dict[str, Any], place: Place, root: Path) -> dict[str, Any]:
    parts = _parts(raw["parts"], place.with_field("parts"), root)
    slices = [
        s
        for part in parts
        for s in ([part] if isinstance(part, ImageRef) else split_sentences(part))
    ]
    return {"parts": tuple(slices)}


def _chat(raw: dict[str, Any], place: Place, root: Path) -> dict[str, Any]:
    messages = raw["messages"]
    if not isinstance(messages, list) or not messages:
        raise DataError(
            "messages is empty or not a list",
            place=place.with_field("messages"),
            fix="Write a list of turns",
        )
    turns = []
    for i, message in enumerate(messages):
        here = place.with_field(f"messages[{i}]")
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            role = message.get("role") if isinstance(message, dict) else message
            raise DataError(
                f"role {role!r}",
                place=here.with_field("role"),
                fix=f"Use one of {', '.join(ROLES)}",
            )
        content = message.get("content")
        content = [{"text": content}] if isinstance(content, str) else content
        turns.append(Message(message["role"], _parts(content, here.with_field("content"), root)))
    if not any(turn.role == "assistant" for turn in turns):
        raise DataError(
            "no assistant turn, so nothing to learn",
            place=place.with_field("messages"),
            fix="Add the answer",
        )
    return {"messages": tuple(turns)}


def _retrieval(raw: dict[str, Any], place: Place, root: Path) -> dict[str, Any]:
    for key in ("query", "positive"):
        if not raw.get(key):
            raise DataError(
                f"{key} is missing or empty",
                place=place.with_field(key),
                fix="Write a list of parts",
            )
    found: dict[str, Any] = {"query": _parts(raw["query"], place.with_field("query"), root)}
    return found | {
        key: parse_candidates(raw, key, place, root=root) for key in ("positive", "negative")
    }


def parse_candidates(
    raw: dict[str, Any], key: str, place: Place, *, root: Path
) -> tuple[Parts, ...]:
    """The candidates under a key, each a list of parts. Raises DataError at `place`."""
    items = raw.get(key, [])
    if not isinstance(items, list) or any(not isinstance(item, list) for item in items):
        raise DataError(
            f"{key} is not a list of lists of parts",
            place=place.with_field(key),
            fix="Write [[{...}], ...]",
        )
    return tuple(
        _parts(item, place.with_field(f"{key}[{i}]"), root) for i, item in enumerate(items)
    )


def _parts(raw: Any, place: Place, root: Path) -> Parts:
    if not isinstance(raw, list) or not raw:
        raise DataError(
            f"expected a list of parts, got {_kind_of(raw)}",
            place=place,
            fix='Write [{"text": ...}, {"image": ...}]',
        )
    parts: list[Part] = []
    for i, part in enumerate(raw):
        here = place.with_field(f"[{i}]")
        part = _openai(part)
        if not isinstance(part, dict) or len(part.keys() & {"text", "image"}) != 1:
            raise DataError(
                "a part needs exactly one of text and image",
                place=here,
                fix='Write {"text": ...} or {"image": ...}',
            )
        extra = sorted(part.keys() - {"text", "image", "type"})
        if extra:
            raise DataError(
                f"unknown key '{extra[0]}' in a part",
                place=here.with_field(extra[0]),
                fix="Keep text or image",
            )
        if "text" in part:
            parts.append(parse_text(part["text"], here.with_field("text")))
        else:
            parts.append(parse_image(part["image"], here.with_field("image"), root))
    return tuple(parts)


def _openai(part: Any) -> Any:
    """The image_url form of the OpenAI content parts -> {"image": url}."""
    if (
        isinstance(part, dict)
        and part.get("type") == "image_url"
        and isinstance(part.get("image_url"), dict)
    ):
        return {"image": part["image_url"].get("url")}
    return part


def parse_text(value: Any, place: Place) -> str:
    """A non-empty string that UTF-8 can hold. Raises DataError at `place`."""
    if not isinstance(value, str) or not value.strip():
        raise DataError(
            f"expected text, got {_kind_of(value)}",
            place=place,
            fix="Write a non-empty string or leave the key out",
        )
    if not is_utf8_encodable(value):
        raise DataError(
            "half a surrogate pair in the text", place=place, fix="Write it again as UTF-8"
        )
    return value


def is_utf8_encodable(text: str) -> bool:
    """Whether UTF-8 can hold it: JSON can spell half a character, and a file's name may be any bytes."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def parse_image(value: Any, place: Place, root: Path) -> ImageRef:
    """A path, a data: URL, raw bytes or {bytes, path}. Raises DataError at `place`."""
    if isinstance(value, bytes):
        return ImageRef(data=value)
    if isinstance(value, dict) and value.keys() <= {"bytes", "path"}:
        value, data = value.get("path"), value.get("bytes")
        if isinstance(data, bytes):
            return ImageRef(data=data)
        if isinstance(data, str):
            return ImageRef(data=_base64(data, place))
    if isinstance(value, str) and not is_utf8_encodable(value):
        raise DataError(
            f"not UTF-8: {value!a:.80}",
            place=place,
            fix="Rename the file, or encode the image again",
        )
    if not isinstance(value, str) or not value:
        raise DataError(
            f"expected an image, got {_kind_of(value)}",
            place=place,
            fix="Write a path or a data: URL",
        )
    if value.startswith("data:"):
        head, comma, body = value.partition(",")
        if not comma:
            raise DataError(
                "a data: URL without a comma", place=place, fix="Write data:image/png;base64,..."
            )
        return ImageRef(
            data=_base64(body, place) if head.endswith(";base64") else unquote_to_bytes(body)
        )
    if re.match(r"[a-z][a-z0-9+.-]+://", value, re.IGNORECASE):
        raise DataError(
            f"'{value}' is a URL",
            place=place,
            fix="Download it first: records never touch the network",
        )
    return ImageRef(path=root / value)


def _base64(text: str, place: Place) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(
            f"broken base64 ({error})", place=place, fix="Encode the image again"
        ) from None


def _kind_of(value: Any) -> str:
    return (
        "nothing" if value in (None, "", [], {}) else f"{type(value).__name__} {str(value)[:40]!r}"
    )


_SENTENCE_END = re.compile(
    # Western: a mark, closing quotes, white space, and then no lower-case letter and no digit, even in a bracket.
    r"""(?<=[.!?…])["'”’)\]]*\s+(?=["'“‘(\[]*[^\s\da-zß-öø-ÿ"'“‘(\[])"""
    r"|\n\s*\n"
    # Chinese and Japanese write no spaces; a closing quote or bracket belongs to the sentence before it.
    r"|(?<=[。！？])(?![」』”’）)。！？])|(?<=[。！？][」』”’）)])"
)


def split_sentences(text: str) -> list[str]:
    """Long text -> sentences, each one slice.

    The rule: cut after . ! ? … (and their full-width forms), closing quotes and brackets kept with the sentence, where
    white space and something other than a lower-case letter or a digit follow; and at blank lines. Never inside a word.
    """
    cuts = [0, *(m.end() for m in _SENTENCE_END.finditer(text)), len(text)]
    pieces = (text[a:b].strip() for a, b in itertools.pairwise(cuts))
    return [piece for piece in pieces if piece]


def read_jsonl(path: Path) -> Iterator[Record]:
    """The records of one ``.jsonl`` file, lazily; blank lines are skipped.

    Raises:
        DataError: at the first broken line, with its number. (`formats.read_records` collects instead of stopping.)
    """
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield parse_json_line(line, place=Place(str(path), number), root=path.parent)


def parse_json_line(line: str | bytes, *, place: Place, root: Path) -> Record:
    """One line of JSON -> Record. Raises DataError as `parse` does, and for broken JSON."""
    try:
        raw = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(
            f"broken JSON at column {error.colno} ({error.msg})", place=place, fix="Mend the line"
        ) from None
    return parse_record(raw, place=place, root=root)


def record_to_json(record: Record, *, root: Path) -> dict[str, Any]:
    """Record -> the JSON object that `parse` reads back as an equal record; paths become relative to `root`."""

    def image(ref: ImageRef) -> str:
        if ref.data is not None:
            return "data:;base64," + base64.b64encode(ref.data).decode()
        assert ref.path is not None
        return Path(os.path.relpath(ref.path.resolve(), root.resolve())).as_posix()

    def parts(items: Parts) -> list[dict[str, str]]:
        return [{"image": image(p)} if isinstance(p, ImageRef) else {"text": p} for p in items]

    out: dict[str, Any] = {"id": record.id}
    if record.kind == "pair":
        assert record.image is not None
        out["image"] = image(record.image)
        if record.short:
            out["short"] = record.short[0] if len(record.short) == 1 else list(record.short)
        if record.long is not None:
            out["long"] = record.long
    elif record.kind == "interleaved":
        out["parts"] = parts(record.parts)
    elif record.kind == "chat":
        out["messages"] = [{"role": m.role, "content": parts(m.parts)} for m in record.messages]
    else:
        out |= {"query": parts(record.query), "positive": [parts(p) for p in record.positive]}
    if record.negative:
        out["negative"] = [parts(p) for p in record.negative]
    if record.metadata:
        out["metadata"] = dict(record.metadata)
    return out
