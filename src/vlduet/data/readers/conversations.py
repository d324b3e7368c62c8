"""Chats in the formats of others: LLaVA and ShareGPT, OpenAI and TRL, ms-swift.

All formats share their turns, so one parser reads them; the column of the answers decides the
form. Rows of ms-swift with ``positive_messages`` are queries with candidates instead.
"""

from __future__ import annotations

import mimetypes
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from vlduet.data.image_formats import IMAGE_SUFFIXES
from vlduet.data.readers.chat_keys import (
    ANSWER_FIELDS,
    RETRIEVAL_FIELDS,
    SYSTEM_FIELDS,
    is_empty,
    refuse_row_keys,
)
from vlduet.data.readers.chat_turns import parse_turns, place_images
from vlduet.data.readers.rows import (
    FILE_COLUMNS,
    SourceRow,
    collect_metadata,
    find_image_columns,
    normalize_column,
    parse_id,
    parse_images,
)
from vlduet.data.record_json import TURN_KEYS as OWN_TURN_KEYS
from vlduet.data.record_json import JsonValue, require_answer
from vlduet.data.records import ImageRef, Message, Parts, Record, extract_images


def parse_chat(row: SourceRow) -> Record:
    """Return the record of a chat, or a retrieval record of a row with ``positive_messages``.

    The answers are those of one of:

    - ``messages`` of ``role`` and ``content``, or ``conversations`` of ``from`` and ``value``;
    - ``prompt`` and ``completion``, each a list of messages or a text;
    - ``query`` and ``response``, with an optional ``history`` of pairs of question and answer.

    A column ``system`` becomes the first turn. The images of a column go to their places in the
    turns, as `chat_turns` describes. Columns that are not read become metadata; those of a chat
    without images that name images are counted in the row's context.

    Raises:
        DataError: a turn, an image or the id is wrong; answers or images stand in several columns;
            images and their places are not equally many; nothing is to be learned; or a key that
            changes what is learned is not supported.
    """
    refuse_row_keys(row)
    if any(not is_empty(row.value.get(key)) for key in RETRIEVAL_FIELDS):
        return _parse_retrieval(row)
    field = _find_answer_field(row)
    turns, used = _collect_turns(row, field)
    turns, system_columns = _add_system_turn(row, turns)
    images, column = _parse_image_column(row)
    messages = place_images(parse_turns(row, turns), images, row.get_field(column))
    require_answer(messages, row.place.with_field(field))
    metadata = collect_metadata(row, {*used, *system_columns, column})
    if not any(extract_images(message.parts) for message in messages):
        _count_image_names(row, metadata)
    return Record(parse_id(row), messages=tuple(messages), metadata=metadata, place=row.place)


def _find_answer_field(row: SourceRow) -> str:
    """Return the only one of `ANSWER_FIELDS` that holds a value, else the first of the row's.

    Raises:
        DataError: the row has none of them, or several hold a value.
    """
    present = [key for key in ANSWER_FIELDS if key in row.value]
    filled = [key for key in present if not is_empty(row.value[key])]
    if len(filled) > 1:
        message = f"answers in several columns: {', '.join(filled)}"
        fix = "Keep one of them, or rename the others to keep them as metadata"
        raise row.get_field(filled[1]).make_error(message, fix=fix)
    if not present:
        fix = f"Write the turns under {', '.join(ANSWER_FIELDS)}"
        raise row.get_field(ANSWER_FIELDS[0]).make_error("no turns", fix=fix)
    return (filled or present)[0]


def _collect_turns(row: SourceRow, field: str) -> tuple[list[JsonValue], set[str]]:
    """Return (turns as lists of messages hold them, columns that were read).

    Args:
        field: one of `ANSWER_FIELDS`.

    Raises:
        DataError: a column is missing, of another type, or holds several answers.
    """
    if field == "completion":
        turns = _to_turns(row.get_field("prompt"), "user")
        return turns + _to_turns(row.get_field(field), "assistant"), {"prompt", field}
    if field != "response":
        return row.get_field(field).parse_items("turns"), {field}
    turns = []
    history = row.get_field("history")
    pairs = [] if is_empty(history.value) else history.parse_items("pairs of question and answer")
    for pair in pairs:
        if not isinstance(pair.value, list) or len(pair.value) != 2:
            fix = 'Write ["question", "answer"]'
            raise pair.make_error("not a pair of question and answer", fix=fix)
        for role, text in zip(("user", "assistant"), pair.value, strict=True):
            turns.append(_make_turn(role, JsonValue(text, pair.place, pair.root)))
    for key, role in (("query", "user"), (field, "assistant")):
        _check_text(row.get_field(key))
        turns.append(_make_turn(role, row.get_field(key)))
    return turns, {"query", field, "history"}


