"""A row: what containers give and schemas take, and the few ways to read a value out of it with its place named."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlduet.data.records import (
    ImageRef,
    Message,
    Part,
    Place,
    Record,
    is_utf8_encodable,
    parse_image,
    parse_text,
)
from vlduet.errors import DataError

__all__ = [
    "SourceRow",
    "build_chat_record",
    "collect_metadata",
    "interleave_images",
    "parse_id",
    "parse_image",
    "parse_images",
    "parse_text",
    "split_caption_lines",
]


@dataclass(frozen=True, slots=True)
class SourceRow:
    """One row of a container: a JSON-like value, or the reason why there is none."""

    place: Place
    root: Path
    """Where relative image paths start."""
    default_id: str
    """The id of a row that has none of its own."""
    value: Any = None
    error: DataError | None = None


def drop_null_fields(value: Any) -> Any:
    """Without the keys that hold None: tables give every row every key."""
    if isinstance(value, dict):
        return {key: drop_null_fields(item) for key, item in value.items() if item is not None}
    return [drop_null_fields(item) for item in value] if isinstance(value, list) else value


def parse_id(row: SourceRow) -> str:
    """The row's own id, else its name."""
    own = row.value.get("id")
    if own is None or own == "":
        return row.default_id
    if not isinstance(own, str | int) or isinstance(own, bool):
        fix = "Write a string, or leave the id out"
        raise DataError(
            f"id is {type(own).__name__} {str(own)[:40]!r}",
            place=row.place.with_field("id"),
            fix=fix,
        )
    if not is_utf8_encodable(str(own)):
        raise DataError(
            f"id is {own!a}", place=row.place.with_field("id"), fix="Write it again as UTF-8"
        )
    return str(own)


def collect_metadata(row: SourceRow, used: Iterable[str]) -> dict[str, Any]:
    """All columns that are not `used`, in JSON types; encoded bytes are left out."""
    own = row.value.get("metadata")
    left = {**(own if isinstance(own, Mapping) else {})}
    left |= {k: v for k, v in row.value.items() if k not in {*used, "id", "metadata"}}
    return {
        key: _plain(value)
        for key, value in left.items()
        if not isinstance(value, bytes) and value is not None
    }


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items() if not isinstance(v, bytes)}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value if not isinstance(v, bytes)]
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    return value if isinstance(value, str | int | float | bool) or value is None else str(value)


def parse_images(row: SourceRow, *keys: str) -> list[ImageRef]:
    """The images under the first of `keys` that is there: one, or a list of them."""
    for key in keys:
        value = row.value.get(key)
        if value in (None, "", []):
            continue
        if isinstance(value, list):
            return [
                parse_image(v, row.place.with_field(f"{key}[{i}]"), row.root)
                for i, v in enumerate(value)
            ]
        return [parse_image(value, row.place.with_field(key), row.root)]
    return []


def split_caption_lines(text: str) -> list[str]:
    """The captions of a text file: one a line."""
    return [line.strip() for line in text.lstrip("\ufeff").splitlines() if line.strip()]


def interleave_images(text: str, tag: str, images: list[ImageRef], *, place: Place) -> list[Part]:
    """Text with `tag`s -> slices, each tag taking the next of `images` (and removing it from the list)."""
    parts: list[Part] = []
    for i, piece in enumerate(text.split(tag)):
        if i:
            if not images:
                fix = f"Write as many {tag} as there are images, or add the missing image"
                raise DataError(f"a {tag} more than there are images", place=place, fix=fix)
            parts.append(images.pop(0))
        if piece.strip():
            parts.append(piece.strip())
    return parts


def build_chat_record(
    row: SourceRow, turns: list[Message], *, field: str, used: Iterable[str]
) -> Record:
    """A chat record; `field` holds its turns in the source."""
    if not any(turn.role == "assistant" for turn in turns):
        raise DataError(
            "no assistant turn, so nothing to learn",
            place=row.place.with_field(field),
            fix="Add the answer",
        )
    return Record(
        parse_id(row), messages=tuple(turns), metadata=collect_metadata(row, used), place=row.place
    )
