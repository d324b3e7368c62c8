"""Rows of every foreign format, and helpers that write files of rows and read their records."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from helpers import tiny
from vlduet.data import images
from vlduet.data.formats import read_records
from vlduet.data.readers.rows import IgnoredData
from vlduet.data.records import ImageRef, Record
from vlduet.errors import DataError

PNG = images.read_bytes(tiny.random_image(side=4))
PNG_URL = "data:image/png;base64," + base64.b64encode(PNG).decode()

QUESTION = "What?"
ANSWER = {"role": "assistant", "content": "A cat."}

LLAVA = {
    "id": "7",
    "image": "a.png",
    "conversations": [
        {"from": "human", "value": f"<image>\n{QUESTION}"},
        {"from": "gpt", "value": "A cat."},
    ],
}
OPENAI_QUESTION = [
    {"type": "image_url", "image_url": {"url": PNG_URL}},
    {"type": "text", "text": QUESTION},
]
OPENAI = {
    "messages": [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": OPENAI_QUESTION},
        ANSWER,
    ]
}
TRL = {
    "images": ["a.png"],
    "messages": [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
    ],
}
TRL_PROMPT = {
    "images": ["a.png"],
    "prompt": [{"role": "user", "content": QUESTION}],
    "completion": "A cat.",
}
SWIFT = {
    "images": ["a.png"],
    "messages": [{"role": "user", "content": f"<image>{QUESTION}"}, ANSWER],
}
SWIFT_QUERY = {
    "images": "a.png",
    "query": f"<image>{QUESTION}",
    "response": "A cat.",
    "history": [["Hi", "Hello"]],
}
MMEB = {
    "qry": "<|image_1|>\nFind its caption.",
    "qry_image_path": "a.png",
    "pos_text": "A cat.",
    "pos_image_path": "",
    "neg_text": ["A dog.", "A bird."],
    "neg_image_path": ["", "b.png"],
}
CAPTIONS = {"image": "a.png", "caption": "x", "long": "y"}
FOREIGN_ROWS = (LLAVA, OPENAI, TRL, TRL_PROMPT, SWIFT, SWIFT_QUERY, MMEB, CAPTIONS)


def write_lines(path: Path, *rows: Any) -> Path:
    """Write one line per row: a text as it is, any other value as JSON."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines))
    return path


def read_single(path: Path, format: str | None = None) -> Record:
    """Return the only record of a source."""
    (record,) = read_records(path, format=format)
    return record


def read_error(path: Path, format: str | None = None) -> DataError:
    """Return the first error of a source, after checking that it has a remedy."""
    with pytest.raises(DataError) as caught:
        list(read_records(path, format=format))
    assert caught.value.fix, "an error without a remedy"
    return caught.value


def read_with_errors(path: Path, format: str | None = None) -> tuple[list[Record], list[DataError]]:
    """Return the records of a source, and the errors of its other rows."""
    errors: list[DataError] = []
    records = list(read_records(path, format=format, on_error=errors.append))
    assert all(error.fix for error in errors), "an error without a remedy"
    return records, errors


def read_with_ignored(path: Path, **options: Any) -> tuple[list[Record], list[str]]:
    """Return the records of a source, and the messages about what is not read."""
    ignored = IgnoredData()
    records = list(read_records(path, ignored=ignored, **options))
    return records, ignored.messages()


def relative_places(source: Path, errors: list[DataError]) -> list[str]:
    """Return the places of errors without the path of the source."""
    return [str(error.place).removeprefix(f"{source}:") for error in errors]


def describe_messages(record: Record) -> list[tuple[str, list[str]]]:
    """Return (role, texts and names of image files) of every message; ``bytes`` without a file."""
    messages = []
    for message in record.messages:
        names = []
        for part in message.parts:
            if isinstance(part, ImageRef):
                names.append(part.path.name if part.path else "bytes")
            else:
                names.append(part)
        messages.append((message.role, names))
    return messages
