"""Keys of chats in the formats of others: those that are read, and those that are refused.

A key that changes what is learned is read, or refused by its name. Other columns of a row become
metadata; other keys of a turn or of a content part are counted as not read.
"""

from __future__ import annotations

import difflib
import re
from functools import lru_cache
from typing import Any

from vlduet.data.readers.rows import SourceRow
from vlduet.data.record_json import SUPERVISION_KEYS, JsonValue

ANSWER_FIELDS = ("messages", "conversations", "completion", "response")
"""Columns that hold the answers of a chat, in the forms of OpenAI, LLaVA, TRL and ms-swift."""
SYSTEM_FIELDS = ("system", "system_prompt")
"""Columns of the system prompt."""
RETRIEVAL_FIELDS = (
    "positive_messages",
    "positive_images",
    "negative_messages",
    "negative_images",
)
"""Columns of ms-swift that make a row a query with candidates."""
ROW_KEYS = (
    *("id", "metadata"),
    *ANSWER_FIELDS,
    *("prompt", "query", "history"),
    *SYSTEM_FIELDS,
    *RETRIEVAL_FIELDS,
)
"""Columns of a chat that are read, besides `IMAGE_COLUMNS`."""
PREFERENCE_LABELS = ("label", "kto_tag")
"""Columns that are refused if they are false, which marks an answer as a wrong one."""

_KEEP_COLUMN = "or rename the column to keep it as metadata"
_NO_TOOLS = "Tools are not trained: leave the row out, or write calls and results as texts of turns"
_NO_VIDEO = "Leave the row out, or use frames as images"
_SINGLE_ANSWER = f"Write one row per answer to learn, without the others, {_KEEP_COLUMN}"
_NO_BOXES = "Write boxes and references into the texts as the model spells them, without `objects`"
_NO_REASONING = "Write it into content, if it is to be learned, or remove the key"
_NO_SETTINGS = f"Write the texts as they are to be learned, {_KEEP_COLUMN}"
_MASKS = 'Write "loss": true or false in the turn as a whole'
_MEDIA_KEYS = (
    *("video", "videos", "video_path", "audio", "audios", "audio_path"),
    *("positive_videos", "negative_videos", "positive_audios", "negative_audios"),
)

REFUSED_ROW_KEYS: dict[str, str] = {
    **dict.fromkeys(_MEDIA_KEYS, _NO_VIDEO),
    **dict.fromkeys(("objects", "bbox"), f"{_NO_BOXES}, {_KEEP_COLUMN}"),
    **dict.fromkeys(("tools", "functions"), f"{_NO_TOOLS}, {_KEEP_COLUMN}"),
    **dict.fromkeys(("chosen", "rejected", "preferred_output"), _SINGLE_ANSWER),
    **dict.fromkeys(("rejected_response", "rejected_messages", "rejected_images"), _SINGLE_ANSWER),
    **dict.fromkeys(("non_preferred_output", "completions", "choices"), _SINGLE_ANSWER),
    **dict.fromkeys(("responses", "answers", "solution"), _SINGLE_ANSWER),
    **dict.fromkeys(("reasoning_content", "channel", "chat_template_kwargs"), _NO_SETTINGS),
    **dict.fromkeys(("loss", "loss_scale", "sample_weight"), f"{_MASKS}, {_KEEP_COLUMN}"),
}
"""Remedy by column of a chat that is refused unless it is empty."""

ROLE_BY_SPEAKER = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
}
"""Role of a `Message` by the role or speaker of a turn."""
REFUSED_ROLES = (
    *("tool", "function", "observation", "ipython"),
    *("tool_call", "tool_response", "function_call", "function_response"),
)
"""Roles of turns that belong to tools."""
SPEAKER_FIELDS = ("role", "from")
"""Keys of a turn's role: OpenAI's and LLaVA's."""
CONTENT_FIELDS = ("content", "value")
"""Keys of a turn's content: OpenAI's and LLaVA's."""
TURN_KEYS = (*SPEAKER_FIELDS, *CONTENT_FIELDS, *SUPERVISION_KEYS)
"""Keys of a turn that are read."""
NAME_KEY = "name"
"""Key of a turn that is left out without being counted: the name of a participant."""
REFUSED_TURN_KEYS: dict[str, str] = {
    **dict.fromkeys(("tool_calls", "tool_call_id", "function_call", "tools"), _NO_TOOLS),
    **dict.fromkeys(("reasoning_content", "reasoning", "thinking"), _NO_REASONING),
    **dict.fromkeys(("channel", "refusal"), _NO_REASONING),
    **dict.fromkeys(("audio", "audios", "video", "videos"), _NO_VIDEO),
    **dict.fromkeys(("image", "images"), "Write images as parts of content: {'image': ...}"),
    **dict.fromkeys(("objects", "bbox"), _NO_BOXES),
    **dict.fromkeys(("rejected", "chosen", "rejected_response", "choices"), _SINGLE_ANSWER),
    **dict.fromkeys(("train_detail", "training", "mask", "masked", "ignore"), _MASKS),
}
"""Remedy by key of a turn that is refused unless it is empty."""
SUPERVISION_PATTERN = re.compile("loss|train|weight|mask|supervis", re.IGNORECASE)
"""Beginning or part of other keys of a turn that are refused: they may say what is learned."""

