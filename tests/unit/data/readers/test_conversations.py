"""Chats in the formats of LLaVA, OpenAI, TRL and ms-swift."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from helpers.record_files import (
    ANSWER,
    FOREIGN_ROWS,
    LLAVA,
    OPENAI,
    PNG_URL,
    SWIFT,
    SWIFT_QUERY,
    TRL,
    TRL_PROMPT,
    describe_messages,
    read_error,
    read_single,
    write_lines,
)
from vlduet.data.formats import detect_format, read_records
from vlduet.data.jsonl_output import stream_to_jsonl
from vlduet.data.readers.rows import IMAGE_COLUMNS, IgnoredData
from vlduet.data.record_json import SUPERVISION_KEYS
from vlduet.data.records import ImageRef, Message

CHAT = [("user", ["a.png", "What?"]), ("assistant", ["A cat."])]
OPENAI_CHAT = [
    ("system", ["Be brief."]),
    ("user", ["bytes", "What?"]),
    ("assistant", ["A cat."]),
]
OWN_CHAT = {
    "id": "1",
    "messages": [{"role": "user", "content": [{"image": "a.png"}, {"text": "What?"}]}, ANSWER],
}
CHAT_WITH_HISTORY = [("user", ["Hi"]), ("assistant", ["Hello"]), *CHAT]


@pytest.mark.parametrize(
    ("row", "format", "expected"),
    [
        (LLAVA, "llava", CHAT),
        (OPENAI, "messages", OPENAI_CHAT),
        (TRL, "messages", CHAT),
        (TRL_PROMPT, "messages", CHAT),
        (SWIFT, "messages", CHAT),
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


def make_chat(question: Any, answer: Any = "A cat.") -> dict[str, Any]:
    """Return a row of one question and one answer, each a text or a list of content parts."""
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns}


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


IMAGE_PART = {"type": "image", "image": "a.png"}
PLACEHOLDER = {"type": "image"}
TAGGED = "![figure](<image>)"
TAGGED_PART = {"type": "text", "text": TAGGED}


@pytest.mark.parametrize(
    ("question", "answer", "images", "expected"),
    [
        ("<image>What?", TAGGED, ["a.png"], [["a.png", "What?"], [TAGGED]]),
        ("What?", TAGGED, [], [["What?"], [TAGGED]]),
        ([PLACEHOLDER, TAGGED_PART], TAGGED, ["a.png"], [["a.png", TAGGED], [TAGGED]]),
        ([IMAGE_PART, TAGGED_PART], TAGGED, [], [["a.png", TAGGED], [TAGGED]]),
        ([IMAGE_PART], "Yes.", ["a.png"], [["a.png"], ["Yes."]]),
        ([TAGGED_PART], "Yes.", [], [[TAGGED], ["Yes."]]),
        ([TAGGED_PART], "Yes.", ["a.png"], [["![figure](", "a.png", ")"], ["Yes."]]),
        ("<image>Edit", "<image>", ["a.png", "b.png"], [["a.png", "Edit"], ["b.png"]]),
    ],
)
def test_tags_are_places_or_texts_by_structure_and_number(
    question: Any, answer: str, images: list[str], expected: list[Any], tmp_path: Path
) -> None:
    row = {**make_chat(question, answer), "images": images}
    record = read_single(write_lines(tmp_path / "x.jsonl", row))
    assert [parts for _, parts in describe_messages(record)] == expected


@pytest.mark.parametrize("row", [OWN_CHAT, LLAVA, OPENAI, TRL, SWIFT, SWIFT_QUERY])
def test_tags_in_answers_do_not_change_how_a_row_is_read(
    row: dict[str, Any], tmp_path: Path
) -> None:
    tagged_row = json.loads(json.dumps(row).replace("A cat.", f"A cat. {TAGGED}"))
    record = read_single(write_lines(tmp_path / "x.jsonl", row))
    tagged_record = read_single(write_lines(tmp_path / "x.jsonl", tagged_row))
    assert tagged_record.images() == record.images() and len(record.images()) == 1
    assert tagged_record.messages[:-1] == record.messages[:-1]
    assert tagged_record.messages[-1].parts == (f"A cat. {TAGGED}",)


@pytest.mark.parametrize("column", [*IMAGE_COLUMNS, "File Name", "Image-Path"])
@pytest.mark.parametrize("row", [make_chat("What?"), LLAVA], ids=["messages", "llava"])
def test_images_of_any_image_column_are_read(
    row: dict[str, Any], column: str, tmp_path: Path
) -> None:
    turns = {key: value for key, value in row.items() if key not in ("id", "image")}
    for image in ("a.png", {"bytes": PNG_URL.partition(",")[2], "path": None}):
        record = read_single(write_lines(tmp_path / "x.jsonl", {**turns, column: image}))
        (parts,) = [message.parts for message in record.messages if message.role == "user"]
        assert isinstance(parts[0], ImageRef) and parts[1] == "What?" and not record.metadata


def test_files_that_are_no_images_are_metadata(tmp_path: Path) -> None:
    files = {"path": "src/a.py", "File Name": ["a.png", "b.txt"], "file": 3}
    row = {**make_chat("What?"), **files}
    record = read_single(write_lines(tmp_path / "x.jsonl", row))
    assert record.images() == () and record.metadata == files


@pytest.mark.parametrize("value", ["a.png", ["a.jpeg", "b.tif"], "file:///a.svg"])
def test_names_of_images_under_other_names_are_counted(value: Any, tmp_path: Path) -> None:
    row = {**make_chat("What?"), "media": value, "source": "a.txt", "pages": []}
    for chat, num_sentences in ((row, 1), ({**row, "image": "a.png"}, 0)):
        ignored = IgnoredData()
        (record,) = read_records(write_lines(tmp_path / "x.jsonl", chat), ignored=ignored)
        assert record.metadata["media"] == value
        assert len(ignored.messages()) == num_sentences
        assert all("columns: image=media" in sentence for sentence in ignored.messages())


def test_the_columns_of_messages_and_image_can_be_named(tmp_path: Path) -> None:
    row = {"dialogue": make_chat("What?")["messages"], "screen": "a.png", "uid": "7"}
    source = write_lines(tmp_path / "x.jsonl", row)
    columns = {"messages": "dialogue", "image": "screen", "id": "uid"}
    (record,) = read_records(source, columns=columns)
    assert describe_messages(record) == CHAT and record.id == "7" and record.metadata == {}


def test_turns_with_keys_that_are_not_ours_are_read_as_messages(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "What?", "name": "Ann"}, {**ANSWER, "date": "today"}]
    ignored = IgnoredData()
    source = write_lines(tmp_path / "x.jsonl", OWN_CHAT, {"id": "2", "messages": turns})
    records = list(read_records(source, ignored=ignored))
    assert [record.id for record in records] == ["1", "2"]
    assert ignored.messages() == ["1 chat turn with a key `date` that is not read"]
    assert "unknown key 'name'" in str(read_error(source, format="records"))


def test_a_system_column_becomes_the_first_turn(tmp_path: Path) -> None:
    for row in (LLAVA, TRL, TRL_PROMPT, SWIFT_QUERY):
        for key in ("system", "system_prompt"):
            source = write_lines(tmp_path / "x.jsonl", {**row, key: "Be brief."})
            record = read_single(source)
            assert record.messages[0] == Message("system", ("Be brief.",))
            assert record.messages[1:] == read_single(write_lines(source, row)).messages


# --- null fields


def add_nulls(value: Any) -> Any:
    """Return a copy of a JSON value, whose objects have null under every key that a peer uses."""
    if isinstance(value, list):
        return [add_nulls(item) for item in value]
    if not isinstance(value, dict):
        return value
    nulls = dict.fromkeys(["text", "image", "content", "tool_calls", "loss", "objects", "system"])
    return {**nulls, "images": {"bytes": None}, **{k: add_nulls(v) for k, v in value.items()}}


@pytest.mark.parametrize("row", [OWN_CHAT, *FOREIGN_ROWS])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_null_means_absent_in_every_container(
    row: dict[str, Any], suffix: str, tmp_path: Path
) -> None:
    if suffix == ".parquet" and row in (OPENAI, OWN_CHAT):
        pytest.skip("a column of both strings and lists is no table")
    source = tmp_path / f"x{suffix}"
    records = []
    for value in (row, add_nulls(row)):
        if suffix == ".parquet":
            pa.parquet.write_table(pa.Table.from_pylist([value]), source)
        else:
            source.write_text(json.dumps(value if suffix == ".jsonl" else [value]))
        records.append(read_single(source))
    assert records[0] == records[1] and records[0].metadata == {}


# --- supervision


@pytest.mark.parametrize("key", SUPERVISION_KEYS)
@pytest.mark.parametrize("off", [False, 0, 0.0])
@pytest.mark.parametrize(
    ("field", "turns"),
    [
        ("conversations", [("from", "human"), ("from", "gpt"), ("from", "gpt")]),
        ("messages", [("role", "user"), ("role", "assistant"), ("role", "assistant")]),
        ("completion", [("role", "user"), ("role", "assistant"), ("role", "assistant")]),
    ],
)
def test_turns_that_are_not_to_be_learned_are_context(
    key: str, off: Any, field: str, turns: list[tuple[str, str]], tmp_path: Path
) -> None:
    content = "value" if field == "conversations" else "content"
    items: list[dict[str, Any]] = [{name: role, content: "x"} for name, role in turns]
    items[0][key] = None
    items[1][key] = off
    row: dict[str, Any] = {field: items, "prompt": "x"}
    record = read_single(write_lines(tmp_path / "x.jsonl", row))
    assert [turn.supervised for turn in record.messages][-3:] == [True, False, True]
    target = tmp_path / "y.jsonl"
    assert list(stream_to_jsonl([record], target)) == [record]
    assert read_single(target).messages == record.messages, "convert keeps it"
    items[2][key] = off
    error = read_error(write_lines(tmp_path / "x.jsonl", row))
    assert "nothing to learn" in str(error) and str(error.place).endswith(field)


# --- queries with candidates

QUERY = {"messages": [{"role": "user", "content": "<image>Which?"}], "images": ["a.png"]}
RIGHT = [{"role": "assistant", "content": "a circle"}]
WRONG = [{"role": "user", "content": "a square <image>"}]


def test_candidates_of_messages_are_read_with_their_images(tmp_path: Path) -> None:
    row = {
        **QUERY,
        "system": "Find it.",
        "positive_messages": [RIGHT, RIGHT],
        "negative_messages": [RIGHT, WRONG],
        "negative_images": [[], "b.png"],
        "label": 1.0,
        "source": "s",
    }
    source = write_lines(tmp_path / "x.jsonl", row)
    record = read_single(source)
    image, wrong_image = (ImageRef(path=tmp_path / name) for name in ("a.png", "b.png"))
    assert record.query == ("Find it.", image, "Which?")
    assert record.positive == (("a circle",), ("a circle",))
    assert record.negative == (("a circle",), ("a square", wrong_image))
    assert record.metadata == {"source": "s"}


def test_an_answer_of_a_query_is_counted_as_not_read(tmp_path: Path) -> None:
    row = {"messages": [*QUERY["messages"], ANSWER], "images": ["a.png"]}
    row["positive_messages"] = [RIGHT]
    ignored = IgnoredData()
    (record,) = read_records(write_lines(tmp_path / "x.jsonl", row), ignored=ignored)
    assert record.query[1:] == ("Which?",)
    assert ignored.messages() == ["1 chat turn not read: an assistant turn of a query"]


# --- errors

LLAVA_WITHOUT_IMAGE = {key: value for key, value in LLAVA.items() if key != "image"}
LLAVA_QUESTION_ONLY = {**LLAVA, "conversations": LLAVA["conversations"][:1]}
UNKNOWN_SPEAKER = {**LLAVA, "conversations": [{"from": "cat", "value": "x"}]}
UNKNOWN_ROLE = {"messages": [{"role": "usr", "content": "x"}]}
TOOL = {"role": "tool", "content": "x"}
WRONG_IMAGES = {"positive_messages": [RIGHT], "positive_images": [["a.png"], []]}
TEXT_AND_IMAGE = [{"type": "text", "text": "x", "image": "a.png"}]
TWO_CONTENTS = {"conversations": [{"from": "human", "value": "x", "content": "y"}]}
UNKNOWN_PART = {"messages": [{"role": "user", "content": [{"type": "audio"}]}]}


@pytest.mark.parametrize(
    ("row", "field", "message"),
    [
        ({**LLAVA, "image": ["a.png", "b.png"]}, "image", "2 images, but places for 1"),
        (LLAVA_WITHOUT_IMAGE, "conversations[0].value", "more places for images"),
        (UNKNOWN_SPEAKER, "conversations[0].from", "'cat'"),
        (LLAVA_QUESTION_ONLY, "conversations", "no assistant turn"),
        ({**LLAVA, "conversations": {}}, "conversations", "expected a list of turns"),
        ({**LLAVA, "video": "a.mp4"}, "video", "not supported"),
        ({**TRL, "images": []}, "messages[0].content[0]", "more places for images"),
        ({**TRL, "images": ["a.png", "b.png"]}, "images", "2 images, but places for 1"),
        ({**TRL, "images": ["http://x/a.png"]}, "images[0]", "is a URL"),
        (UNKNOWN_ROLE, "messages[0].role", "Did you mean 'user'?"),
        (UNKNOWN_PART, "messages[0].content[0].type", "a content part of type 'audio'"),
        ({**SWIFT, "images": []}, "messages[0].content", "more places for images"),
        ({**SWIFT_QUERY, "history": [["Hi"]]}, "history[0]", "not a pair"),
        ({**SWIFT_QUERY, "response": ""}, "response", "expected text"),
        ({**SWIFT_QUERY, "response": ["A cat.", "A dog."]}, "response", "2 texts instead of one"),
        ({**TRL_PROMPT, "completion": ["A cat."]}, "completion", "1 texts instead of one"),
        ({**SWIFT, "response": "A dog."}, "response", "answers in several columns: messages, resp"),
        ({"messages": [*SWIFT["messages"], TOOL]}, "messages[2].role", "Turns of tools"),
        ({**OPENAI, "system": "Be long."}, "system", "several system prompts"),
        ({**LLAVA, "images": ["b.png"]}, "images", "different images in several columns"),
        ({**make_chat("What?"), "img": "a.png", "photo": "b.png"}, "photo", "different images"),
        ({**make_chat("What?"), "image_url": "http://x/a.png"}, "image_url", "is a URL"),
        ({**QUERY, "positive_messages": [RIGHT], "label": 0.8}, "label", "label is 0.8"),
        ({**QUERY, "negative_messages": [RIGHT]}, "positive_messages", "no right candidate"),
        ({**QUERY, "positive_messages": RIGHT}, "positive_messages", "list of lists of messages"),
        ({**QUERY, **WRONG_IMAGES}, "positive_images", "images for 2 of 1 candidates"),
        ({**QUERY, "positive_messages": [WRONG]}, "positive_messages[0][0].content", "more places"),
        ({"messages": RIGHT, "positive_messages": [RIGHT]}, "messages", "no query"),
        (make_chat("Where?", "<bbox>"), "messages[1].content", "<bbox>"),
        (TWO_CONTENTS, "conversations[0].value", "both content and value"),
        (make_chat(TEXT_AND_IMAGE), "messages[0].content[0]", "text and image in one content part"),
        (
            {**make_chat([{"type": "image", "image": "a.png"}]), "images": ["b.png"]},
            "images",
            "others in the content parts",
        ),
        ({**make_chat("x", "<image>"), "images": ["a.png"]}, "images", "in answers only"),
    ],
)
def test_errors_name_file_line_and_field(
    row: dict[str, Any], field: str, message: str, tmp_path: Path
) -> None:
    source = write_lines(tmp_path / "x.jsonl", "", row)
    error = read_error(source)
    assert error.place == f"{source}:2:{field}" and message in str(error)
