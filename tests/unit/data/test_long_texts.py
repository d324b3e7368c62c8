"""Values of 20,000 characters are read in a time that grows with their length, not its square.

A regular expression that tries every pair of positions would not end before the time limit that
pyproject.toml sets for a test.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from helpers import tiny
from vlduet.data.formats import read_records
from vlduet.data.readers.columns import is_description
from vlduet.data.records import Record

LENGTH = 20_000
UNITS = ("a", "a b ", "1,", "a.", "_", "'", "(", "{", "<|", ":", "\\", "a\n", "is ", "\ue000", "猫")
"""Texts that are repeated up to `LENGTH`."""


def make_rows(text: str) -> dict[str, dict[str, Any]]:
    """Return a row with `text` in a value of its own, by the place of the value."""
    turns = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
    return {
        "metadata": {"image": "a.png", "notes": text},
        "caption": {"image": "a.png", "caption": text},
        "long caption": {"image": "a.png", "long": text},
        "chat": {"messages": turns},
        "document": {"id": "x", "parts": [{"image": "a.png"}, {"text": text}]},
        "query": {"query": text, "positive": text},
        "key": {"image": "a.png", "caption": "a cat", f"k{text}": 1},
    }


def find_texts(record: Record) -> list[str]:
    """Return the texts of a record, and those of its metadata with their keys."""
    texts: list[Any] = [*record.short, record.long, *record.query, *record.parts]
    texts += [part for message in record.messages for part in message.parts]
    for key, value in record.metadata.items():
        texts += [key, value]
    return [text for text in texts if isinstance(text, str)]


@pytest.mark.parametrize("unit", UNITS, ids=ascii)
def test_long_values_are_read_whole(tmp_path: Path, unit: str) -> None:
    (tmp_path / "a.png").write_bytes(tiny.random_image().data or b"")
    text = "x" + unit * (LENGTH // len(unit)) + "x"
    for place, row in make_rows(text).items():
        file = tmp_path / "records.jsonl"
        file.write_text(json.dumps(row), encoding="utf-8")
        (record,) = read_records(file)
        assert any(text in value for value in find_texts(record)), place


@pytest.mark.parametrize(
    ("value", "is_expected"),
    [
        ("a" * 10**6, False),
        ("a" * 10**6 + " cat", True),
        ("12 red", False),
        ("x1 - 2 y", False),
        ("a1 red-1 2cat", True),
        ("red\ncat", True),
        ("", False),
    ],
    ids=["long word", "long words", "word", "letters", "two words", "lines", "empty"],
)
def test_a_single_term_is_no_description(value: str, is_expected: bool) -> None:
    assert is_description("x", value) == is_expected
