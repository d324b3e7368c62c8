"""Records as JSON: one object per line of a ``.jsonl`` file. Its keys decide its kind.

    pair         {"id", "image", "short", "long"}     short: text or list; captions may be missing
    interleaved  {"id", "parts": [{"text"}, {"image"}, ...]}
    chat         {"id", "messages": [{"role", "content"}, ...]}
    retrieval    {"id", "query": [parts], "positive": [[parts], ...], "negative": [[parts], ...]}

Every kind may carry "metadata": {...}; a pair may carry "negative" too, and a turn of a chat
"loss": false, which makes it context that is not learned. An image is a path relative to the file,
a ``file:`` or ``data:`` URL, or ``{"bytes": base64}``; it is referred to, not opened.

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
from urllib.parse import unquote, unquote_to_bytes

from vlduet.data.images import read_bytes
from vlduet.data.records import (
    ROLES,
    ImageRef,
    Message,
    Part,
    Parts,
    Place,
    Record,
    extract_images,
    is_utf8_encodable,
    split_sentences,
)
from vlduet.errors import DataError, quote_value, suggest_name

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
SUPERVISION_KEYS = ("loss", "weight", "train", "loss_scale")
"""JSON keys of a turn that say whether it is learned; ``loss`` is ours, the others are peers'."""
TURN_KEYS = frozenset({"role", "content", *SUPERVISION_KEYS})
"""JSON keys of a turn."""
IMAGE_TAG = "<image>"
"""Text that stands for the next image in the chats of others; it is a text like any in ours."""


