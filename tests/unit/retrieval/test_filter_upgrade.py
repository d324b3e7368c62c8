"""Filters of an index that an earlier version built, before and after the next build."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from helpers.fake_embedder import write_records
from vlduet.errors import RetrievalError
from vlduet.retrieval import build, filter_values, index
from vlduet.retrieval.build import build_index
from vlduet.retrieval.index import Index, IndexManifest
from vlduet.retrieval.search import search
from vlduet.retrieval.stores import lance

METADATA = [
    {"day": "2024-05-01", "year": 2023, "tags": ["a"]},
    {"day": "2025-05-01", "year": "2023", "tags": ["b"]},
]


@pytest.fixture
def old_index(tmp_path: Path, model: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An index as an earlier version built it: texts, numbers and flags in columns of their own."""

    def extract(metadata: Any, fields: dict[str, list[str]]) -> dict[str, Any]:
        scalars = {key: filter_values.to_scalar(value) for key, value in metadata.items()}
        found = {key: value for key, value in scalars.items() if value is not None}
        for key, value in found.items():
            kinds = fields.setdefault(key, [])
            kinds += [kind for kind in [filter_values.scalar_kind(value)] if kind not in kinds]
        return found

    rows = [
        {"id": str(i), "parts": [{"text": "red"}], "metadata": metadata}
        for i, metadata in enumerate(METADATA)
    ]
    source = write_records(tmp_path / "r.jsonl", rows)
    with monkeypatch.context() as patch:
        patch.setattr(build, "extract_filter_values", extract)
        patch.setattr(
            lance, "column_values", lambda value: {filter_values.scalar_kind(value): value}
        )
        patch.setattr(index, "FILTER_VERSION", 1)
        patch.setattr(build, "FILTER_VERSION", 1)
        build_index(model, source, to=tmp_path / "index", side="text")
    return tmp_path / "index"


def ids(opened: Index, model: Any, where: Any) -> set[str]:
    return {hit.id for hit in search(opened, model, "red", where=where)}


def test_an_old_index_is_filtered_as_before_and_says_what_it_lacks(
    old_index: Path, model: Any
) -> None:
    with Index.open(old_index, model) as opened:
        assert opened.manifest.fields == {"day": ["text"], "year": ["number", "text"]}
        assert ids(opened, model, "day>=2025-01-01") == {"1"}
        assert ids(opened, model, {"year": 2023}) == {"0"}
        with pytest.raises(RetrievalError, match="earlier version built the index"):
            search(opened, model, "red", where="tags contains a")


def test_the_next_build_renews_all_filters_and_embeds_nothing(
    old_index: Path, tmp_path: Path, model: Any
) -> None:
    source = write_records(tmp_path / "r.jsonl", [{"id": "2", "parts": [{"text": "red"}]}])
    report = build_index(model, source, to=old_index)
    assert (report.added, report.embedded, report.absent) == (1, 0, 2)
    assert IndexManifest.read(old_index).filters == filter_values.FILTER_VERSION
    with Index.open(old_index, model) as opened:
        assert opened.manifest.fields["day"] == ["date"]
        assert ids(opened, model, "day=2024") == {"0"}
        assert ids(opened, model, {"year": 2023}) == {"0", "1"}
        assert ids(opened, model, "tags contains b") == {"1"}
        hit = search(opened, model, "red", where="tags contains a")[0]
        assert hit.metadata == METADATA[0] and hit.score == 1.0
