"""Chats of others: LLaVA conversations, OpenAI and TRL messages, ms-swift."""

from __future__ import annotations

from typing import Any

from vlduet.data.readers.rows import (
    SourceRow,
    build_chat_record,
    interleave_images,
    parse_image,
    parse_images,
    parse_text,
)
from vlduet.data.records import ROLES, ImageRef, Message, Part, Place, Record
from vlduet.errors import DataError, suggest_name

IMAGE_TAG = "<image>"
ROLE_BY_SPEAKER = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
"""LLaVA's `from` -> our roles."""
LLAVA_KEYS = ("conversations", "image", "images")
CHAT_KEYS = ("messages", "prompt", "completion", "images", "image")
SWIFT_KEYS = ("messages", "query", "response", "history", "system", "images", "image")


def parse_llava(row: SourceRow) -> Record:
    """``{"id", "image": str or list, "conversations": [{"from": "human", "value": "<image>\\n..."}, ...]}``"""
    _no_video(row)
    images = parse_images(row, "image", "images")
    turns = _list(row.value.get("conversations"), row.place.with_field("conversations"))
    messages, num_images = [], len(images)
    for i, turn in enumerate(turns):
        here = row.place.with_field(f"conversations[{i}]")
        speaker = turn.get("from") if isinstance(turn, dict) else None
        if not isinstance(speaker, str) or speaker not in ROLE_BY_SPEAKER:
            raise DataError(
                f"from is {speaker!r}",
                place=here.with_field("from"),
                fix=f"Use one of {', '.join(ROLE_BY_SPEAKER)}",
            )
        here = here.with_field("value")
        parts = interleave_images(
            parse_text(turn.get("value"), here), IMAGE_TAG, images, place=here
        )
        messages.append(Message(ROLE_BY_SPEAKER[speaker], tuple(parts)))
    if images:
        what = (
            f"{num_images} images, but {num_images - len(images)} {IMAGE_TAG} in the conversation"
        )
        key = "image" if "image" in row.value else "images"
        raise DataError(
            what,
            place=row.place.with_field(key),
            fix=f"Write one {IMAGE_TAG} where each image belongs",
        )
    return build_chat_record(row, messages, field="conversations", used=LLAVA_KEYS)


def parse_messages(row: SourceRow) -> Record:
    """OpenAI ``messages``, TRL ``messages`` + ``images``, or TRL ``prompt`` + ``completion`` + ``images``.

    Images of the column go to the ``{"type": "image"}`` placeholders and ``<image>`` tags in their order; where a row has
    neither, they all stand before the first user turn.
    """
    _no_video(row)
    if "messages" in row.value:
        turns, field = _list(row.value["messages"], row.place.with_field("messages")), "messages"
        placed = [(turn, row.place.with_field(f"messages[{i}]")) for i, turn in enumerate(turns)]
    else:
        field = "completion"
        placed = _side(row, "prompt", "user") + _side(row, "completion", "assistant")
    return _build(row, placed, field=field, used=CHAT_KEYS)


def parse_swift(row: SourceRow) -> Record:
    """ms-swift: ``messages`` with ``<image>`` tags, or ``query``, ``response``, ``history`` and ``system``."""
    _no_video(row)
    if "messages" in row.value:
        turns = _list(row.value["messages"], row.place.with_field("messages"))
        placed = [(turn, row.place.with_field(f"messages[{i}]")) for i, turn in enumerate(turns)]
        return _build(row, placed, field="messages", used=SWIFT_KEYS)
    placed = []
    if row.value.get("system"):
        placed.append(
            ({"role": "system", "content": row.value["system"]}, row.place.with_field("system"))
        )
    history = row.value.get("history")
    for i, pair in enumerate(_list(history, row.place.with_field("history")) if history else []):
        here = row.place.with_field(f"history[{i}]")
        if not isinstance(pair, list) or len(pair) != 2:
            raise DataError(
                "not a pair of question and answer", place=here, fix='Write ["question", "answer"]'
            )
        placed += [
            ({"role": "user", "content": pair[0]}, here),
            ({"role": "assistant", "content": pair[1]}, here),
        ]
    for key, role in (("query", "user"), ("response", "assistant")):
        placed.append(
            (
                {
                    "role": role,
                    "content": parse_text(row.value.get(key), row.place.with_field(key)),
                },
                row.place.with_field(key),
            )
        )
    return _build(row, placed, field="response", used=SWIFT_KEYS)


def _side(row: SourceRow, key: str, role: str) -> list[tuple[Any, Place]]:
    """`prompt` or `completion`: text of `role`, or messages."""
    value, place = row.value.get(key), row.place.with_field(key)
    if isinstance(value, list):
        return [
            (turn, row.place.with_field(f"{key}[{i}]"))
            for i, turn in enumerate(_list(value, place))
        ]
    return [({"role": role, "content": parse_text(value, place)}, place)]


