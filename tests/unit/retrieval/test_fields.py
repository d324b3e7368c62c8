"""Fields of an index with their types and, if they are few, their values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from helpers.fake_embedder import FakeModel, write_records
from vlduet.retrieval.build import build_index
from vlduet.retrieval.fields import MAX_LISTED_VALUES, MAX_VALUE_CHARS, describe_fields
from vlduet.retrieval.index import Index


def describe(tmp_path: Path, metadata: list[dict[str, Any]]) -> dict[str, tuple[str, Any]]:
    """Return the type and the values of each field of an index of documents with metadata."""
    rows = [
        {"id": str(i), "parts": [{"text": f"text {i}"}], "metadata": values}
        for i, values in enumerate(metadata)
    ]
    model = FakeModel()
    source = write_records(tmp_path / "source.jsonl", rows)
    build_index(model, source, to=tmp_path / "index", side="text")
    with Index.open(tmp_path / "index", model) as index:
        return {field.name: (field.type, field.values) for field in describe_fields(index)}


def test_types_and_values_of_fields(tmp_path: Path) -> None:
    metadata = [
        {"kind": "ship", "year": 2001, "new": True, "day": "2024-05-02", "tags": ["b", "a"]},
        {"kind": "", "year": 1999.5, "new": False, "day": "2024-05-01", "tags": ["a"]},
        {"kind": "ship", "year": 2001, "mixed": "x", "lists": ["a", 1], "object": {"a": 1}},
        {"mixed": 1, "sizes": [3, 1], "lists": "b", "none": None},
    ]
    assert describe(tmp_path, metadata) == {
        "kind": ("text", ("", "ship")),
        "year": ("number", (1999.5, 2001.0)),
        "new": ("flag", (False, True)),
        "day": ("date", ("2024-05-01", "2024-05-02")),
        "tags": ("text list", ("a", "b")),
        "mixed": ("mixed", None),
        "lists": ("mixed list", None),
        "sizes": ("number list", (1.0, 3.0)),
    }


def test_many_and_long_values_are_not_listed(tmp_path: Path) -> None:
    metadata = [
        {"few": i % MAX_LISTED_VALUES, "many": i, "long": "a" * (MAX_VALUE_CHARS + (i > 0))}
        for i in range(MAX_LISTED_VALUES + 1)
    ]
    fields = describe(tmp_path, metadata)
    assert fields["few"] == ("number", tuple(map(float, range(MAX_LISTED_VALUES))))
    assert fields["many"] == ("number", None) and fields["long"] == ("text", None)
