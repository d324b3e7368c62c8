"""Chats in the formats of LLaVA, OpenAI, TRL and ms-swift."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from helpers.record_files import (
    LLAVA,
    OPENAI,
    SWIFT,
    SWIFT_QUERY,
    TRL,
    TRL_PROMPT,
    describe_messages,
    read_error,
    read_single,
    write_lines,
)
from vlduet.data.formats import detect_format

CHAT = [("user", ["a.png", "What?"]), ("assistant", ["A cat."])]
OPENAI_CHAT = [
    ("system", ["Be brief."]),
    ("user", ["bytes", "What?"]),
    ("assistant", ["A cat."]),
]
CHAT_WITH_HISTORY = [("user", ["Hi"]), ("assistant", ["Hello"]), *CHAT]


@pytest.mark.parametrize(
    ("row", "format", "expected"),
    [
        (LLAVA, "llava", CHAT),
        (OPENAI, "messages", OPENAI_CHAT),
        (TRL, "messages", CHAT),
        (TRL_PROMPT, "messages", CHAT),
        (SWIFT, "ms-swift", CHAT),
        (SWIFT_QUERY, "ms-swift", CHAT_WITH_HISTORY),
    ],
    ids=["llava", "openai", "trl", "trl prompt", "ms-swift", "ms-swift query"],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_chats_are_detected_and_parsed(
    row: dict[str, Any], format: str, expected: list[Any], suffix: str, tmp_path: Path
) -> None:
    if suffix == ".parquet" and row is OPENAI:
        pytest.skip("a column of both strings and lists is no table")
    source = tmp_path / f"x{suffix}"
    if suffix == ".parquet":
        pa.parquet.write_table(pa.Table.from_pylist([row]), source)
    else:
        source.write_text(json.dumps(row if suffix == ".jsonl" else [row]))
    assert detect_format(source) == format
    record = read_single(source)
    assert describe_messages(record) == expected and record.kind == "chat"
    assert record.id == row.get("id", f"x{suffix}:1")
    for ref in record.images():
        assert ref.path is None or ref.path == tmp_path / ref.path.name


def test_llava_images_replace_their_tags_in_order(tmp_path: Path) -> None:
    turns = [
        {"from": "human", "value": "<image> and <image>?"},
        {"from": "gpt", "value": "Two."},
    ]
    row = {**LLAVA, "image": ["a.png", "b.png"], "conversations": turns}
    record = read_single(write_lines(tmp_path / "x.jsonl", row))
    assert describe_messages(record)[0] == ("user", ["a.png", "and", "b.png", "?"])


def test_images_without_places_precede_the_first_user_turn(tmp_path: Path) -> None:
    row = {
        "images": ["a.png", "b.png"],
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Which one?"},
            {"role": "assistant", "content": "The first."},
            {"role": "user", "content": "Why?"},
        ],
    }
    record = read_single(write_lines(tmp_path / "x.jsonl", row))
    assert [parts for _, parts in describe_messages(record)] == [
        ["Be brief."],
        ["a.png", "b.png", "Which one?"],
        ["The first."],
        ["Why?"],
    ]


LLAVA_WITHOUT_IMAGE = {key: value for key, value in LLAVA.items() if key != "image"}
LLAVA_QUESTION_ONLY = {**LLAVA, "conversations": LLAVA["conversations"][:1]}
UNKNOWN_SPEAKER = {**LLAVA, "conversations": [{"from": "cat", "value": "x"}]}
UNKNOWN_ROLE = {"messages": [{"role": "usr", "content": "x"}]}
UNKNOWN_PART = {"messages": [{"role": "user", "content": [{"type": "audio"}]}]}


@pytest.mark.parametrize(
    ("row", "field", "message"),
    [
        ({**LLAVA, "image": ["a.png", "b.png"]}, "image", "2 images, but 1 <image>"),
        (LLAVA_WITHOUT_IMAGE, "conversations[0].value", "more than there are images"),
        (UNKNOWN_SPEAKER, "conversations[0].from", "'cat'"),
        (LLAVA_QUESTION_ONLY, "conversations", "no assistant turn"),
        ({**LLAVA, "conversations": {}}, "conversations", "expected a list of turns"),
        ({**LLAVA, "video": "a.mp4"}, "video", "not supported"),
        ({**TRL, "images": []}, "messages[0].content[0]", "no image left"),
        ({**TRL, "images": ["a.png", "b.png"]}, "images", "2 images, but places for 1"),
        ({**TRL, "images": ["http://x/a.png"]}, "images[0]", "is a URL"),
        (UNKNOWN_ROLE, "messages[0].role", "Did you mean 'user'?"),
        (UNKNOWN_PART, "messages[0].content[0].type", "a content part of type 'audio'"),
        ({**SWIFT, "images": []}, "messages[0].content", "more than there are images"),
        ({**SWIFT_QUERY, "history": [["Hi"]]}, "history[0]", "not a pair"),
        ({**SWIFT_QUERY, "response": ""}, "response", "expected text"),
    ],
)
def test_errors_name_file_line_and_field(
    row: dict[str, Any], field: str, message: str, tmp_path: Path
) -> None:
    source = write_lines(tmp_path / "x.jsonl", "", row)
    error = read_error(source)
    assert error.place == f"{source}:2:{field}" and message in str(error)
