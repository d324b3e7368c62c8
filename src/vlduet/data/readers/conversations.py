"""Chats of others: LLaVA conversations, OpenAI and TRL messages, ms-swift."""

from __future__ import annotations

from typing import Any

from vlduet.data.readers.rows import Row, chat, image_of, images_of, interleave, text_of
from vlduet.data.records import ROLES, ImageRef, Message, Part, Place, Record
from vlduet.errors import DataError, closest

TAG = "<image>"
SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
"""LLaVA's `from` -> our roles."""
LLAVA_KEYS = ("conversations", "image", "images")
CHAT_KEYS = ("messages", "prompt", "completion", "images", "image")
SWIFT_KEYS = ("messages", "query", "response", "history", "system", "images", "image")


def llava(row: Row) -> Record:
    """``{"id", "image": str or list, "conversations": [{"from": "human", "value": "<image>\\n..."}, ...]}``"""
    _no_video(row)
    images = images_of(row, "image", "images")
    turns = _list(row.value.get("conversations"), row.place.at("conversations"))
    messages, num_images = [], len(images)
    for i, turn in enumerate(turns):
        here = row.place.at(f"conversations[{i}]")
        speaker = turn.get("from") if isinstance(turn, dict) else None
        if not isinstance(speaker, str) or speaker not in SPEAKERS:
            raise DataError(f"from is {speaker!r}", place=here.at("from"), fix=f"Use one of {', '.join(SPEAKERS)}")
        here = here.at("value")
        parts = interleave(text_of(turn.get("value"), here), TAG, images, place=here)
        messages.append(Message(SPEAKERS[speaker], tuple(parts)))
    if images:
        what = f"{num_images} images, but {num_images - len(images)} {TAG} in the conversation"
        key = "image" if "image" in row.value else "images"
        raise DataError(what, place=row.place.at(key), fix=f"Write one {TAG} where each image belongs")
    return chat(row, messages, field="conversations", used=LLAVA_KEYS)


def messages(row: Row) -> Record:
    """OpenAI ``messages``, TRL ``messages`` + ``images``, or TRL ``prompt`` + ``completion`` + ``images``.

    Images of the column go to the ``{"type": "image"}`` placeholders and ``<image>`` tags in their order; where a row has
    neither, they all stand before the first user turn.
    """
    _no_video(row)
    if "messages" in row.value:
        turns, field = _list(row.value["messages"], row.place.at("messages")), "messages"
        placed = [(turn, row.place.at(f"messages[{i}]")) for i, turn in enumerate(turns)]
    else:
        field = "completion"
        placed = _side(row, "prompt", "user") + _side(row, "completion", "assistant")
    return _build(row, placed, field=field, used=CHAT_KEYS)


def swift(row: Row) -> Record:
    """ms-swift: ``messages`` with ``<image>`` tags, or ``query``, ``response``, ``history`` and ``system``."""
    _no_video(row)
    if "messages" in row.value:
        turns = _list(row.value["messages"], row.place.at("messages"))
        placed = [(turn, row.place.at(f"messages[{i}]")) for i, turn in enumerate(turns)]
        return _build(row, placed, field="messages", used=SWIFT_KEYS)
    placed = []
    if row.value.get("system"):
        placed.append(({"role": "system", "content": row.value["system"]}, row.place.at("system")))
    history = row.value.get("history")
    for i, pair in enumerate(_list(history, row.place.at("history")) if history else []):
        here = row.place.at(f"history[{i}]")
        if not isinstance(pair, list) or len(pair) != 2:
            raise DataError("not a pair of question and answer", place=here, fix='Write ["question", "answer"]')
        placed += [({"role": "user", "content": pair[0]}, here), ({"role": "assistant", "content": pair[1]}, here)]
    for key, role in (("query", "user"), ("response", "assistant")):
        placed.append(({"role": role, "content": text_of(row.value.get(key), row.place.at(key))}, row.place.at(key)))
    return _build(row, placed, field="response", used=SWIFT_KEYS)


