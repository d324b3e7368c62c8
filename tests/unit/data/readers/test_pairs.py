"""Captioned images in columns, and rows of MMEB."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from helpers.record_files import CAPTIONS, MMEB, read_error, read_single, write_lines
from vlduet.data.records import ImageRef


def test_an_mmeb_training_row_becomes_a_retrieval_record(tmp_path: Path) -> None:
    record = read_single(write_lines(tmp_path / "x.jsonl", MMEB))
    first, second = ImageRef(path=tmp_path / "a.png"), ImageRef(path=tmp_path / "b.png")
    assert record.kind == "retrieval" and record.query == (first, "Find its caption.")
    assert record.positive == (("A cat.",),)
    assert record.negative == (("A dog.",), (second, "A bird."))


def test_the_first_target_of_an_mmeb_evaluation_row_is_the_positive(tmp_path: Path) -> None:
    row = {
        "qry_text": "boat",
        "qry_img_path": "",
        "tgt_text": ["", ""],
        "tgt_img_path": ["a.png", "b.png"],
    }
    record = read_single(write_lines(tmp_path / "x.jsonl", row))
    assert record.positive == ((ImageRef(path=tmp_path / "a.png"),),)
    assert record.negative == ((ImageRef(path=tmp_path / "b.png"),),)


def test_caption_columns_are_collected_and_the_others_become_metadata(tmp_path: Path) -> None:
    row = {**CAPTIONS, "Title": "t", "text": ["x", "z"], "year": 1990, "empty": None}
    record = read_single(write_lines(tmp_path / "x.jsonl", row))
    assert record.image == ImageRef(path=tmp_path / "a.png")
    assert record.short == ("x", "t", "z") and record.long == "y", "each short caption once"
    assert record.metadata == {"year": 1990} and record.id == "x.jsonl:1"


def test_negatives_of_a_pair_without_an_id_are_kept(tmp_path: Path) -> None:
    row = {"image": "a.png", "short": "a boat", "negative": [[{"text": "a buoy"}]]}
    record = read_single(write_lines(tmp_path / "x.jsonl", row))
    assert record.negative == (("a buoy",),) and record.metadata == {}


TWO_IMAGES = {"file": "a.png", "path": "b.png", "text": "x"}


@pytest.mark.parametrize(
    ("row", "field", "message"),
    [
        ({**MMEB, "pos_text": ""}, "pos_text", "neither text nor image"),
        ({**MMEB, "qry": ["a", "b"], "qry_image_path": None}, "qry", "2 queries in one row"),
        ({**MMEB, "neg_image_path": [""]}, "neg_image_path", "2 texts for 1 images"),
        ({**MMEB, "qry_image_path": ""}, "qry", "more than there are images"),
        (TWO_IMAGES, "image", "several image columns: file, path"),
        ({"image": "a.png", "caption": 7}, "caption", "expected text"),
        ({**CAPTIONS, "description": "z"}, "long", "several long captions"),
        ({"image": "a.png", "text": "x", "id": True}, "id", "id is bool"),
    ],
)
def test_errors_name_file_line_and_field(
    row: dict[str, Any], field: str, message: str, tmp_path: Path
) -> None:
    source = write_lines(tmp_path / "x.jsonl", "", row)
    error = read_error(source)
    assert error.place == f"{source}:2:{field}" and message in str(error)
