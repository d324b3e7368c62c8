"""Queries as JSON files: the parts of one content, or a conversation, in the form of records.

    parts         [{"text": ...}, {"image": FILE}, ...]
    conversation  {"messages": [{"role": ..., "content": ...}, ...]}

A relative path of an image starts from the folder of the file.
"""

from __future__ import annotations

from pathlib import Path

from vlduet.data.images import read_image_header
from vlduet.data.record_json import JsonValue
from vlduet.data.records import Conversation, ImageRef, Parts, Place
from vlduet.errors import DataError, ImageError, suggest_name
from vlduet.structured_files import read_json

MAX_QUERY_BYTES = 64 * 2**20
"""Size of the largest file of a query; images may be part of it as data: URLs."""
MAX_QUERY_PARTS = 256
"""Largest number of texts and images in a query, as over HTTP."""
FIX = 'Write [{"text": ...}, {"image": ...}] or {"messages": [...]}'


def read_query_file(path: Path) -> Parts | Conversation:
    """Return the query of a JSON file: its parts in order, or the messages of a conversation.

    Headers of images are read, so that a missing file is an error here; pixels are not decoded.

    Raises:
        DataError: the file cannot be read, is larger than `MAX_QUERY_BYTES`, or is no query; or a
            part of it is wrong, or there are more than `MAX_QUERY_PARTS`.
        ImageError: an image is missing, too large or broken, at its field of the file.
    """
    value = read_json(path, error_class=DataError, fix=FIX, max_bytes=MAX_QUERY_BYTES)
    query = JsonValue(value, Place(str(path)), path.parent)
    if not isinstance(value, dict):
        parts = query.parse_parts()
        _check_number(len(parts), query.place)
        _check_images(parts, query.place)
        return parts
    for key in sorted(value.keys() - {"messages"}):
        field = query.get_field(key)
        raise field.make_error(f"unknown key '{key}'", fix=suggest_name(key, {"messages"}))
    turns = query.get_field("messages")
    messages = tuple(turn.parse_turn() for turn in turns.parse_items("turns", fix=FIX))
    _check_number(sum(len(message.parts) for message in messages), turns.place)
    for i, message in enumerate(messages):
        _check_images(message.parts, turns.place.with_field(f"[{i}].content"))
    return messages


def _check_number(num_parts: int, place: Place) -> None:
    """Raise DataError for more than `MAX_QUERY_PARTS` texts and images."""
    if num_parts > MAX_QUERY_PARTS:
        message = f"{num_parts} texts and images, more than {MAX_QUERY_PARTS}"
        raise DataError(message, place=place, fix="Write fewer, or join texts")


def _check_images(parts: Parts, place: Place) -> None:
    """Raise ImageError for an image whose header cannot be read, at its item of `place`."""
    for i, part in enumerate(parts):
        if isinstance(part, ImageRef):
            try:
                read_image_header(part)
            except ImageError as error:
                message = f"{part.name}: {error.message}"
                field = place.with_field(f"[{i}]")
                raise ImageError(message, place=field, fix=error.fix) from None