def _side(row: Row, key: str, role: str) -> list[tuple[Any, Place]]:
    """`prompt` or `completion`: text of `role`, or messages."""
    value, place = row.value.get(key), row.place.at(key)
    if isinstance(value, list):
        return [(turn, row.place.at(f"{key}[{i}]")) for i, turn in enumerate(_list(value, place))]
    return [({"role": role, "content": text_of(value, place)}, place)]


def _build(row: Row, placed: list[tuple[Any, Place]], *, field: str, used: tuple[str, ...]) -> Record:
    images = images_of(row, "images", "image")
    num_images = len(images)
    if images and not any(_has_slot(turn) for turn, _ in placed):
        users = [i for i, (turn, _) in enumerate(placed) if isinstance(turn, dict) and turn.get("role") == "user"]
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
        fix = f'Write one {{"type": "image"}} or {TAG} where each image belongs'
        raise DataError(what, place=row.place.at("images" if "images" in row.value else "image"), fix=fix)
    return chat(row, turns, field=field, used=used)


def _role(turn: Any, place: Place) -> str:
    role = turn.get("role") if isinstance(turn, dict) else None
    role = "system" if role == "developer" else role
    if role not in ROLES:
        fix = closest(role, ROLES) if isinstance(role, str) else f"Use one of {', '.join(ROLES)}"
        raise DataError(f"role is {role!r}", place=place.at("role"), fix=fix)
    return str(role)


def _has_slot(turn: Any) -> bool:
    content = turn.get("content") if isinstance(turn, dict) else None
    if isinstance(content, str):
        return TAG in content
    return isinstance(content, list) and any(
        isinstance(part, dict) and (_is_placeholder(part) or TAG in str(part.get("text", ""))) for part in content
    )


def _is_placeholder(part: dict[str, Any]) -> bool:
    return part.get("type") == "image" and not part.keys() & {"image", "url", "path", "base64", "image_url"}


def _content(turn: Any, images: list[ImageRef], *, place: Place, row: Row) -> list[Part]:
    if not isinstance(turn, dict):
        raise DataError(f"a turn is {type(turn).__name__}", place=place, fix='Write {"role": ..., "content": ...}')
    content, place = turn.get("content"), place.at("content")
    if isinstance(content, str):
        return interleave(text_of(content, place), TAG, images, place=place)
    parts: list[Part] = []
    for i, part in enumerate(_list(content, place)):
        here = place.at(f"[{i}]")
        kind = part.get("type") if isinstance(part, dict) else None
        bare = isinstance(part, dict) and kind is None and "text" in part
        if bare or kind in ("text", "input_text", "output_text"):
            parts += interleave(text_of(part.get("text"), here.at("text")), TAG, images, place=here)
        elif isinstance(part, dict) and _is_placeholder(part):
            if not images:
                fix = "Add it to the images column, or write it here as image_url"
                raise DataError("a place for an image, but no image left", place=here, fix=fix)
            parts.append(images.pop(0))
        elif isinstance(part, dict) and (kind in ("image", "image_url", "input_image") or "image" in part):
            parts.append(_part_image(part, here, row))
        else:
            fix = "Keep text and image parts"
            raise DataError(f"a content part of type {kind!r}", place=here.at("type"), fix=fix)
    return parts


def _part_image(part: dict[str, Any], place: Place, row: Row) -> ImageRef:
    for key in ("image_url", "image", "url", "path"):
        if key in part:
            value = part[key]
            if key == "image_url" and isinstance(value, dict):
                value, key = value.get("url"), "image_url.url"
            if isinstance(value, str):
                value = value.removeprefix("file://")
            return image_of(value, place.at(key), row.root)
    return image_of({"bytes": part.get("base64")}, place.at("base64"), row.root)


def _list(value: Any, place: Place) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise DataError(f"{type(value).__name__} instead of a list with items", place=place, fix="Write [{...}, ...]")
    return value


def _no_video(row: Row) -> None:
    for key in ("video", "videos", "audio", "audios"):
        if row.value.get(key):
            fix = "Leave the row out, or use frames as images"
            raise DataError(f"{key} is not supported", place=row.place.at(key), fix=fix)
