"""Formats are detected, sources that cannot be read say what is accepted, records are written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.record_files import (
    FOREIGN_ROWS,
    LLAVA,
    PNG,
    read_error,
    read_single,
    write_lines,
)
from vlduet.data.formats import (
    FORMATS,
    append_unlisted_images,
    read_jsonl,
    read_records,
)
from vlduet.data.readers.rows import ReadContext, SourceRow
from vlduet.data.records import ImageRef, Place, Record
from vlduet.errors import DataError

PARTS_ROW = {"id": "a", "parts": [{"text": "x"}]}

# --- reading


def test_our_records_are_read_from_lines_and_from_a_list(tmp_path: Path) -> None:
    rows = [
        {"id": "a", "image": "a.png", "short": "x"},
        {"id": "b", "parts": [{"text": "One. Two."}]},
    ]
    source = write_lines(tmp_path / "x.jsonl", *rows)
    records = list(read_records(source))
    assert [record.kind for record in records] == ["pair", "interleaved"]
    assert records[1].parts == ("One.", "Two.")
    assert list(read_jsonl(source)) == records
    (tmp_path / "x.json").write_text(json.dumps(rows, indent=1))
    assert list(read_records(tmp_path / "x.json")) == records


def test_relative_image_paths_start_from_the_root(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "x.jsonl", {"id": "a", "image": "a.png"})
    (record,) = read_records(source, root=tmp_path / "images")
    assert record.image == ImageRef(path=tmp_path / "images" / "a.png")


def test_a_misspelt_key_of_ours_is_an_error(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "x.jsonl", "", {"id": "a", "image": "a.png", "shrt": "x"})
    error = read_error(source)
    assert error.place == f"{source}:2:shrt" and "Did you mean 'short'?" in str(error)


def test_an_unknown_format_suggests_known_ones(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "x.jsonl", LLAVA)
    expected = r"no format 'lava'.*Did you mean 'llava'\? Known: .*ms-swift"
    with pytest.raises(DataError, match=expected):
        read_records(source, format="lava")


def test_unrecognised_keys_list_all_formats(tmp_path: Path) -> None:
    message = str(read_error(write_lines(tmp_path / "y.jsonl", {"a": 1, "b": 2})))
    assert "not recognised by its keys: a, b" in message
    assert all(name in message for name in FORMATS)


def test_an_unreadable_source_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "x.xlsx").write_bytes(b"")
    assert ".parquet" in str(read_error(tmp_path / "x.xlsx"))
    assert "no such file" in str(read_error(tmp_path / "gone.jsonl"))
    (tmp_path / "empty").mkdir()
    assert "neither images nor records" in str(read_error(tmp_path / "empty"))


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.csv"])
def test_an_empty_file_has_no_records(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("")
    assert list(read_records(tmp_path / name)) == []


JUNK_KEYS = ["role", "content", "type", "from", "value", "image_url", "bytes"]
JUNK_TEXTS = ["", "x", "<image>", "user", "image", "a.png"]
junk_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.sampled_from(JUNK_TEXTS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(JUNK_KEYS), inner),
    max_leaves=5,
)


@settings(max_examples=300, deadline=None)
@given(st.data(), st.sampled_from(FOREIGN_ROWS), st.sampled_from(sorted(FORMATS)))
def test_any_row_is_a_record_or_a_data_error(data: Any, row: dict[str, Any], name: str) -> None:
    keys = st.sampled_from(sorted(set().union(*FOREIGN_ROWS)))
    value = row | data.draw(st.dictionaries(keys, junk_values, max_size=2))
    source_row = SourceRow(Place("x", 1), ReadContext(Path()), "x:1", value)
    try:
        record = FORMATS[name].parse_row(source_row)
        assert isinstance(record, Record)
    except DataError as error:
        assert error.place is not None and error.place.startswith("x:1") and error.fix
    for schema in FORMATS.values():
        assert schema.matches(source_row) in (True, False)


# --- folders of records


def test_a_single_file_of_records_in_a_folder_is_read(tmp_path: Path) -> None:
    write_lines(tmp_path / "coco.train.jsonl", PARTS_ROW)
    assert read_single(tmp_path).id == "a"
    # A quarantine lists what a command left out: it holds no records.
    write_lines(tmp_path / "coco.train.quarantine.jsonl", {"id": "b", "place": "c", "cause": "d"})
    assert read_single(tmp_path).id == "a"


@pytest.mark.parametrize("names", [("train", "test"), ("coco.train", "coco.test")])
def test_splits_in_one_folder_are_not_read_as_shards(
    tmp_path: Path, names: tuple[str, str]
) -> None:
    for name in names:
        write_lines(tmp_path / f"{name}.jsonl", PARTS_ROW)
    assert "several files of records" in str(read_error(tmp_path))


def test_numbered_shards_are_read_as_one_source(tmp_path: Path) -> None:
    for i in range(3):
        row = {**PARTS_ROW, "id": str(i)}
        write_lines(tmp_path / f"train-0000{i}-of-00003.jsonl", row)
    assert [record.id for record in read_records(tmp_path)] == ["0", "1", "2"]


def test_a_quarantine_file_among_images_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(PNG)
    write_lines(tmp_path / "vectors.quarantine.jsonl", {"id": "b", "place": "c", "cause": "d"})
    assert read_single(tmp_path).id == "1.png"


def test_images_that_no_record_refers_to_are_appended(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(PNG)
    listed = Record("first", image=ImageRef(path=tmp_path / "a.png"))
    errors: list[DataError] = []
    records = append_unlisted_images([listed], tmp_path, on_error=errors.append)
    assert [record.id for record in records] == ["first", "b.png"] and errors == []