def _check_text(field: JsonValue) -> None:
    """Raise DataError if a value is no text; a list of texts would be several answers."""
    if isinstance(field.value, list) and all(isinstance(item, str) for item in field.value):
        fix = "Write one row per text"
        raise field.make_error(f"{len(field.value)} texts instead of one", fix=fix)
    field.parse_text()


def _to_turns(field: JsonValue, role: str) -> list[JsonValue]:
    """Return TRL's ``prompt`` or ``completion`` as turns: messages, or one text of `role`.

    Raises:
        DataError: the value is neither, or a list of texts.
    """
    if isinstance(field.value, list) and not all(isinstance(item, str) for item in field.value):
        return field.parse_items("turns")
    _check_text(field)
    return [_make_turn(role, field)]


def _make_turn(role: str, content: JsonValue) -> JsonValue:
    """Return the message of a role whose content stands elsewhere, at the place of the content."""
    return JsonValue({"role": role, "content": content.value}, content.place, content.root)


def _add_system_turn(
    row: SourceRow, turns: list[JsonValue]
) -> tuple[list[JsonValue], tuple[str, ...]]:
    """Return (turns that begin with the system prompt of a column, columns that were read).

    The turns are unchanged if no column of `SYSTEM_FIELDS` holds a value.

    Raises:
        DataError: several columns do, or a turn is by the system already; or the value is no text.
    """
    columns = tuple(key for key in SYSTEM_FIELDS if not is_empty(row.value.get(key)))
    if not columns:
        return turns, SYSTEM_FIELDS
    field = row.get_field(columns[0])
    values = [turn.value for turn in turns if isinstance(turn.value, dict)]
    speakers = [value.get("role", value.get("from")) for value in values]
    if len(columns) > 1 or "system" in speakers or "developer" in speakers:
        fix = "Keep one system prompt, or rename the column to keep it as metadata"
        raise field.make_error("several system prompts", fix=fix)
    field.parse_text()
    return [_make_turn("system", field), *turns], columns


def _parse_image_column(row: SourceRow) -> tuple[list[ImageRef], str]:
    """Return (images beside the turns, their column); without a column, ([], ``images``).

    The column is ``image`` or ``images``, else one of `find_image_columns`. One of `FILE_COLUMNS`
    counts only if it names image files: other files may be the source of a chat.

    Raises:
        DataError: an image is wrong, or several columns hold different images.
    """
    columns = [
        key
        for key, value in row.value.items()
        if not is_empty(value)
        and (normalize_column(key) not in FILE_COLUMNS or not _names_other_files(value))
    ]
    names = {normalize_column(key): key for key in columns}
    preferred = [names[name] for name in ("image", "images") if name in names]
    columns = preferred or find_image_columns(columns)
    if not columns:
        return [], "images"
    images = parse_images(row.get_field(columns[0]))
    for key in columns[1:]:
        if parse_images(row.get_field(key)) != images:
            message = f"different images in several columns: {', '.join(columns)}"
            fix = "Keep one of them, or rename the others to keep them as metadata"
            raise row.get_field(key).make_error(message, fix=fix)
    return images, columns[0]


def _names_other_files(value: Any) -> bool:
    """Return whether a value, or one of a list, is a number or a name of no image file."""
    items = value if isinstance(value, list) else [value]
    return any(
        isinstance(item, int | float) or (isinstance(item, str) and not _is_image_name(item))
        for item in items
    )


def _is_image_name(text: str) -> bool:
    """Return whether a text ends as the names of images do, those of unreadable ones included."""
    media_type, _ = mimetypes.guess_type(text)
    is_image = media_type is not None and media_type.startswith("image/")
    return is_image or PurePath(text).suffix.lower() in IMAGE_SUFFIXES


def _count_image_names(row: SourceRow, metadata: Mapping[str, Any]) -> None:
    """Count the columns of metadata that name images; they are perhaps the images of the chat."""
    for key, value in metadata.items():
        names = value if isinstance(value, list) else [value]
        if names and all(isinstance(name, str) and _is_image_name(name) for name in names):
            row.context.ignored.add("image column", key)


