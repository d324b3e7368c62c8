"""Records: what is written is read back equal; what is wrong is named with file, line, field and fix."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlduet.data.formats import read_jsonl
from vlduet.data.record_json import parse_record, record_to_json
from vlduet.data.records import ImageRef, Message, Place, Record, split_sentences
from vlduet.errors import DataError

ROOT = Path("/data")
PLACE = Place("x.jsonl", 4)

texts = st.text(st.characters(codec="utf-8"), min_size=1, max_size=30).filter(str.strip)
names = st.text("abcXYZ09_-é ", min_size=1, max_size=8).map(lambda name: f"{name.strip()}.png")
refs = st.binary(max_size=20).map(lambda data: ImageRef(data=data)) | names.map(
    lambda name: ImageRef(path=ROOT / name)
)
parts = st.lists(texts | refs, min_size=1, max_size=3).map(tuple)
ids = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8)
metadata = st.dictionaries(texts, st.integers() | texts | st.booleans() | st.none(), max_size=2)

answers = st.lists(parts, max_size=2).map(tuple)
pair_records = st.builds(
    Record,
    ids,
    image=refs,
    short=st.lists(texts, max_size=3).map(tuple),
    long=st.none() | texts,
    negative=answers,
    metadata=metadata,
)
slices = st.lists(
    texts.flatmap(lambda t: st.sampled_from(split_sentences(t))) | refs, min_size=1, max_size=3
)
interleaved_records = st.builds(Record, ids, parts=slices.map(tuple), metadata=metadata)
turns = st.lists(st.builds(Message, st.sampled_from(["system", "user"]), parts), max_size=2)
chat_records = st.builds(
    lambda name, asked, answer: Record(name, messages=(*asked, Message("assistant", answer))),
    ids,
    turns,
    parts,
)
retrieval_records = st.builds(
    Record,
    ids,
    query=parts,
    positive=st.lists(parts, min_size=1, max_size=2).map(tuple),
    negative=answers,
)


@settings(max_examples=100, deadline=None)
@given(pair_records | interleaved_records | chat_records | retrieval_records)
def test_round_trip(record: Record) -> None:
    line = json.dumps(record_to_json(record, root=ROOT))
    assert parse_record(json.loads(line), place=PLACE, root=ROOT) == record


def test_the_four_kinds() -> None:
    part = [{"text": "x"}, {"image": "a.png"}]
    rows: dict[str, dict[str, Any]] = {
        "pair": {"image": "a.png", "short": ["x", "y"], "negative": [part]},
        "interleaved": {"parts": part},
        "chat": {
            "messages": [{"role": "user", "content": part}, {"role": "assistant", "content": "y"}]
        },
        "retrieval": {"query": part, "positive": [part], "negative": [part]},
    }
    counts = {"pair": 2, "interleaved": 1, "chat": 1, "retrieval": 3}
    for kind, row in rows.items():
        record = parse_record({"id": 7, **row}, place=PLACE, root=ROOT)
        assert (record.kind, record.id, len(record.images())) == (kind, "7", counts[kind])
        assert record.images()[0] == ImageRef(path=ROOT / "a.png")


USER = {"role": "user", "content": "x"}
ANSWER = {"role": "assistant", "content": "y"}


@pytest.mark.parametrize(
    ("raw", "field"),
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
        ({"id": "a", "negative": [[{"text": "x"}]]}, None),
        ({"id": "a", "parts": []}, "parts"),
        ({"id": "a", "parts": ["x"]}, "parts[0]"),
        ({"id": "a", "parts": [{"text": "x", "image": "a.png"}]}, "parts[0]"),
        ({"id": "a", "parts": [{"text": "x", "txt": 1}]}, "parts[0].txt"),
        ({"id": "a", "parts": [{"text": 1}]}, "parts[0].text"),
        ({"id": "a", "messages": {}}, "messages"),
        ({"id": "a", "messages": [USER]}, "messages"),
        ({"id": "a", "messages": ["x"]}, "messages[0].role"),
        ({"id": "a", "messages": [{"role": "tool", "content": "x"}, ANSWER]}, "messages[0].role"),
        ({"id": "a", "messages": [{"role": "user"}, ANSWER]}, "messages[0].content"),
        ({"id": "a", "query": [{"text": "x"}]}, "positive"),
        ({"id": "a", "positive": [[{"text": "x"}]]}, "query"),
        ({"id": "a", "query": [{"text": "x"}], "positive": [{"text": "x"}]}, "positive"),
        (
            {"id": "a", "query": [{"text": "x"}], "positive": [[{"text": ""}]]},
            "positive[0][0].text",
        ),
    ],
)
def test_bad_records_say_where_and_what_to_do(raw: Any, field: str | None) -> None:
    with pytest.raises(DataError) as caught:
        parse_record(raw, place=PLACE, root=ROOT)
    assert caught.value.place == ("x.jsonl:4" if field is None else f"x.jsonl:4:{field}")
    assert caught.value.fix and str(caught.value).endswith(caught.value.fix)


def test_broken_json_names_its_line(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"id": "a", "image": "a.png"}\n\n{"id": \n')
    with pytest.raises(DataError, match=r"x\.jsonl:3: broken JSON at column"):
        list(read_jsonl(tmp_path / "x.jsonl"))


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["text", "image", "role", "x"]), inner)
    ),
    max_leaves=6,
)
keys = st.sampled_from(
    ["id", "image", "short", "long", "parts", "messages", "query", "positive", "metadata"]
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(keys, values, max_size=4))
def test_whatever_the_input_it_is_a_record_or_a_data_error(raw: dict[str, Any]) -> None:
    try:
        parse_record(raw, place=PLACE, root=ROOT)
    except DataError as error:
        assert error.place is not None and error.place.startswith("x.jsonl:4")


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("One. Two! Three?", ["One.", "Two!", "Three?"]),
        ('He said "Stop." Then he left.', ['He said "Stop."', "Then he left."]),
        ("It weighs 3.5 kg, e.g. more. Fine.", ["It weighs 3.5 kg, e.g. more.", "Fine."]),
        ("A title\n\nA paragraph\nof two lines.", ["A title", "A paragraph\nof two lines."]),
        ("一。二！三", ["一。", "二！", "三"]),
        ("no end", ["no end"]),
        ("  ", []),
    ],
)
def test_sentences(text: str, sentences: list[str]) -> None:
    assert split_sentences(text) == sentences


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=80))
def test_sentences_lose_nothing_but_white_space(text: str) -> None:
    pieces = split_sentences(text)
    assert "".join("".join(pieces).split()) == "".join(text.split())
    assert [piece for sentence in pieces for piece in split_sentences(sentence)] == pieces
