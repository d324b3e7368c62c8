"""Every key of a chat is read, refused by name, kept as metadata or counted, as documented."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlduet.data.readers import chat_keys
from vlduet.data.readers.conversations import parse_chat
from vlduet.data.readers.rows import IMAGE_COLUMNS, IgnoredData, ReadContext, SourceRow
from vlduet.data.record_json import SUPERVISION_KEYS, parse_record
from vlduet.data.records import Place, Record
from vlduet.errors import DataError

DOCUMENT = Path(__file__).parents[4] / "docs" / "data-format.md"


def parse_row(value: dict[str, Any]) -> tuple[Record, list[str]]:
    """Return (record of a chat row, sentences about what was not read)."""
    ignored = IgnoredData()
    row = SourceRow(Place("x", 1), ReadContext(Path(), ignored=ignored), "x:1", value)
    return parse_chat(row), ignored.messages()


def make_row(turn_keys: dict[str, Any], part_keys: dict[str, Any]) -> dict[str, Any]:
    """Return a row whose first answer has more keys in its turn and in its only content part."""
    part = {"type": "text", "text": "A horse.", **part_keys}
    return {
        "messages": [
            {"role": "user", "content": "What?"},
            {"role": "assistant", "content": [part], **turn_keys},
            {"role": "user", "content": "Look again."},
            {"role": "assistant", "content": "A dog."},
        ]
    }


PLAIN, _ = parse_row(make_row({}, {}))

SYNONYMS = ["Loss", "lossy", "loss_mask", "no_loss", "trainable", "is_trained", "weights", "masks"]
PEER_KEYS = [*chat_keys.REFUSED_ROW_KEYS, *chat_keys.REFUSED_PART_KEYS, *SYNONYMS]
keys = st.sampled_from([*SUPERVISION_KEYS, *PEER_KEYS, "name", "id"]) | st.text(
    "aeilmnorst_", min_size=1, max_size=9
)
values = st.sampled_from([False, True, 0, 1, 0.5, -1, "", "false", "x", [], ["x"], {"a": 0}])


@settings(max_examples=200, deadline=None)
@given(keys, values | st.text(max_size=3) | st.integers(), st.booleans())
def test_a_further_key_is_honoured_refused_by_name_or_counted(
    key: str, value: Any, in_part: bool
) -> None:
    if key in (*chat_keys.SPEAKER_FIELDS, *chat_keys.CONTENT_FIELDS, *chat_keys.PART_KEYS):
        return
    try:
        row = make_row({}, {key: value}) if in_part else make_row({key: value}, {})
        record, not_read = parse_row(row)
    except DataError as error:
        assert key in str(error).splitlines()[0] and error.fix
        return
    answers = [message for message in record.messages if message.role == "assistant"]
    assert [message.parts for message in record.messages] == [m.parts for m in PLAIN.messages]
    assert answers[1].supervised
    if key in SUPERVISION_KEYS and not in_part:
        assert value in (0, 1) and answers[0].supervised == bool(value)
    else:
        assert answers[0].supervised
        is_counted = any(f"`{key}`" in sentence for sentence in not_read)
        is_absent = chat_keys.is_empty(value) or (key == "name" and not in_part)
        assert is_counted or is_absent, f"{key} is dropped without a word"


@settings(max_examples=200, deadline=None)
@given(keys, values)
def test_a_further_column_is_metadata_or_refused_by_name(key: str, value: Any) -> None:
    if key in chat_keys.ROW_KEYS or key.lower() in IMAGE_COLUMNS:
        return
    row = make_row({}, {})
    try:
        record, _ = parse_row({**row, key: value})
    except DataError as error:
        assert key in str(error) and error.fix
        return
    assert record.messages == PLAIN.messages and record.metadata == {key: value}


@settings(max_examples=100, deadline=None)
@given(keys, values)
def test_a_further_key_of_our_turns_is_honoured_or_refused_by_name(key: str, value: Any) -> None:
    row = {"id": "a", **make_row({key: value}, {})}
    if key in chat_keys.TURN_KEYS and key not in SUPERVISION_KEYS:
        return
    try:
        record = parse_record(row, place=Place("x", 1), root=Path())
    except DataError as error:
        assert key in str(error) and error.fix
        return
    assert key in SUPERVISION_KEYS and record.messages[1].supervised == bool(value)


def test_supervision_that_contradicts_itself_is_refused() -> None:
    with pytest.raises(DataError, match="loss and weight contradict"):
        parse_row(make_row({"loss": True, "weight": 0}, {}))
    assert parse_row(make_row({"loss": False, "weight": 0}, {}))[0].messages[1].supervised is False


def test_a_learned_prompt_is_counted_as_not_read() -> None:
    row = make_row({}, {})
    row["messages"][0]["train"] = True
    row["messages"][2]["train"] = False
    record, not_read = parse_row(row)
    assert record.messages == PLAIN.messages
    assert not_read == [
        "1 chat turn with a key `loss (or weight, train) of a user turn` that is not read"
    ]


@pytest.mark.parametrize("label", ["label", "kto_tag"])
def test_answers_that_are_labelled_as_wrong_are_refused(label: str) -> None:
    with pytest.raises(DataError, match=f"{label} is false"):
        parse_row({**make_row({}, {}), label: False})
    assert parse_row({**make_row({}, {}), label: True})[0].metadata == {label: True}


# --- documentation


def read_key_table(title: str) -> dict[str, str]:
    """Return the first word of the second column by key of a table of docs/data-format.md."""
    text = DOCUMENT.read_text(encoding="utf-8")
    table = re.search(rf"^\| {title} \| \|\n\|---\|---\|\n((?:\|.*\n)+)", text, re.MULTILINE)
    assert table, title
    treatments = {}
    for line in table[1].splitlines():
        names, treatment = line.strip("|").split(" | ")
        if not names.strip().startswith("any other"):
            for name in re.findall("`([^`]+)`", names):
                assert name not in treatments, f"{name} is documented twice"
                treatments[name] = treatment.split()[0].strip(":;,")
    return treatments


def test_the_documentation_lists_every_key() -> None:
    read, refused = "read", "refused"
    assert read_key_table("key of a row") == {
        **dict.fromkeys([*chat_keys.ROW_KEYS, "image", "images", "captions"], read),
        **dict.fromkeys(chat_keys.REFUSED_ROW_KEYS, refused),
        **dict.fromkeys(chat_keys.PREFERENCE_LABELS, refused),
    }
    assert read_key_table("key of a turn") == {
        **dict.fromkeys(chat_keys.TURN_KEYS, read),
        **dict.fromkeys(chat_keys.REFUSED_TURN_KEYS, refused),
        chat_keys.NAME_KEY: "not",
    }
    assert read_key_table("key of a content part") == {
        **dict.fromkeys(chat_keys.PART_KEYS, read),
        **dict.fromkeys(chat_keys.REFUSED_PART_KEYS, refused),
    }