@dataclass(frozen=True, slots=True)
class JsonValue:
    """A decoded JSON value and its place, so that every error names file, line and field."""

    value: Any
    """Object, list or scalar; bytes too, if the value comes from a table or an archive."""
    place: Place
    root: Path
    """Folder that relative image paths start from."""

    def make_error(self, message: str, *, fix: str | None = None) -> DataError:
        """Return, not raise, an error at this place with a remedy."""
        return DataError(message, place=self.place, fix=fix)

    def get_field(self, key: str, default: Any = None) -> JsonValue:
        """Return the value under `key`; a missing key gives `default`. Only for objects."""
        return JsonValue(self.value.get(key, default), self.place.with_field(key), self.root)

    def parse_items(self, noun: str, *, fix: str = "Write [{...}, ...]") -> list[JsonValue]:
        """Return the items of a list with their places.

        Args:
            noun: what the items are, in the plural, for the message of an error.
            fix: remedy of the error.

        Raises:
            DataError: the value is no list, or an empty one.
        """
        if not isinstance(self.value, list) or not self.value:
            raise self.make_error(f"expected a list of {noun}, got {self.describe()}", fix=fix)
        return [
            JsonValue(item, self.place.with_field(f"[{i}]"), self.root)
            for i, item in enumerate(self.value)
        ]

    def describe(self) -> str:
        """Return type and beginning of the value for a message; ``nothing`` if it is empty."""
        if self.value in (None, "", [], {}):
            return "nothing"
        return f"{type(self.value).__name__} {str(self.value)[:40]!r}"

    def parse_record_id(self) -> str:
        """Return the value as the id of a record; an integer becomes its decimal digits.

        Raises:
            DataError: it is neither a string nor an integer (a boolean is not), is "", or cannot
                be encoded as UTF-8.
        """
        value = self.value
        if not isinstance(value, str | int) or isinstance(value, bool) or value == "":
            raise self.make_error(
                f"id is {self.describe()}", fix="Give every record a string id of its own"
            )
        if not is_utf8_encodable(str(value)):
            raise self.make_error(f"id is {value!a}", fix="Write it again as UTF-8")
        return str(value)

    def parse_text(self) -> str:
        """Return the value unchanged if it is a text that can be trained on.

        Raises:
            DataError: it is no string, only white space, or cannot be encoded as UTF-8.
        """
        if not isinstance(self.value, str) or not self.value.strip():
            fix = "Write a non-empty string or leave the key out"
            raise self.make_error(f"expected text, got {self.describe()}", fix=fix)
        if not is_utf8_encodable(self.value):
            raise self.make_error(
                "half a surrogate pair in the text", fix="Write it again as UTF-8"
            )
        return self.value

    def parse_image(self) -> ImageRef:
        """Return a reference to the image that the value names, without opening it.

        The value is a path (relative to `root`, or absolute), a ``data:`` URL (base64 or
        percent-encoded), the encoded bytes, an `ImageRef` of a container reader, or an object of
        ``bytes`` (raw or base64) and ``path`` without other keys, of which the bytes win.

        Raises:
            DataError: another type, an empty text, broken base64, a ``data:`` URL without a comma,
                a path that is not UTF-8, or a URL with ``://``. A missing file, empty bytes and
                bytes that are no image are no errors here.
        """
        value = self.value
        data = value if isinstance(value, bytes | ImageRef) else None
        if isinstance(value, dict) and value.keys() <= {"bytes", "path"}:
            data = value.get("bytes")
            value = value.get("path")
        if isinstance(data, ImageRef):
            return data
        if isinstance(data, bytes):
            return ImageRef(data=data)
        if isinstance(data, str):
            return ImageRef(data=self._decode_base64(data))
        if not isinstance(value, str) or not value:
            message = f"expected an image, got {JsonValue(value, self.place, self.root).describe()}"
            raise self.make_error(message, fix="Write a path or a data: URL")
        if value.startswith("data:"):
            header, comma, body = value.partition(",")
            if not comma:
                fix = "Write data:image/png;base64,..."
                raise self.make_error("a data: URL without a comma", fix=fix)
            if header.endswith(";base64"):
                return ImageRef(data=self._decode_base64(body))
            if not is_utf8_encodable(body):
                raise self.make_error(f"not UTF-8: {value!a:.80}", fix="Encode the image again")
            return ImageRef(data=unquote_to_bytes(body))
        return ImageRef(path=self.root / self._parse_path(value))

    def _parse_path(self, text: str) -> str:
        """Return the path of an image that is written as a path or as a ``file:`` URL.

        A ``file:`` URL is percent-decoded; ``?`` and ``#`` are letters of its path. Outside
        Windows, backslashes of a path that does not exist become ``/``.

        Raises:
            DataError: the path is not UTF-8, holds a null character, or starts with a drive of
                Windows on another system; or it is a URL of the network or of another computer.
        """
        path = text
        if re.match("file:", text, re.IGNORECASE):
            path = unquote(text[len("file:") :], errors="surrogateescape")
            if path.startswith("//"):
                host, slash, path = path.removeprefix("//").partition("/")
                if host.lower() not in ("", "localhost") or not slash:
                    message = f"'{text}' names the computer '{host}', not a path"
                    raise self.make_error(message, fix="Write file:///folder/image.png, or a path")
                path = slash + path
            if os.name == "nt":
                path = re.sub("^/(?=[A-Za-z]:)", "", path)
        elif re.match(r"[a-z][a-z0-9+.-]+://", text, re.IGNORECASE):
            fix = "Download it first: records never touch the network"
            raise self.make_error(f"'{text}' is a URL", fix=fix)
        if not is_utf8_encodable(path) or "\0" in path:
            fix = "Rename the file, or encode the image again"
            raise self.make_error(f"not UTF-8, or a null character: {text!a:.80}", fix=fix)
        if os.name == "nt":
            return path
        if re.match(r"/?[A-Za-z]:[/\\]|\\\\", path):
            fix = "Write a path relative to the file of records, or to --root"
            raise self.make_error(f"'{text}' is a path of Windows", fix=fix)
        if "\\" in path and not (self.root / path).exists():
            path = path.replace("\\", "/")
        return path

    def _decode_base64(self, text: str) -> bytes:
        try:
            return base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError) as error:
            raise self.make_error(
                f"broken base64 ({error})", fix="Encode the image again"
            ) from None

    def parse_parts(self) -> Parts:
        """Return a non-empty list of ``{"text"}`` and ``{"image"}`` objects as parts.

        OpenAI's ``{"type": "image_url", "image_url": {"url"}}`` counts as an image.

        Raises:
            DataError: the list, one of the objects, or its text or image is wrong.
        """
        fix = 'Write [{"text": ...}, {"image": ...}]'
        return tuple(item._parse_part() for item in self.parse_items("parts", fix=fix))

    def _parse_part(self) -> Part:
        """Return the text or the image of one item of `parts`.

        Raises:
            DataError: the value is no object, has both or neither of ``text`` and ``image``, or a
                key besides these and ``type``; or its text or image is wrong.
        """
        part = self.value
        openai_image = part.get("image_url") if isinstance(part, dict) else None
        if isinstance(openai_image, dict) and part.get("type") == "image_url":
            part = {"image": openai_image.get("url")}
        if not isinstance(part, dict) or len(part.keys() & {"text", "image"}) != 1:
            fix = 'Write {"text": ...} or {"image": ...}'
            raise self.make_error("a part needs exactly one of text and image", fix=fix)
        extra = sorted(part.keys() - {"text", "image", "type"})
        if extra:
            message = f"unknown key '{extra[0]}' in a part"
            raise self.get_field(extra[0]).make_error(message, fix="Keep text or image")
        fields = JsonValue(part, self.place, self.root)
        return (
            fields.get_field("text").parse_text()
            if "text" in part
            else fields.get_field("image").parse_image()
        )

    def parse_turn(self) -> Message:
        """Return one turn of a chat; its ``content`` is a text or a list of parts.

        Raises:
            DataError: the value is no object or has another role than `ROLES`, an unknown key, or a
                wrong or empty value.
        """
        role = self.value.get("role") if isinstance(self.value, dict) else self.value
        if not isinstance(self.value, dict) or role not in ROLES:
            place = self.place.with_field("role")
            fix = f"Use one of {', '.join(ROLES)}"
            raise DataError(f"role {quote_value(role)}", place=place, fix=fix)
        for key in sorted(self.value.keys() - TURN_KEYS):
            fix = suggest_name(key, TURN_KEYS)
            raise self.get_field(key).make_error(f"unknown key '{key}' in a turn", fix=fix)
        content = self.get_field("content")
        if isinstance(content.value, str):
            content = JsonValue([{"text": content.value}], content.place, content.root)
        supervised = self.parse_supervision() is not False
        return Message(role, content.parse_parts(), supervised=supervised)

    def parse_supervision(self) -> bool | None:
        """Return whether a turn is learned by its `SUPERVISION_KEYS`; None without one of them.

        Only for objects. A key whose value is None counts as absent.

        Raises:
            DataError: a value is neither a boolean nor 0 or 1, or two keys contradict each other.
        """
        flags: dict[str, bool] = {}
        for key in SUPERVISION_KEYS:
            field = self.get_field(key)
            if field.value is None:
                continue
            if field.value not in (0, 1):
                fix = "Write true or false: a turn is learned with full weight, or not at all"
                raise field.make_error(f"{key} is {field.value!r:.40}", fix=fix)
            flags[key] = bool(field.value)
        if len(set(flags.values())) > 1:
            message = f"{' and '.join(flags)} contradict each other"
            raise self.make_error(message, fix="Keep one of these keys")
        return next(iter(flags.values()), None)

    def parse_candidates(self) -> tuple[Parts, ...]:
        """Return a list of candidates, each a list of parts; () for an empty list.

        Raises:
            DataError: the value is not a list of lists of parts, or a candidate is empty.
        """
        items = self.value
        if not isinstance(items, list) or not all(isinstance(item, list) for item in items):
            message = f"{self.place.field} is not a list of lists of parts"
            raise self.make_error(message, fix="Write [[{...}], ...]")
        return tuple(item.parse_parts() for item in self.parse_items("candidates")) if items else ()


