"""Which documents a record gives, and what their keys depend on."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest

from vlduet.data.records import ImageRef, Record
from vlduet.errors import DataError, RetrievalError
from vlduet.retrieval.documents import Document, Side, read_documents

LEFT_OUT = list[tuple[Any, DataError]]


def read(source: Path, side: Side) -> tuple[list[Document], LEFT_OUT]:
    left_out: LEFT_OUT = []
    found = list(
        read_documents(
            source, side=side, on_error=lambda what, error: left_out.append((what, error))
        )
    )
    return found, left_out


@pytest.fixture
def source(tmp_path: Path, tools: Any) -> Path:
    for name in ("red", "green"):
        tools.paint(tmp_path / f"{name}.png", tools.COLOURS[name])
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
    path: Path = tools.write_records(tmp_path / "records.jsonl", rows)
    return path


def shown(document: Document) -> tuple[str, list[str]]:
    return document.id, [p if isinstance(p, str) else Path(p.name).stem for p in document.parts]


def test_image_side(source: Path) -> None:
    found, left_out = read(source, "image")
    assert [shown(d) for d in found] == [
        ("pair", ["red"]),
        ("long", ["red"]),
        ("story#0", ["red"]),
        ("story#1", ["green"]),
        ("chat", ["red"]),
        ("search", ["green"]),
    ]
    assert not left_out
    texts = {d.id: d.text for d in found}
    assert texts["pair"] == "One.\nTwo.\nA long one."
    assert texts["story#0"] == texts["story#1"] == "It begins. It ends."
    assert texts["chat"] == "Question: What is it?\nAnswer: A square."


def test_text_side(source: Path) -> None:
    found, left_out = read(source, "text")
    assert [shown(d) for d in found] == [
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
    by_id = {d.id: d for d in found}
    assert by_id["pair#1"].text == "Two."
    assert by_id["pair#1"].image == ImageRef(path=source.parent / "red.png"), (
        "shown, though not embedded"
    )
    assert "A square." in by_id["chat"].text, "ask quotes the answer, which is never embedded"


def test_record_side(source: Path) -> None:
    found, _ = read(source, "record")
    assert [shown(d) for d in found] == [
        ("pair", ["red", "One."]),
        ("long", ["red", "Only long."]),
        ("story", ["It begins.", "red", "It ends.", "green"]),
        ("chat", ["red", "What is it?"]),
        ("search#0", ["green", "good"]),
        ("search#1", ["bad"]),
    ]
    assert all("A square." not in d.parts for d in found)
    candidates = {d.id: d for d in found if d.id.startswith("search")}
    assert candidates["search#0"].image is not None
    assert candidates["search#1"].image is None, (
        "another candidate's image says nothing of this one"
    )


def test_key_is_the_content(source: Path, tools: Any) -> None:
    before = {d.id: d.content_hash for d in read(source, "record")[0]}
    assert len(set(before.values())) == len(before)
    images = {d.id: d.content_hash for d in read(source, "image")[0]}
    assert images["pair"] == images["long"] == images["story#0"], (
        "the same bytes, whatever the record"
    )
    tools.paint(source.parent / "red.png", tools.COLOURS["blue"])
    after = {d.id: d.content_hash for d in read(source, "record")[0]}
    changed = {identity for identity in before if before[identity] != after[identity]}
    assert changed == {"pair", "long", "story", "chat"}


def test_bytes_and_path_have_one_key(tmp_path: Path, tools: Any) -> None:
    data = tools.paint(tmp_path / "a.png", (1, 2, 3)).read_bytes()
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    rows = [{"id": "path", "image": "a.png"}, {"id": "bytes", "image": url}]
    (path, encoded), _ = read(tools.write_records(tmp_path / "r.jsonl", rows), "image")
    assert path.content_hash == encoded.content_hash and path.text == encoded.text == ""


def test_parts_do_not_run_together(tmp_path: Path, tools: Any) -> None:
    rows = [
        {"id": str(i), "parts": [{"text": t} for t in texts]}
        for i, texts in enumerate([["ab", "c"], ["a", "bc"]])
    ]
    (one, two), _ = read(tools.write_records(tmp_path / "r.jsonl", rows), "record")
    assert one.content_hash != two.content_hash


def test_what_cannot_be_a_document_is_told_and_the_rest_goes_on(tmp_path: Path, tools: Any) -> None:
    tools.paint(tmp_path / "a.png", (1, 2, 3))
    path = tools.write_records(
        tmp_path / "r.jsonl",
        [
            {"id": "ok", "image": "a.png"},
            {"id": "ok", "image": "a.png"},
            {"id": "gone", "image": "gone.png"},
            {"id": "words", "parts": [{"text": "no image"}]},
            {"id": "wrong", "image": 7},
            {"id": "last", "image": "a.png"},
        ],
    )
    found, left_out = read(path, "image")
    assert [d.id for d in found] == ["ok", "last"]
    messages = [str(error) for _, error in left_out]
    assert [
        "appears twice" in messages[0],
        "gone.png" in messages[1],
        "without image" in messages[2],
    ] == [True] * 3
    named = [what for what, _ in left_out if isinstance(what, Record)]
    assert [(what.id, what.place and what.place.line) for what in named] == [
        ("ok", 2),
        ("gone", 3),
        ("words", 4),
    ]
    assert len(left_out) == 4


def test_lone_surrogates_do_not_travel(tmp_path: Path) -> None:
    """JSON can spell half a character; no file, prompt or store can hold it, so the record is refused by name."""
    path = tmp_path / "r.jsonl"
    lines = [
        '{"id": "a\\ud800", "parts": [{"text": "b\\udfff"}]}',
        '{"id": "b", "parts": [{"text": "whole"}]}',
    ]
    path.write_text("\n".join(lines) + "\n")
    documents, errors = read(path, "record")
    assert [document.id for document in documents] == ["b"]
    assert len(errors) == 1 and ":1" in str(errors[0])


def test_unknown_side_names_the_known_ones(source: Path) -> None:
    with pytest.raises(RetrievalError, match="image"):
        read(source, "images")  # type: ignore[arg-type]