# --- detection


def is_llava_row(row: SourceRow) -> bool:
    """Return whether a row's value has LLaVA's ``conversations``."""
    return "conversations" in row.value


def is_messages_row(row: SourceRow) -> bool:
    """Return whether a row's value has the turns of OpenAI or TRL."""
    keys = row.value.keys()
    return "messages" in keys or {"prompt", "completion"} <= keys


def is_swift_row(row: SourceRow) -> bool:
    """Return whether a row's value has keys of ms-swift alone: a response, or candidates."""
    has_response = isinstance(row.value.get("query"), str) and "response" in row.value
    return has_response or bool(row.value.keys() & {"positive_messages", "negative_messages"})


def has_foreign_turns(row: SourceRow) -> bool:
    """Return whether a row's value has ``messages``, and a turn with a key that our records lack.

    A malformed turn has none.
    """
    turns = row.value.get("messages")
    turns = turns if isinstance(turns, list) else []
    return any(isinstance(turn, dict) and not turn.keys() <= OWN_TURN_KEYS for turn in turns)


# --- queries with candidates


def _parse_retrieval(row: SourceRow) -> Record:
    """Return the retrieval record of an embedding or reranker row of ms-swift.

    ``messages`` and the row's images are the query, of which answers are not read, but counted.
    Each item of ``positive_messages`` and ``negative_messages`` is a candidate: a list of messages
    with the images of the same item of ``positive_images`` and ``negative_images``. A candidate's
    messages are joined, whatever their roles.

    Raises:
        DataError: the query or the positives are missing or wrong, images and their places are not
            equally many, or ``label`` does not say that the positives are right.
    """
    label = row.value.get("label")
    if label not in (None, 1):
        fix = "Keep pairs of label 1, and write wrong candidates under negative_messages"
        raise row.get_field("label").make_error(f"label is {label!r:.40}", fix=fix)
    if is_empty(row.value.get("positive_messages")):
        fix = "Add a list of candidates, each a list of messages"
        raise row.get_field("positive_messages").make_error("no right candidate", fix=fix)
    items, system_columns = _add_system_turn(row, row.get_field("messages").parse_items("turns"))
    turns = parse_turns(row, items)
    prompts = [turn for turn in turns if turn.role != "assistant"]
    for _ in turns[len(prompts) :]:
        row.context.ignored.add("turn", "an assistant turn of a query")
    if not prompts:
        fix = "Write the query as a user turn"
        raise row.get_field("messages").make_error("no query", fix=fix)
    images, column = _parse_image_column(row)
    used = {"messages", "label", column, *system_columns, *RETRIEVAL_FIELDS}
    query = _join_messages(place_images(prompts, images, row.get_field(column)))
    return Record(
        parse_id(row),
        query=query,
        positive=_parse_candidates(row, "positive"),
        negative=_parse_candidates(row, "negative"),
        metadata=collect_metadata(row, used),
        place=row.place,
    )


def _parse_candidates(row: SourceRow, side: str) -> tuple[Parts, ...]:
    """Return the candidates of a side, ``positive`` or ``negative``; () if there are none.

    Raises:
        DataError: a candidate is no list of messages or is wrong, or there are lists of images
            for another number of candidates.
    """
    field = row.get_field(f"{side}_messages")
    image_field = row.get_field(f"{side}_images")
    items = [] if is_empty(field.value) else field.parse_items("candidates")
    if not all(isinstance(item.value, list) for item in items):
        raise field.make_error("not a list of lists of messages", fix="Write [[{...}], ...]")
    image_items = [JsonValue([], image_field.place, image_field.root)] * len(items)
    if isinstance(image_field.value, list) and image_field.value:
        image_items = image_field.parse_items("lists of images")
    if len(image_items) != len(items):
        message = f"images for {len(image_items)} of {len(items)} candidates"
        fix = "Write one list of images per candidate, [] for none"
        raise image_field.make_error(message, fix=fix)
    candidates = []
    for item, image_item in zip(items, image_items, strict=True):
        turns = parse_turns(row, item.parse_items("messages"))
        messages = place_images(turns, parse_images(image_item), image_item)
        candidates.append(_join_messages(messages))
    return tuple(candidates)


def _join_messages(messages: list[Message]) -> Parts:
    """Return the parts of all messages, in order."""
    parts: Parts = ()
    for message in messages:
        parts += message.parts
    return parts
