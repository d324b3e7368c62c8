"""Documents of records of every kind, and their content hashes."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest

from helpers.fake_embedder import COLOURS, paint, write_records
from vlduet.data.records import ImageRef, Parts, Record
from vlduet.errors import DataError, RetrievalError
from vlduet.retrieval.documents import Document, Side, hash_parts, read_documents

LEFT_OUT = list[tuple[Any, DataError]]


def read_side(source: Path, side: Side) -> tuple[list[Document], LEFT_OUT]:
    left_out: LEFT_OUT = []
    documents = read_documents(
        source, side=side, on_error=lambda record, error: left_out.append((record, error))
    )
    return list(documents), left_out


@pytest.fixture
def source(tmp_path: Path) -> Path:
    for name in ("red", "green"):
        paint(tmp_path / f"{name}.png", COLOURS[name])
    red, green = {"image": "red.png"}, {"image": "green.png"}
    rows = [
        {"id": "pair", "image": "red.png", "short": ["One.", "Two."], "long": "A long one."},
        {"id": "long", "image": "red.png", "long": "Only long."},
        {"id": "story", "parts": [{"text": "It begins. "}, red, {"text": "It ends."}, green]},
        {
            "id": "chat",
            "messages": [
                {"role": "system", "content": "Be kind."},
                {"role": "user", "content": [red, {"text": "What is it?"}]},
                {"role": "assistant", "content": "A square."},
                {"role": "user", "content": "Sure?"},
            ],
        },
        {
            "id": "search",
            "query": [{"text": "never a document"}],
            "positive": [[green, {"text": "good"}]],
            "negative": [[{"text": "bad"}]],
        },
    ]
    path: Path = write_records(tmp_path / "records.jsonl", rows)
    return path


def id_and_parts(document: Document) -> tuple[str, list[str]]:
    return document.id, [p if isinstance(p, str) else Path(p.name).stem for p in document.parts]


def test_image_side_embeds_each_image(source: Path) -> None:
    documents, left_out = read_side(source, "image")
    assert [id_and_parts(d) for d in documents] == [
        ("pair", ["red"]),
        ("long", ["red"]),
        ("story#0", ["red"]),
        ("story#1", ["green"]),
        ("chat", ["red"]),
        ("search", ["green"]),
    ]
    assert not left_out
    texts = {d.id: d.text for d in documents}
    assert texts["pair"] == "One.\nTwo.\nA long one."
    assert texts["story#0"] == texts["story#1"] == "It begins. It ends."
    assert texts["chat"] == "Question: What is it?\nAnswer: A square."


def test_text_side_embeds_each_text(source: Path) -> None:
    documents, left_out = read_side(source, "text")
    assert [id_and_parts(d) for d in documents] == [
        ("pair#0", ["One."]),
        ("pair#1", ["Two."]),
        ("long", ["Only long."]),
        ("story#0", ["It begins."]),
        ("story#1", ["It ends."]),
        ("chat", ["What is it?"]),
        ("search#0", ["good"]),
        ("search#1", ["bad"]),
    ]
    assert not left_out
    by_id = {d.id: d for d in documents}
    assert by_id["pair#1"].text == "Two."
    assert by_id["pair#1"].image == ImageRef(path=source.parent / "red.png"), (
        "the image is shown although it is not embedded"
    )
    assert "A square." in by_id["chat"].text, "ask quotes the answer, which is never embedded"


def test_record_side_embeds_all_parts(source: Path) -> None:
    documents, _ = read_side(source, "record")
    assert [id_and_parts(d) for d in documents] == [
        ("pair", ["red", "One."]),
        ("long", ["red", "Only long."]),
        ("story", ["It begins.", "red", "It ends.", "green"]),
        ("chat", ["red", "What is it?"]),
        ("search#0", ["green", "good"]),
        ("search#1", ["bad"]),
    ]
    assert all("A square." not in d.parts for d in documents)
    candidates = {d.id: d for d in documents if d.id.startswith("search")}
    assert candidates["search#0"].image is not None
    assert candidates["search#1"].image is None, (
        "another candidate's image says nothing of this one"
    )


def test_content_hash_depends_on_texts_and_image_bytes_only(source: Path) -> None:
    before = {d.id: d.content_hash for d in read_side(source, "record")[0]}
    assert len(set(before.values())) == len(before)
    images = {d.id: d.content_hash for d in read_side(source, "image")[0]}
    assert images["pair"] == images["long"] == images["story#0"], (
        "the same bytes, whatever the record"
    )
    paint(source.parent / "red.png", COLOURS["blue"])
    after = {d.id: d.content_hash for d in read_side(source, "record")[0]}
    changed = {identity for identity in before if before[identity] != after[identity]}
    assert changed == {"pair", "long", "story", "chat"}


def test_image_as_bytes_and_as_path_have_the_same_hash(tmp_path: Path) -> None:
    data = paint(tmp_path / "a.png", (1, 2, 3)).read_bytes()
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    rows = [{"id": "path", "image": "a.png"}, {"id": "bytes", "image": url}]
    (path, encoded), _ = read_side(write_records(tmp_path / "r.jsonl", rows), "image")
    assert path.content_hash == encoded.content_hash and path.text == encoded.text == ""


def test_hash_depends_on_the_borders_between_parts(tmp_path: Path) -> None:
    rows = [
        {"id": "first", "parts": [{"text": "ab"}, {"text": "c"}]},
        {"id": "second", "parts": [{"text": "a"}, {"text": "bc"}]},
    ]
    (first, second), _ = read_side(write_records(tmp_path / "r.jsonl", rows), "record")
    assert first.content_hash != second.content_hash


def test_broken_records_and_duplicates_are_reported_and_left_out(tmp_path: Path) -> None:
    paint(tmp_path / "a.png", (1, 2, 3))
    path = write_records(
        tmp_path / "r.jsonl",
        [
            {"id": "ok", "image": "a.png"},
            {"id": "ok", "image": "a.png"},
            {"id": "missing", "image": "missing.png"},
            {"id": "text", "parts": [{"text": "no image"}]},
            {"id": "wrong", "image": 7},
            {"id": "last", "image": "a.png"},
        ],
    )
    documents, left_out = read_side(path, "image")
    assert [d.id for d in documents] == ["ok", "last"]
    messages = [str(error) for _, error in left_out]
    assert "appears twice" in messages[0]
    assert "missing.png" in messages[1]
    assert "without image" in messages[2]
    dropped = [record for record, _ in left_out if isinstance(record, Record)]
    assert [(record.id, record.place and record.place.line) for record in dropped] == [
        ("ok", 2),
        ("missing", 3),
        ("text", 4),
    ]
    assert len(left_out) == 4


def test_record_with_lone_surrogates_is_left_out(tmp_path: Path) -> None:
    """JSON can spell half a character, which no file, prompt or store can hold."""
    path = tmp_path / "r.jsonl"
    lines = [
        '{"id": "a\\ud800", "parts": [{"text": "b\\udfff"}]}',
        '{"id": "b", "parts": [{"text": "whole"}]}',
    ]
    path.write_text("\n".join(lines) + "\n")
    documents, errors = read_side(path, "record")
    assert [document.id for document in documents] == ["b"]
    assert len(errors) == 1 and ":1" in str(errors[0])


def test_unknown_side_is_refused_with_the_known_ones(source: Path) -> None:
    with pytest.raises(RetrievalError, match="image"):
        read_side(source, "images")  # type: ignore[arg-type]


def test_equal_characters_in_other_parts_have_another_hash(tmp_path: Path) -> None:
    image = ImageRef(path=paint(tmp_path / "red.png", COLOURS["red"]))
    contents: list[Parts] = [
        ("a", "b"), ("atext:b",), ("b", "a"), ("ab",), (image, "a"), ("a", image),
    ]  # fmt: skip
    hashes = {hash_parts(parts) for parts in contents}
    assert len(hashes) == len(contents)
