"""Record formats of chats: LLaVA conversations, OpenAI and TRL messages, ms-swift."""

from __future__ import annotations

from typing import Any

from vlduet.data.readers.rows import SourceRow, build_chat_record, interleave_images, parse_images
from vlduet.data.record_json import JsonValue
from vlduet.data.records import ROLES, ImageRef, Message, Part, Record
from vlduet.errors import DataError, suggest_name

IMAGE_TAG = "<image>"
"""Text that stands for the next image of the row."""
ROLE_BY_SPEAKER = {"human": "user", "gpt": "assistant", **{role: role for role in ROLES}}
"""Role of a `Message` by LLaVA's value of ``from``."""
LLAVA_KEYS = ("conversations", "image", "images")
CHAT_KEYS = ("messages", "prompt", "completion", "images", "image")
SWIFT_KEYS = ("messages", "query", "response", "history", "system", "images", "image")


def parse_llava(row: SourceRow) -> Record:
    """Return a chat record of a LLaVA row.

    The row is ``{"id", "image": text or list, "conversations": [{"from": "human", "value":
    "<image>\\n..."}, ...]}``. Each tag is replaced by the next image; other keys become metadata.

    Raises:
        DataError: a turn, an image or the id is wrong, images and tags are not equally many, no
            turn is by the assistant, or there is video or audio.
    """
    _refuse_video(row)
    images = parse_images(row, "image", "images")
    num_images = len(images)
    messages = []
    for turn in row.get_field("conversations").parse_items("turns"):
        speaker = turn.value.get("from") if isinstance(turn.value, dict) else None
        if not isinstance(speaker, str) or speaker not in ROLE_BY_SPEAKER:
            place = turn.place.with_field("from")
            fix = f"Use one of {', '.join(ROLE_BY_SPEAKER)}"
            raise DataError(f"from is {speaker!r}", place=place, fix=fix)
        text = turn.get_field("value")
        parts = interleave_images(text.parse_text(), IMAGE_TAG, images, place=text.place)
        messages.append(Message(ROLE_BY_SPEAKER[speaker], tuple(parts)))
    if images:
        message = f"{num_images} images, but {num_images - len(images)} {IMAGE_TAG}"
        fix = f"Write one {IMAGE_TAG} where each image belongs"
        key = "image" if "image" in row.value else "images"
        raise row.get_field(key).make_error(f"{message} in the conversation", fix=fix)
    return build_chat_record(row, messages, field="conversations", used=LLAVA_KEYS)


def parse_messages(row: SourceRow) -> Record:
    """Return a chat record of OpenAI or TRL messages.

    The row has OpenAI ``messages``, TRL ``messages`` + ``images``, or TRL ``prompt`` +
    ``completion`` + ``images``. Images of the column go to the ``{"type": "image"}`` placeholders
    and ``<image>`` tags in their order; if a row has neither, all precede the first user turn.
    ``prompt`` and ``completion`` are lists of messages, or texts of the user and the assistant.
    Other keys become metadata.

    Raises:
        DataError: a turn, an image or the id is wrong, images and their places are not equally
            many, no turn is by the assistant, or there is video or audio.
    """
    _refuse_video(row)
    if "messages" in row.value:
        turns = row.get_field("messages").parse_items("turns")
        return _build_record(row, turns, field="messages", used=CHAT_KEYS)
    turns = _to_turns(row.get_field("prompt"), "user")
    turns += _to_turns(row.get_field("completion"), "assistant")
    return _build_record(row, turns, field="completion", used=CHAT_KEYS)


def parse_swift(row: SourceRow) -> Record:
    """Return a chat record of an ms-swift row.

    The row has ``messages`` with ``<image>`` tags, or ``query`` and ``response`` with optional
    ``history`` (pairs of question and answer) and ``system``. Images are placed as in
    `parse_messages`. Other keys become metadata.

    Raises:
        DataError: as `parse_messages`; or ``query``, ``response`` or a pair is missing or wrong.
    """
    _refuse_video(row)
    if "messages" in row.value:
        turns = row.get_field("messages").parse_items("turns")
        return _build_record(row, turns, field="messages", used=SWIFT_KEYS)
    turns = []
    if row.value.get("system"):
        turns.append(_make_turn("system", row.get_field("system")))
    history = row.get_field("history")
    pairs = history.parse_items("pairs of question and answer") if history.value else []
    for pair in pairs:
        if not isinstance(pair.value, list) or len(pair.value) != 2:
            fix = 'Write ["question", "answer"]'
            raise pair.make_error("not a pair of question and answer", fix=fix)
        for role, text in zip(("user", "assistant"), pair.value, strict=True):
            turns.append(_make_turn(role, JsonValue(text, pair.place, pair.root)))
    for key, role in (("query", "user"), ("response", "assistant")):
        row.get_field(key).parse_text()
        turns.append(_make_turn(role, row.get_field(key)))
    return _build_record(row, turns, field="response", used=SWIFT_KEYS)


def _to_turns(field: JsonValue, role: str) -> list[JsonValue]:
    """Return TRL's ``prompt`` or ``completion`` as turns: messages, or one text of `role`."""
    if isinstance(field.value, list):
        return field.parse_items("turns")
    field.parse_text()
    return [_make_turn(role, field)]


def _make_turn(role: str, content: JsonValue) -> JsonValue:
    """Return the message of a role whose content stands elsewhere, at the place of the content."""
    return JsonValue({"role": role, "content": content.value}, content.place, content.root)


