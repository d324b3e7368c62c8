"""Records are written completely or not at all; images given as bytes become files."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from helpers.record_files import PNG, PNG_URL, read_single, read_with_errors, write_lines
from vlduet.data.formats import read_records
from vlduet.data.jsonl_output import check_output_path, stream_to_jsonl
from vlduet.errors import DataError

PARTS_ROW = {"id": "a", "parts": [{"text": "x"}]}


def test_inline_images_become_files_named_by_content(tmp_path: Path) -> None:
    svg_url = "data:;base64," + base64.b64encode(b"<svg/>").decode()
    source = write_lines(
        tmp_path / "x.jsonl",
        {"id": "a", "image": PNG_URL, "short": "one"},
        {"id": "b", "image": "b.png"},
        {"id": "c", "image": PNG_URL},
        {"id": "d", "image": svg_url},
    )
    target = tmp_path / "out" / "y.jsonl"
    assert len(list(stream_to_jsonl(read_records(source), target))) == 4
    paths = []
    for record in read_records(target):
        assert record.image is not None and record.image.path is not None
        paths.append(record.image.path.resolve())
    assert paths[0].read_bytes() == PNG and paths[0] == paths[2]
    assert paths[1] == (tmp_path / "b.png").resolve()
    assert paths[3].name.endswith(".bin"), "not one of the image formats that are read"
    assert sorted(path.name for path in target.parent.iterdir()) == ["y-images", "y.jsonl"]


def test_an_error_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "x.jsonl", PARTS_ROW, "{broken")
    target = tmp_path / "y.jsonl"
    target.write_text("old")
    with pytest.raises(DataError, match="broken JSON"):
        list(stream_to_jsonl(read_records(source), target))
    assert target.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.jsonl", "y.jsonl"]


def test_lone_surrogates_are_errors_except_in_metadata(tmp_path: Path) -> None:
    source = write_lines(
        tmp_path / "rows.jsonl",
        '{"id": "a", "image": "\\ud83d.png", "short": "x"}',
        '{"id": "\\ud83d", "image": "a.png"}',
        '{"image": "b.png", "caption": "y", "id": "\\ud83d"}',
        '{"id": "b", "image": "b.png", "metadata": {"from": "\\ud83d", "name": "é"}}',
    )
    records, errors = read_with_errors(source)
    assert len(errors) == 3 and all(str(error).isascii() for error in errors)
    (record,) = stream_to_jsonl(records, tmp_path / "out.jsonl")
    assert record.metadata == {"from": "\ud83d", "name": "é"}
    assert read_single(tmp_path / "out.jsonl").metadata == record.metadata


def test_an_output_must_not_be_a_part_of_its_source(tmp_path: Path) -> None:
    existing = write_lines(tmp_path / "train.jsonl", PARTS_ROW)
    for source in (existing, tmp_path):
        with pytest.raises(DataError, match="--to"):
            check_output_path(existing, source)
    with pytest.raises(DataError, match=r"no \.jsonl file"):
        check_output_path(tmp_path / "x.json", tmp_path)
    check_output_path(existing, tmp_path, allow_existing=True)
    check_output_path(tmp_path / "new.jsonl", tmp_path)