def parse_record(raw: Any, *, place: Place, root: Path) -> Record:
    """Return the record that a decoded JSON value describes; its keys decide the kind.

    Texts under ``parts`` are split into sentences. Images are not opened.

    Args:
        raw: the value; everything but an object in the documented form is an error, and so is an
            unknown key or a missing ``id``. It is not modified.
        place: file and line of the value, for error messages and for `Record.place`.
        root: folder that relative image paths start from.

    Raises:
        DataError: the value is no valid record; the error names file, line, field and remedy.
    """
    row = JsonValue(raw, place, root)
    if not isinstance(raw, dict):
        raise row.make_error(f"a record is a JSON object, this is {row.describe()}")
    kinds = [kind for kind, keys in KEYS_BY_KIND.items() if (keys - AMBIGUOUS_KEYS) & raw.keys()]
    if len(kinds) != 1:
        message = f"no known key among {sorted(raw)}"
        if kinds:
            message = f"keys of {' and '.join(kinds)} in one record"
        fix = "A record is a pair, interleaved, chat or retrieval: see docs/data-format.md"
        raise row.make_error(message, fix=fix)
    valid_keys = KEYS_BY_KIND[kinds[0]] | COMMON_KEYS
    for key in sorted(raw.keys() - valid_keys):
        raise row.get_field(key).make_error(
            f"unknown key '{key}'", fix=suggest_name(key, valid_keys)
        )
    record_id = row.get_field("id").parse_record_id()
    metadata = raw.get("metadata", {})
    if not isinstance(metadata, dict):
        field = row.get_field("metadata")
        raise field.make_error(f"metadata is {field.describe()}", fix="Write an object")
    fields = _FIELD_PARSERS[kinds[0]](row)
    return Record(id=record_id, metadata=metadata, place=place, **fields)


