"""Records as JSON: one object per line of a ``.jsonl`` file. Its keys decide its kind.

    pair         {"id", "image", "short", "long"}     short: text or list; captions may be missing
    interleaved  {"id", "parts": [{"text"}, {"image"}, ...]}
    chat         {"id", "messages": [{"role", "content"}, ...]}
    retrieval    {"id", "query": [parts], "positive": [[parts], ...], "negative": [[parts], ...]}

Every kind may carry "metadata": {...}; a pair may carry "negative" too. An image is a path relative
to the file, a ``data:`` URL, or ``{"bytes": base64}``; it is referred to, not opened.

Values are checked by hand, not by a schema library: neither kinds nor parts have a tag to
discriminate by, and every error names file, line, field and a remedy of its own.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

from vlduet.data.records import (
    ROLES,
    ImageRef,
    Message,
    Part,
    Parts,
    Place,
    Record,
    is_utf8_encodable,
    split_sentences,
)
from vlduet.errors import DataError, suggest_name

KEYS_BY_KIND: dict[str, frozenset[str]] = {
    "pair": frozenset({"image", "short", "long", "negative"}),
    "interleaved": frozenset({"parts"}),
    "chat": frozenset({"messages"}),
    "retrieval": frozenset({"query", "positive", "negative"}),
}
"""JSON keys of each kind of record, without `COMMON_KEYS`."""
COMMON_KEYS = frozenset({"id", "metadata"})
"""JSON keys that every kind of record may have."""
AMBIGUOUS_KEYS = frozenset({"negative"})
"""JSON keys of more than one kind, which therefore do not decide the kind."""


@dataclass(frozen=True, slots=True)
class JsonValue:
    """A decoded JSON value and its place, so that every error names file, line and field."""

    value: Any
    place: Place
    root: Path
    """Folder that relative image paths start from."""

    def error(self, message: str, *, fix: str | None = None) -> DataError:
        """Return, not raise, an error at this place with a remedy."""
        return DataError(message, place=self.place, fix=fix)

    def field(self, key: str, default: Any = None) -> JsonValue:
        """Return the value under `key` of an object; a missing key gives `default`."""
        return JsonValue(self.value.get(key, default), self.place.with_field(key), self.root)

    def items(self, noun: str, *, fix: str = "Write [{...}, ...]") -> list[JsonValue]:
        """Return the items of a list; raise DataError if it is no list or empty.

        Args:
            noun: plural of an item, for the message.
        """
        if not isinstance(self.value, list) or not self.value:
            raise self.error(f"expected a list of {noun}, got {self.describe()}", fix=fix)
        return [
            JsonValue(item, self.place.with_field(f"[{i}]"), self.root)
            for i, item in enumerate(self.value)
        ]

    def describe(self) -> str:
        """Return type and beginning of the value for a message; ``nothing`` if it is empty."""
        if self.value in (None, "", [], {}):
            return "nothing"
        return f"{type(self.value).__name__} {str(self.value)[:40]!r}"

    def record_id(self) -> str:
        """Return the value as the id of a record.

        Raises:
            DataError: it is neither a string nor an integer, is empty, or is no valid UTF-8.
        """
        value = self.value
        if not isinstance(value, str | int) or isinstance(value, bool) or value == "":
            raise self.error(
                f"id is {self.describe()}", fix="Give every record a string id of its own"
            )
        if not is_utf8_encodable(str(value)):
            raise self.error(f"id is {value!a}", fix="Write it again as UTF-8")
        return str(value)

    def text(self) -> str:
        """Return the value unchanged if it is a text that can be trained on.

        Raises:
            DataError: it is no string, only white space, or cannot be encoded as UTF-8.
        """
        if not isinstance(self.value, str) or not self.value.strip():
            fix = "Write a non-empty string or leave the key out"
            raise self.error(f"expected text, got {self.describe()}", fix=fix)
        if not is_utf8_encodable(self.value):
            raise self.error("half a surrogate pair in the text", fix="Write it again as UTF-8")
        return self.value

    def image(self) -> ImageRef:
        """Return a reference to the image that the value names, without opening it.

        The value is a path relative to `root`, a ``data:`` URL, the encoded bytes, or an object
        of ``bytes`` (raw or base64) and ``path``, of which the bytes win.

        Raises:
            DataError: another type, an empty or undecodable value, or a network URL.
        """
        value = self.value
        data = value if isinstance(value, bytes) else None
        if isinstance(value, dict) and value.keys() <= {"bytes", "path"}:
            data = value.get("bytes")
            value = value.get("path")
        if isinstance(data, bytes):
            return ImageRef(data=data)
        if isinstance(data, str):
            return ImageRef(data=self._decode_base64(data))
        if not isinstance(value, str) or not value:
            message = f"expected an image, got {JsonValue(value, self.place, self.root).describe()}"
            raise self.error(message, fix="Write a path or a data: URL")
        if not is_utf8_encodable(value):
            fix = "Rename the file, or encode the image again"
            raise self.error(f"not UTF-8: {value!a:.80}", fix=fix)
        if value.startswith("data:"):
            header, comma, body = value.partition(",")
            if not comma:
                fix = "Write data:image/png;base64,..."
                raise self.error("a data: URL without a comma", fix=fix)
            if header.endswith(";base64"):
                return ImageRef(data=self._decode_base64(body))
            return ImageRef(data=unquote_to_bytes(body))
        if re.match(r"[a-z][a-z0-9+.-]+://", value, re.IGNORECASE):
            fix = "Download it first: records never touch the network"
            raise self.error(f"'{value}' is a URL", fix=fix)
        return ImageRef(path=self.root / value)

    def _decode_base64(self, text: str) -> bytes:
        try:
            return base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError) as error:
            raise self.error(f"broken base64 ({error})", fix="Encode the image again") from None

    def parts(self) -> Parts:
        """Return a non-empty list of ``{"text"}`` and ``{"image"}`` objects as parts.

        OpenAI's ``{"type": "image_url", "image_url": {"url"}}`` counts as an image.

        Raises:
            DataError: the list, one of the objects, or its text or image is wrong.
        """
        fix = 'Write [{"text": ...}, {"image": ...}]'
        return tuple(item._part() for item in self.items("parts", fix=fix))

    def _part(self) -> Part:
        part = self.value
        openai_image = part.get("image_url") if isinstance(part, dict) else None
        if isinstance(openai_image, dict) and part.get("type") == "image_url":
            part = {"image": openai_image.get("url")}
        if not isinstance(part, dict) or len(part.keys() & {"text", "image"}) != 1:
            fix = 'Write {"text": ...} or {"image": ...}'
            raise self.error("a part needs exactly one of text and image", fix=fix)
        extra = sorted(part.keys() - {"text", "image", "type"})
        if extra:
            message = f"unknown key '{extra[0]}' in a part"
            raise self.field(extra[0]).error(message, fix="Keep text or image")
        fields = JsonValue(part, self.place, self.root)
        return fields.field("text").text() if "text" in part else fields.field("image").image()

    def candidates(self) -> tuple[Parts, ...]:
        """Return a list of candidates, each a list of parts; () for an empty list.

        Raises:
            DataError: the value is not a list of lists of parts.
        """
        items = self.value
        if not isinstance(items, list) or not all(isinstance(item, list) for item in items):
            message = f"{self.place.field} is not a list of lists of parts"
            raise self.error(message, fix="Write [[{...}], ...]")
        return tuple(item.parts() for item in self.items("candidates")) if items else ()


def parse_record(raw: Any, *, place: Place, root: Path) -> Record:
    """Return the record that a decoded JSON value describes.

    Args:
        raw: the value; everything but an object in the documented form is an error.
        place: file and line of the value, for error messages and for `Record.place`.
        root: folder that relative image paths start from.

    Raises:
        DataError: the value is no valid record; the error names file, line, field and remedy.
    """
    row = JsonValue(raw, place, root)
    if not isinstance(raw, dict):
        raise row.error(f"a record is a JSON object, this is {row.describe()}")
    kinds = [kind for kind, keys in KEYS_BY_KIND.items() if (keys - AMBIGUOUS_KEYS) & raw.keys()]
    if len(kinds) != 1:
        message = f"no known key among {sorted(raw)}"
        if kinds:
            message = f"keys of {' and '.join(kinds)} in one record"
        fix = "A record is a pair, interleaved, chat or retrieval: see docs/data-format.md"
        raise row.error(message, fix=fix)
    valid_keys = KEYS_BY_KIND[kinds[0]] | COMMON_KEYS
    for key in sorted(raw.keys() - valid_keys):
        raise row.field(key).error(f"unknown key '{key}'", fix=suggest_name(key, valid_keys))
    record_id = row.field("id").record_id()
    metadata = raw.get("metadata", {})
    if not isinstance(metadata, dict):
        field = row.field("metadata")
        raise field.error(f"metadata is {field.describe()}", fix="Write an object")
    fields = _FIELD_PARSERS[kinds[0]](row)
    return Record(id=record_id, metadata=metadata, place=place, **fields)


# Each parser returns the fields of `Record` that its kind fills, by name.


def _parse_pair(row: JsonValue) -> dict[str, Any]:
    if "image" not in row.value:
        fix = 'Add "image": a path or a data: URL'
        raise row.field("image").error("a pair without image", fix=fix)
    short = row.field("short")
    captions: list[str] = []
    if isinstance(short.value, str) and short.value:
        captions = [short.text()]
    elif isinstance(short.value, list) and short.value:
        captions = [caption.text() for caption in short.items("captions")]
    elif short.value:
        fix = "Write a string or a list of strings"
        raise short.error(f"short is {short.describe()}", fix=fix)
    long = row.field("long")
    return {
        "image": row.field("image").image(),
        "short": tuple(captions),
        "long": None if long.value is None else long.text(),
        "negative": row.field("negative", []).candidates(),
    }


def _parse_interleaved(row: JsonValue) -> dict[str, Any]:
    slices: list[Part] = []
    for part in row.field("parts").parts():
        slices += [part] if isinstance(part, ImageRef) else split_sentences(part)
    return {"parts": tuple(slices)}


def _parse_chat(row: JsonValue) -> dict[str, Any]:
    messages = []
    for turn in row.field("messages").items("turns"):
        role = turn.value.get("role") if isinstance(turn.value, dict) else turn.value
        if not isinstance(turn.value, dict) or role not in ROLES:
            place = turn.place.with_field("role")
            raise DataError(f"role {role!r}", place=place, fix=f"Use one of {', '.join(ROLES)}")
        content = turn.field("content")
        if isinstance(content.value, str):
            content = JsonValue([{"text": content.value}], content.place, content.root)
        messages.append(Message(role, content.parts()))
    require_answer(messages, row.field("messages").place)
    return {"messages": tuple(messages)}


def require_answer(messages: list[Message], place: Place) -> None:
    """Raise DataError at `place` if no message is by the assistant: only those are trained on."""
    if not any(message.role == "assistant" for message in messages):
        message = "no assistant turn, so nothing to learn"
        raise DataError(message, place=place, fix="Add the answer")


def _parse_retrieval(row: JsonValue) -> dict[str, Any]:
    for key in ("query", "positive"):
        if not row.value.get(key):
            fix = "Write a list of parts"
            raise row.field(key).error(f"{key} is missing or empty", fix=fix)
    return {
        "query": row.field("query").parts(),
        "positive": row.field("positive").candidates(),
        "negative": row.field("negative", []).candidates(),
    }


_FIELD_PARSERS = {
    "pair": _parse_pair,
    "interleaved": _parse_interleaved,
    "chat": _parse_chat,
    "retrieval": _parse_retrieval,
}


def record_to_json(record: Record, *, root: Path) -> dict[str, Any]:
    """Return the JSON object that `parse_record` with the same `root` reads as an equal record.

    Image paths become relative to `root`; images given as bytes become ``data:`` URLs.
    `Record.place` is not written.
    """

    def encode_image(ref: ImageRef) -> str:
        if ref.data is not None:
            return "data:;base64," + base64.b64encode(ref.data).decode()
        assert ref.path is not None
        return Path(os.path.relpath(ref.path.resolve(), root.resolve())).as_posix()

    def encode(parts: Parts) -> list[dict[str, str]]:
        return [
            {"image": encode_image(part)} if isinstance(part, ImageRef) else {"text": part}
            for part in parts
        ]

    raw: dict[str, Any] = {"id": record.id}
    if record.kind == "pair":
        assert record.image is not None
        raw["image"] = encode_image(record.image)
        if record.short:
            raw["short"] = record.short[0] if len(record.short) == 1 else list(record.short)
        if record.long is not None:
            raw["long"] = record.long
    elif record.kind == "interleaved":
        raw["parts"] = encode(record.parts)
    elif record.kind == "chat":
        raw["messages"] = [
            {"role": turn.role, "content": encode(turn.parts)} for turn in record.messages
        ]
    else:
        raw["query"] = encode(record.query)
        raw["positive"] = [encode(parts) for parts in record.positive]
    if record.negative:
        raw["negative"] = [encode(parts) for parts in record.negative]
    if record.metadata:
        raw["metadata"] = dict(record.metadata)
    return raw