def _build(
    row: SourceRow, placed: list[tuple[Any, Place]], *, field: str, used: tuple[str, ...]
) -> Record:
    images = parse_images(row, "images", "image")
    num_images = len(images)
    if images and not any(_has_slot(turn) for turn, _ in placed):
        users = [
            i
            for i, (turn, _) in enumerate(placed)
            if isinstance(turn, dict) and turn.get("role") == "user"
        ]
        first = min(users, default=0)
        lead, images = list[Part](images), []
    else:
        first, lead = -1, []
    turns = []
    for i, (turn, place) in enumerate(placed):
        parts = _content(turn, images, place=place, row=row)
        turns.append(Message(_role(turn, place), tuple([*lead, *parts] if i == first else parts)))
    if images:
        what = f"{num_images} images, but places for {num_images - len(images)}"
        fix = f'Write one {{"type": "image"}} or {IMAGE_TAG} where each image belongs'
        raise DataError(
            what,
            place=row.place.with_field("images" if "images" in row.value else "image"),
            fix=fix,
        )
    return build_chat_record(row, turns, field=field, used=used)


def _role(turn: Any, place: Place) -> str:
    role = turn.get("role") if isinstance(turn, dict) else None
    role = "system" if role == "developer" else role
    if role not in ROLES:
        fix = (
            suggest_name(role, ROLES) if isinstance(role, str) else f"Use one of {', '.join(ROLES)}"
        )
        raise DataError(f"role is {role!r}", place=place.with_field("role"), fix=fix)
    return str(role)


def _has_slot(turn: Any) -> bool:
    content = turn.get("content") if isinstance(turn, dict) else None
    if isinstance(content, str):
        return IMAGE_TAG in content
    return isinstance(content, list) and any(
        isinstance(part, dict) and (_is_placeholder(part) or IMAGE_TAG in str(part.get("text", "")))
        for part in content
    )


def _is_placeholder(part: dict[str, Any]) -> bool:
    return part.get("type") == "image" and not part.keys() & {
        "image",
        "url",
        "path",
        "base64",
        "image_url",
    }


def _content(turn: Any, images: list[ImageRef], *, place: Place, row: SourceRow) -> list[Part]:
    if not isinstance(turn, dict):
        raise DataError(
            f"a turn is {type(turn).__name__}",
            place=place,
            fix='Write {"role": ..., "content": ...}',
        )
    content, place = turn.get("content"), place.with_field("content")
    if isinstance(content, str):
        return interleave_images(parse_text(content, place), IMAGE_TAG, images, place=place)
    parts: list[Part] = []
    for i, part in enumerate(_list(content, place)):
        here = place.with_field(f"[{i}]")
        kind = part.get("type") if isinstance(part, dict) else None
        bare = isinstance(part, dict) and kind is None and "text" in part
        if bare or kind in ("text", "input_text", "output_text"):
            parts += interleave_images(
                parse_text(part.get("text"), here.with_field("text")), IMAGE_TAG, images, place=here
            )
        elif isinstance(part, dict) and _is_placeholder(part):
            if not images:
                fix = "Add it to the images column, or write it here as image_url"
                raise DataError("a place for an image, but no image left", place=here, fix=fix)
            parts.append(images.pop(0))
        elif isinstance(part, dict) and (
            kind in ("image", "image_url", "input_image") or "image" in part
        ):
            parts.append(_part_image(part, here, row))
        else:
            fix = "Keep text and image parts"
            raise DataError(
                f"a content part of type {kind!r}", place=here.with_field("type"), fix=fix
            )
    return parts


def _part_image(part: dict[str, Any], place: Place, row: SourceRow) -> ImageRef:
    for key in ("image_url", "image", "url", "path"):
        if key in part:
            value = part[key]
            if key == "image_url" and isinstance(value, dict):
                value, key = value.get("url"), "image_url.url"
            if isinstance(value, str):
                value = value.removeprefix("file://")
            return parse_image(value, place.with_field(key), row.root)
    return parse_image({"bytes": part.get("base64")}, place.with_field("base64"), row.root)


def _list(value: Any, place: Place) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise DataError(
            f"{type(value).__name__} instead of a list with items",
            place=place,
            fix="Write [{...}, ...]",
        )
    return value


def _no_video(row: SourceRow) -> None:
    for key in ("video", "videos", "audio", "audios"):
        if row.value.get(key):
            fix = "Leave the row out, or use frames as images"
            raise DataError(f"{key} is not supported", place=row.place.with_field(key), fix=fix)