def _build_record(
    row: SourceRow, turns: list[JsonValue], *, field: str, used: tuple[str, ...]
) -> Record:
    """Return the chat record of messages in the OpenAI form, with the row's images in place.

    If no message has a place for an image, all images precede the first user turn (without one,
    the first turn).

    Args:
        field: key of the source that holds the answers, for the error of a missing one.
        used: columns that are not metadata.

    Raises:
        DataError: a turn, an image or the id is wrong, images and their places are not equally
            many, or no turn is by the assistant.
    """
    images = parse_images(row, "images", "image")
    num_images = len(images)
    leading: list[Part] = []  # images that precede the first user turn
    if not any(_has_image_place(turn.value) for turn in turns):
        leading += images
        images = []
    roles = [turn.value.get("role") if isinstance(turn.value, dict) else None for turn in turns]
    first_user = roles.index("user") if "user" in roles else 0
    messages = []
    for i, turn in enumerate(turns):
        parts = _parse_content(turn, images)
        if i == first_user:
            parts = [*leading, *parts]
        messages.append(Message(_parse_role(turn), tuple(parts)))
    if images:
        message = f"{num_images} images, but places for {num_images - len(images)}"
        fix = f'Write one {{"type": "image"}} or {IMAGE_TAG} where each image belongs'
        key = "images" if "images" in row.value else "image"
        raise row.get_field(key).make_error(message, fix=fix)
    return build_chat_record(row, messages, field=field, used=used)


def _parse_role(turn: JsonValue) -> str:
    """Return the role of a message, one of `ROLES`; OpenAI's ``developer`` becomes ``system``.

    Raises:
        DataError: the role is another one or missing.
    """
    role = turn.get_field("role")
    if role.value == "developer":
        return "system"
    if role.value not in ROLES:
        fix = f"Use one of {', '.join(ROLES)}"
        if isinstance(role.value, str):
            fix = suggest_name(role.value, ROLES)
        raise role.make_error(f"role is {role.value!r}", fix=fix)
    return str(role.value)


def _has_image_place(turn: Any) -> bool:
    """Return whether a message has a placeholder or a tag for an image of the row's column.

    A malformed message has none.
    """
    content = turn.get("content") if isinstance(turn, dict) else None
    if isinstance(content, str):
        return IMAGE_TAG in content
    parts = content if isinstance(content, list) else []
    return any(
        _is_image_placeholder(part) or IMAGE_TAG in str(part.get("text", ""))
        for part in parts
        if isinstance(part, dict)
    )


def _is_image_placeholder(part: dict[str, Any]) -> bool:
    sources = {"image", "url", "path", "base64", "image_url"}
    return part.get("type") == "image" and not part.keys() & sources


def _parse_content(turn: JsonValue, images: list[ImageRef]) -> list[Part]:
    """Return the parts of a message; images that fill a place are removed from `images`.

    A content part may be a text with tags, a placeholder, or an image of its own.

    Raises:
        DataError: the message is no object, its content is empty or wrong, a part is neither text
            nor image, or there are more places than images.
    """
    if not isinstance(turn.value, dict):
        message = f"a turn is {type(turn.value).__name__}"
        raise turn.make_error(message, fix='Write {"role": ..., "content": ...}')
    content = turn.get_field("content")
    if isinstance(content.value, str):
        return interleave_images(content.parse_text(), IMAGE_TAG, images, place=content.place)
    parts: list[Part] = []
    for item in content.parse_items("content parts"):
        part = item.value if isinstance(item.value, dict) else {}
        kind = part.get("type")
        if kind in ("text", "input_text", "output_text") or (kind is None and "text" in part):
            text = item.get_field("text").parse_text()
            parts += interleave_images(text, IMAGE_TAG, images, place=item.place)
        elif _is_image_placeholder(part):
            if not images:
                fix = "Add it to the images column, or write it here as image_url"
                raise item.make_error("a place for an image, but no image left", fix=fix)
            parts.append(images.pop(0))
        elif kind in ("image", "image_url", "input_image") or "image" in part:
            parts.append(_parse_image_part(item))
        else:
            place = item.place.with_field("type")
            message = f"a content part of type {kind!r}"
            raise DataError(message, place=place, fix="Keep text and image parts")
    return parts


def _parse_image_part(part: JsonValue) -> ImageRef:
    """Return the image of an OpenAI or TRL content part, without opening it.

    The first key of ``image_url`` (a text or ``{"url"}``), ``image``, ``url`` and ``path`` that
    exists names a path, a ``file://`` or a ``data:`` URL, or is another value that
    `JsonValue.parse_image` takes; without these keys, ``base64`` has the bytes.

    Raises:
        DataError: no key exists, or its value is wrong (as `JsonValue.parse_image`).
    """
    for key in ("image_url", "image", "url", "path"):
        if key in part.value:
            source = part.get_field(key)
            if key == "image_url" and isinstance(source.value, dict):
                source = source.get_field("url")
            if isinstance(source.value, str):
                path = source.value.removeprefix("file://")
                source = JsonValue(path, source.place, source.root)
            return source.parse_image()
    source = part.get_field("base64")
    return JsonValue({"bytes": source.value}, source.place, source.root).parse_image()


def _refuse_video(row: SourceRow) -> None:
    """Raise DataError if a column of video or audio is not empty."""
    for key in ("video", "videos", "audio", "audios"):
        if row.value.get(key):
            fix = "Leave the row out, or use frames as images"
            raise row.get_field(key).make_error(f"{key} is not supported", fix=fix)