IMAGE_FIELDS = ("image_url", "image", "url", "path", "base64")
"""Keys of a content part that hold the image."""
PART_KEYS = ("type", "text", *IMAGE_FIELDS)
"""Keys of a content part that are read."""
REFUSED_PART_KEYS: dict[str, str] = {
    **dict.fromkeys(SUPERVISION_KEYS, _MASKS),
    **{key: fix for key, fix in REFUSED_TURN_KEYS.items() if key not in PART_KEYS},
}
"""Remedy by key of a content part that is refused unless it is empty."""

REFUSED_TAGS: dict[str, str] = {
    **dict.fromkeys(("<bbox>", "<ref-object>"), _NO_BOXES),
    **dict.fromkeys(("<video>", "<audio>"), _NO_VIDEO),
}
"""Remedy by tag that stands for no image; refused in the texts that are no content parts."""


def is_empty(value: Any) -> bool:
    """Return whether a value holds nothing: None, a blank text, or JSON's ``[]``, ``{}``, ``null``.

    Lists and objects are empty if all their values are; false and 0 are values.
    """
    if isinstance(value, str):
        return value.strip() in ("", "[]", "{}", "null")
    if isinstance(value, dict):
        return all(is_empty(item) for item in value.values())
    if isinstance(value, list):
        return all(is_empty(item) for item in value)
    return value is None


def refuse_row_keys(row: SourceRow) -> None:
    """Raise DataError if a column of `REFUSED_ROW_KEYS` holds a value, or a label says "wrong"."""
    _refuse_keys(JsonValue(row.value, row.place, row.root), REFUSED_ROW_KEYS)
    for key in PREFERENCE_LABELS:
        if row.value.get(key) is False:
            message = f"{key} is false: the answer is a wrong one"
            raise row.get_field(key).make_error(message, fix="Leave the row out")


def check_turn_keys(row: SourceRow, turn: JsonValue) -> None:
    """Check the keys of a turn; those that are not read are counted in the context of `row`.

    Raises:
        DataError: a key of `REFUSED_TURN_KEYS` holds a value; or an unknown key is similar to a
            known one or matches `SUPERVISION_PATTERN`, so that a meaning may be lost.
    """
    _refuse_keys(turn, REFUSED_TURN_KEYS)
    for key in sorted(turn.value.keys() - {*TURN_KEYS, *REFUSED_TURN_KEYS, NAME_KEY}):
        message = f"unknown key '{key}' in a turn"
        similar_key = _find_similar_key(key)
        if similar_key is not None:
            fix = f"Did you mean '{similar_key}'?"
            raise turn.get_field(key).make_error(message, fix=fix)
        if SUPERVISION_PATTERN.search(key) and not is_empty(turn.value[key]):
            raise turn.get_field(key).make_error(message, fix=_MASKS)
        row.context.ignored.add("turn key", key)


@lru_cache(maxsize=1024)  # the turns of a source have the same keys
def _find_similar_key(key: str) -> str | None:
    """Return the key of a turn that `key` is perhaps a misspelling of; None without one."""
    matches = difflib.get_close_matches(key, (*TURN_KEYS, *REFUSED_TURN_KEYS), n=1, cutoff=0.8)
    return matches[0] if matches else None


def check_part_keys(row: SourceRow, part: JsonValue) -> None:
    """Check the keys of a content part; those that are not read are counted as for a turn.

    Raises:
        DataError: a key of `REFUSED_PART_KEYS` holds a value.
    """
    _refuse_keys(part, REFUSED_PART_KEYS)
    for key in part.value.keys() - {*PART_KEYS, *REFUSED_PART_KEYS}:
        row.context.ignored.add("part key", key)


def _refuse_keys(value: JsonValue, remedies: dict[str, str]) -> None:
    """Raise DataError with the remedy of the first key of `remedies` that holds a value."""
    for key, item in value.value.items():
        if key in remedies and not is_empty(item):
            raise value.get_field(key).make_error(f"{key} is not supported", fix=remedies[key])
