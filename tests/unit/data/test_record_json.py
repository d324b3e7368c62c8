"""Records survive JSON; wrong values are named with file, line, field and remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlduet.data.formats import read_jsonl
from vlduet.data.record_json import parse_record, record_to_json
from vlduet.data.records import ROLES, ImageRef, Message, Place, Record, split_sentences
from vlduet.errors import DataError

ROOT = Path("/data")
PLACE = Place("x.jsonl", 4)

# --- round trip

utf8_text = st.text(st.characters(codec="utf-8"), min_size=1, max_size=30)
texts = utf8_text.filter(str.strip)
file_names = st.text("abcXYZ09_-é ", min_size=1, max_size=8).map(lambda name: name.strip() + ".png")
inline_images = st.binary(max_size=20).map(lambda data: ImageRef(data=data))
image_files = file_names.map(lambda name: ImageRef(path=ROOT / name))
image_refs = inline_images | image_files
parts = st.lists(texts | image_refs, min_size=1, max_size=3).map(tuple)
ids = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8)
json_scalars = st.integers() | texts | st.booleans() | st.none()
metadata = st.dictionaries(texts, json_scalars, max_size=2)
candidates = st.lists(parts, max_size=2).map(tuple)

pairs = st.builds(
    Record,
    ids,
    image=image_refs,
    short=st.lists(texts, max_size=3).map(tuple),
    long=st.none() | texts,
    negative=candidates,
    metadata=metadata,
)
sentences = texts.flatmap(lambda text: st.sampled_from(split_sentences(text)))
slices = st.lists(sentences | image_refs, min_size=1, max_size=3).map(tuple)
interleaved_records = st.builds(Record, ids, parts=slices, metadata=metadata)
turns = st.builds(Message, st.sampled_from(ROLES), parts, st.booleans())
chats = st.builds(
    lambda name, turns, answer: Record(name, messages=(*turns, Message("assistant", answer))),
    ids,
    st.lists(turns, max_size=2),
    parts,
)
retrieval_records = st.builds(
    Record,
    ids,
    query=parts,
    positive=st.lists(parts, min_size=1, max_size=2).map(tuple),
    negative=candidates,
)


@settings(max_examples=100, deadline=None)
@given(pairs | interleaved_records | chats | retrieval_records)
def test_records_survive_a_json_round_trip(record: Record) -> None:
    line = json.dumps(record_to_json(record, root=ROOT))
    assert parse_record(json.loads(line), place=PLACE, root=ROOT) == record


# --- valid values

PARTS = [{"text": "x"}, {"image": "a.png"}]
CHAT = [{"role": "user", "content": PARTS}, {"role": "assistant", "content": "y"}]


@pytest.mark.parametrize(
    ("kind", "row", "num_images"),
    [
        ("pair", {"image": "a.png", "short": ["x", "y"], "negative": [PARTS]}, 2),
        ("interleaved", {"parts": PARTS}, 1),
        ("chat", {"messages": CHAT}, 1),
        ("retrieval", {"query": PARTS, "positive": [PARTS], "negative": [PARTS]}, 3),
    ],
)
def test_the_keys_decide_the_kind(kind: str, row: dict[str, Any], num_images: int) -> None:
    record = parse_record({"id": 7, **row}, place=PLACE, root=ROOT)
    assert (record.kind, record.id, record.place) == (kind, "7", PLACE)
    assert record.images() == (ImageRef(path=ROOT / "a.png"),) * num_images


@pytest.mark.parametrize(
    "image",
    ["data:image/png;base64,YWI=", "data:,ab", {"bytes": "YWI=", "path": "a.png"}, b"ab"],
)
def test_inline_images_are_decoded(image: Any) -> None:
    record = parse_record({"id": "a", "image": image}, place=PLACE, root=ROOT)
    assert record.image == ImageRef(data=b"ab")


ABSOLUTE = ImageRef(path=Path("/b/a image.png"))


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        ("file:///b/a%20image.png", ABSOLUTE),
        ("FILE://LOCALHOST/b/a image.png", ABSOLUTE),
        ("file:/b/a%20image.png", ABSOLUTE),
        ({"path": "file:///b/a%20image.png"}, ABSOLUTE),
        ("file:///b/%C3%A9%231.png?", ImageRef(path=Path("/b/é#1.png?"))),
        ("file:b/100%.png", ImageRef(path=ROOT / "b/100%.png")),
        ("b%20c.png", ImageRef(path=ROOT / "b%20c.png")),
        ("b\\c.png", ImageRef(path=ROOT / "b/c.png")),
    ],
)
def test_file_urls_are_paths(image: Any, expected: ImageRef) -> None:
    record = parse_record({"id": "a", "image": image}, place=PLACE, root=ROOT)
    assert record.image == expected
    part = {"type": "image_url", "image_url": {"url": image}}
    assert parse_record({"id": "a", "parts": [part]}, place=PLACE, root=ROOT).parts == (expected,)


@settings(max_examples=50, deadline=None)
@given(file_names)
def test_the_file_url_of_a_path_is_the_path(name: str) -> None:
    for value in ((ROOT / name).as_uri(), str(ROOT / name), name):
        record = parse_record({"id": "a", "image": value}, place=PLACE, root=ROOT)
        assert record.image == ImageRef(path=ROOT / name)


def test_an_existing_file_keeps_its_backslash(tmp_path: Path) -> None:
    (tmp_path / "b\\c.png").write_bytes(b"")
    record = parse_record({"id": "a", "image": "b\\c.png"}, place=PLACE, root=tmp_path)
    assert record.image == ImageRef(path=tmp_path / "b\\c.png")


@pytest.mark.parametrize("name", ["data:a.png", "File:a.png"])
def test_names_that_look_like_urls_survive_a_round_trip(name: str) -> None:
    record = Record("a", image=ImageRef(path=ROOT / name))
    raw = record_to_json(record, root=ROOT)
    assert parse_record(raw, place=PLACE, root=ROOT) == record


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": "x"}, {"role": "assistant", "content": "<image>"}],
        [
            {"role": "user", "content": [{"image": "a.png"}]},
            {"role": "assistant", "content": "y", "weight": 0},
            {"role": "user", "content": "<image>"},
            {"role": "assistant", "content": "y"},
        ],
        [
            {"role": "user", "content": [{"text": "<image>"}]},
            {"role": "assistant", "content": "y"},
        ],
    ],
)
def test_an_image_tag_is_text(messages: list[dict[str, Any]]) -> None:
    record = parse_record({"id": "a", "messages": messages}, place=PLACE, root=ROOT)
    assert sum("<image>" in message.parts for message in record.messages) == 1


def test_openai_image_parts_are_images() -> None:
    part = {"type": "image_url", "image_url": {"url": "data:,ab"}}
    record = parse_record({"id": "a", "parts": [part]}, place=PLACE, root=ROOT)
    assert record.parts == (ImageRef(data=b"ab"),)


# --- wrong values

USER = {"role": "user", "content": "x"}
ANSWER = {"role": "assistant", "content": "y"}
TAGGED = {"role": "user", "content": "<image>x"}
TOOL = {"role": "tool", "content": "x"}
TEXT = {"text": "x"}


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"id": "a"}, None),
        ({"id": "a", "image": "a.png", "parts": []}, None),
        ({"image": "a.png"}, "id"),
        ({"id": "", "image": "a.png"}, "id"),
        ({"id": True, "image": "a.png"}, "id"),
        ({"id": 1.5, "image": "a.png"}, "id"),
        ({"id": "a", "image": "a.png", "metadata": []}, "metadata"),
        ({"id": "a", "image": "a.png", "shrt": "x"}, "shrt"),
        ({"id": "a", "short": "x"}, "image"),
        ({"id": "a", "image": None}, "image"),
        ({"id": "a", "image": 3}, "image"),
        ({"id": "a", "image": "https://x/a.png"}, "image"),
        ({"id": "a", "image": "data:image/png;base64"}, "image"),
        ({"id": "a", "image": "data:image/png;base64,!!"}, "image"),
        ({"id": "a", "image": {"bytes": "!!"}}, "image"),
        ({"id": "a", "image": "a.png", "short": ["x", ""]}, "short[1]"),
        ({"id": "a", "image": "a.png", "short": 7}, "short"),
        ({"id": "a", "image": "a.png", "long": "  "}, "long"),
        ({"id": "a", "image": "a.png", "negative": ["x"]}, "negative"),
        ({"id": "a", "image": "a.png", "negative": None}, "negative"),
        ({"id": "a", "negative": [[TEXT]]}, None),
        ({"id": "a", "parts": []}, "parts"),
        ({"id": "a", "parts": ["x"]}, "parts[0]"),
        ({"id": "a", "parts": [{"text": "x", "image": "a.png"}]}, "parts[0]"),
        ({"id": "a", "parts": [{"text": "x", "txt": 1}]}, "parts[0].txt"),
        ({"id": "a", "parts": [{"text": 1}]}, "parts[0].text"),
        ({"id": "a", "messages": {}}, "messages"),
        ({"id": "a", "messages": [USER]}, "messages"),
        ({"id": "a", "messages": ["x"]}, "messages[0].role"),
        ({"id": "a", "messages": [TOOL, ANSWER]}, "messages[0].role"),
        ({"id": "a", "messages": [{"role": "user"}, ANSWER]}, "messages[0].content"),
        ({"id": "a", "messages": [TAGGED, ANSWER]}, "messages[0].content"),
        ({"id": "a", "messages": [{**USER, "los": 0}, ANSWER]}, "messages[0].los"),
        ({"id": "a", "messages": [USER, {**ANSWER, "loss": 0.5}]}, "messages[1].loss"),
        ({"id": "a", "messages": [USER, {**ANSWER, "train": "no"}]}, "messages[1].train"),
        ({"id": "a", "messages": [USER, {**ANSWER, "loss": False}]}, "messages"),
        ({"id": "a", "image": "file://server/a.png"}, "image"),
        ({"id": "a", "image": "file://a.png"}, "image"),
        ({"id": "a", "image": "file:///a%00.png"}, "image"),
        ({"id": "a", "image": "file:///a%ff.png"}, "image"),
        ({"id": "a", "image": "C:\\a.png"}, "image"),
        ({"id": "a", "image": "D:/a.png"}, "image"),
        ({"id": "a", "image": "\\\\server\\a.png"}, "image"),
        ({"id": "a", "query": [TEXT]}, "positive"),
        ({"id": "a", "positive": [[TEXT]]}, "query"),
        ({"id": "a", "query": [TEXT], "positive": [TEXT]}, "positive"),
        ({"id": "a", "query": [TEXT], "positive": [[{"text": ""}]]}, "positive[0][0].text"),
    ],
)
def test_an_error_names_the_field_and_a_remedy(row: Any, field: str | None) -> None:
    with pytest.raises(DataError) as caught:
        parse_record(row, place=PLACE, root=ROOT)
    assert caught.value.place == ("x.jsonl:4" if field is None else f"x.jsonl:4:{field}")
    assert caught.value.fix and str(caught.value).endswith(caught.value.fix)


def test_an_error_of_broken_json_names_its_line(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"id": "a", "image": "a.png"}\n\n{"id": \n')
    with pytest.raises(DataError, match=r"x\.jsonl:3: broken JSON at column"):
        list(read_jsonl(tmp_path / "x.jsonl"))


PART_KEYS = ["text", "image", "role", "x"]
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(PART_KEYS), inner),
    max_leaves=6,
)
RECORD_KEYS = ["id", "image", "short", "long", "parts", "messages", "query", "positive", "metadata"]


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from(RECORD_KEYS), json_values, max_size=4))
def test_any_object_is_a_record_or_a_data_error(row: dict[str, Any]) -> None:
    try:
        record = parse_record(row, place=PLACE, root=ROOT)
        assert record.id == str(row["id"])
    except DataError as error:
        assert error.place is not None and error.place.startswith("x.jsonl:4")
