"""Queries of JSON files: parts, conversations, limits, and the place of a mistake."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.fake_embedder import paint
from vlduet.data import query_json
from vlduet.data.query_json import read_query_file
from vlduet.data.records import ImageRef, Message
from vlduet.errors import DataError, ImageError


def write_query(folder: Path, value: Any) -> Path:
    """Write a value as ``query.json`` and return its path."""
    path = folder / "query.json"
    path.write_text(json.dumps(value))
    return path


def test_parts_keep_their_order_and_paths_start_at_the_file(tmp_path: Path) -> None:
    image = ImageRef(path=paint(tmp_path / "images" / "a.png", (1, 2, 3)))
    openai_part = {"type": "image_url", "image_url": {"url": "images/a.png"}}
    parts = [{"text": "One. Two."}, {"image": "images/a.png"}, {"type": "text", "text": "b"}]
    path = write_query(tmp_path, [*parts, openai_part])
    assert read_query_file(path) == ("One. Two.", image, "b", image)


def test_a_conversation_keeps_its_turns(tmp_path: Path) -> None:
    image = ImageRef(path=paint(tmp_path / "a.png", (1, 2, 3)))
    turns = [
        {"role": "user", "content": [{"image": "a.png"}, {"text": "Which?"}]},
        {"role": "assistant", "content": "A boat."},
    ]
    path = write_query(tmp_path, {"messages": turns})
    assert read_query_file(path) == (
        Message("user", (image, "Which?")),
        Message("assistant", ("A boat.",)),
    )


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "query.json: expected a list of parts, got nothing"),
        ("text", "query.json: expected a list of parts, got str 'text'"),
        ([{"text": "a"}, "b"], r"query.json:\[1\]: a part needs exactly one of text and image"),
        ([{"text": " "}], r"query.json:\[0\].text: expected text"),
        ([{"image": "https://a.org/b.png"}], r"query.json:\[0\].image: .* is a URL"),
        ([{"image": "gone.png"}], r"query.json:\[0\]: .*gone.png: no such image"),
        ({}, "query.json:messages: expected a list of turns, got nothing"),
        ({"message": []}, r"query.json:message: unknown key 'message'. Did you mean 'messages'"),
        ({"messages": [{"role": "bot", "content": "a"}]}, r":messages\[0\].role: role 'bot'"),
        (
            {"messages": [{"role": "user", "content": [{"text": "a"}, {"image": "gone.png"}]}]},
            r":messages\[0\].content\[1\]: .*gone.png: no such image",
        ),
        ([{"text": "a"}] * 257, "query.json: 257 texts and images, more than 256"),
        ({"messages": [{"role": "user", "content": [{"text": "a"}] * 257}]}, "messages: 257 texts"),
    ],
)
def test_a_mistake_is_named_with_its_place(tmp_path: Path, value: Any, message: str) -> None:
    with pytest.raises((DataError, ImageError), match=message):
        read_query_file(write_query(tmp_path, value))


def test_a_file_is_small_and_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "query.json"
    with pytest.raises(DataError, match="the file is missing"):
        read_query_file(path)
    path.write_text('[{"text": "a"')
    with pytest.raises(DataError, match="broken JSON"):
        read_query_file(path)
    monkeypatch.setattr(query_json, "MAX_QUERY_BYTES", 12)
    with pytest.raises(DataError, match="MiB, more than"):
        read_query_file(path)