def _parse_pair(row: JsonValue) -> dict[str, Any]:
    """Return the fields of `Record` that a pair fills: image, short, long and negative.

    Raises:
        DataError: the image is missing, or a value is wrong. Missing or empty short captions
            give (), a missing long caption None, but an empty long caption is wrong.
    """
    if "image" not in row.value:
        fix = 'Add "image": a path or a data: URL'
        raise row.get_field("image").make_error("a pair without image", fix=fix)
    short = row.get_field("short")
    captions: list[str] = []
    if isinstance(short.value, str) and short.value:
        captions = [short.parse_text()]
    elif isinstance(short.value, list) and short.value:
        captions = [caption.parse_text() for caption in short.parse_items("captions")]
    elif short.value:
        fix = "Write a string or a list of strings"
        raise short.make_error(f"short is {short.describe()}", fix=fix)
    long = row.get_field("long")
    return {
        "short": tuple(captions),
        "long": None if long.value is None else long.parse_text(),
        "image": row.get_field("image").parse_image(),
        "negative": row.get_field("negative", []).parse_candidates(),
    }


def _parse_interleaved(row: JsonValue) -> dict[str, Any]:
    """Return the field `parts` of an interleaved record, its texts split into sentences."""
    slices: list[Part] = []
    for part in row.get_field("parts").parse_parts():
        slices += [part] if isinstance(part, ImageRef) else split_sentences(part)
    return {"parts": tuple(slices)}


def _parse_chat(row: JsonValue) -> dict[str, Any]:
    """Return ``{"messages": (Message, ...)}``.

    Raises:
        DataError: there is no turn, one is wrong (`JsonValue.parse_turn`), none is by the
            assistant, or all answers are not to be learned; or the content of a prompt is a text
            with `IMAGE_TAG`, and the record has no image: it may be a row of another format whose
            images were lost.
    """
    turns = row.get_field("messages").parse_items("turns")
    messages = [turn.parse_turn() for turn in turns]
    contents = [turn.get_field("content") for turn in turns if turn.value["role"] != "assistant"]
    tagged_texts = [c for c in contents if isinstance(c.value, str) and IMAGE_TAG in c.value]
    if tagged_texts and not any(extract_images(message.parts) for message in messages):
        fix = (
            f'Write the image as a part {{"image": ...}}, or {IMAGE_TAG} as a part {{"text": ...}}'
        )
        raise tagged_texts[0].make_error(f"a {IMAGE_TAG}, but no image", fix=fix)
    require_answer(messages, row.get_field("messages").place)
    return {"messages": tuple(messages)}


def require_answer(messages: list[Message], place: Place) -> None:
    """Raise DataError at `place` if no message is by the assistant and supervised.

    Only these are trained on.
    """
    answers = [message for message in messages if message.role == "assistant"]
    if not answers:
        message = "no assistant turn, so nothing to learn"
        raise DataError(message, place=place, fix="Add the answer")
    if not any(answer.supervised for answer in answers):
        message = "every answer is excluded by loss, weight or train, so nothing to learn"
        raise DataError(message, place=place, fix="Include one answer, or leave the record out")


def _parse_retrieval(row: JsonValue) -> dict[str, Any]:
    """Return the fields query, positive and negative; without the key, negative is ().

    Raises:
        DataError: query or positive is missing or empty, or a value is wrong.
    """
    for key in ("query", "positive"):
        if not row.value.get(key):
            fix = "Write a list of parts"
            raise row.get_field(key).make_error(f"{key} is missing or empty", fix=fix)
    return {
        "query": row.get_field("query").parse_parts(),
        "positive": row.get_field("positive").parse_candidates(),
        "negative": row.get_field("negative", []).parse_candidates(),
    }


_FIELD_PARSERS = {
    "pair": _parse_pair,
    "interleaved": _parse_interleaved,
    "chat": _parse_chat,
    "retrieval": _parse_retrieval,
}


def record_to_json(record: Record, *, root: Path) -> dict[str, Any]:
    """Return the JSON object that `parse_record` with the same `root` reads as the same record.

    Image paths become relative to `root`, with symbolic links resolved and ``/`` between folders;
    images without a file of their own are read and become ``data:`` URLs. Empty optional fields
    have no key, and a single short caption is a string. `Record.place` is not written. A pair
    without an image fails an assertion.

    Raises:
        ImageError: as `images.read_bytes`, for an image in an archive.
    """

    def encode_image(ref: ImageRef) -> str:
        if ref.path is None:
            return "data:;base64," + base64.b64encode(read_bytes(ref)).decode()
        path = Path(os.path.relpath(ref.path.resolve(), root.resolve())).as_posix()
        # A name may look like a URL.
        return f"./{path}" if re.match("(data|file):", path, re.IGNORECASE) else path

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
            {"role": turn.role, "content": encode(turn.parts)}
            | ({} if turn.supervised else {"loss": False})
            for turn in record.messages
        ]
    else:
        raw["query"] = encode(record.query)
        raw["positive"] = [encode(parts) for parts in record.positive]
    if record.negative:
        raw["negative"] = [encode(parts) for parts in record.negative]
    if record.metadata:
        raw["metadata"] = dict(record.metadata)
    return raw
