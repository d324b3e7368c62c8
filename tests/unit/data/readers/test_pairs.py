"""Captioned images and queries with candidates in columns, and rows of MMEB."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from helpers.record_files import (
    CAPTIONS,
    MMEB,
    PNG,
    PNG_URL,
    read_error,
    read_single,
    read_with_ignored,
    write_lines,
)
from vlduet.data.readers.pairs import MMEB_INSTRUCTIONS, MMEB_KEYS
from vlduet.data.records import ImageRef


def test_an_mmeb_training_row_becomes_a_retrieval_record(tmp_path: Path) -> None:
    record = read_single(write_lines(tmp_path / "x.jsonl", MMEB))
    first, second = ImageRef(path=tmp_path / "a.png"), ImageRef(path=tmp_path / "b.png")
    assert record.kind == "retrieval" and record.query == (first, "Find its caption.")
    assert record.positive == (("A cat.",),)
    assert record.negative == (("A dog.",), (second, "A bird."))


def test_instructions_of_mmeb_are_counted_and_its_columns_documented(tmp_path: Path) -> None:
    row = {**MMEB, "qry_inst": "Find it.", "neg_inst": ""}
    (record,), ignored = read_with_ignored(write_lines(tmp_path / "x.jsonl", row))
    assert record.metadata == {"qry_inst": "Find it.", "neg_inst": ""}
    assert ignored == ["1 row with a column `qry_inst` that is not read"]
    text = (Path(__file__).parents[4] / "docs" / "data-format.md").read_text(encoding="utf-8")
    section = text.partition("### MMEB")[2].partition("###")[0]
    assert {*re.findall("`([a-z_]+)`", section)} == {*MMEB_KEYS, *MMEB_INSTRUCTIONS}


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


# --- queries with candidates


def test_the_image_is_the_right_candidate_of_a_query(tmp_path: Path) -> None:
    row = {"query": "a boat", "image": "a.png", "negative_0": "b.png", "negative_1": "a car"}
    record = read_single(write_lines(tmp_path / "x.jsonl", {**row, "page": 3}))
    first, second = ImageRef(path=tmp_path / "a.png"), ImageRef(path=tmp_path / "b.png")
    assert record.query == ("a boat",) and record.positive == ((first,),)
    assert record.negative == ((second,), ("a car",)) and record.metadata == {"page": 3}


def test_an_image_may_be_the_query(tmp_path: Path) -> None:
    row = {"anchor": PNG_URL, "positive": ["a boat", "a ship"], "negative": [["not"], "x"]}
    row["negative"] = ["a car", "a bus"]
    record = read_single(write_lines(tmp_path / "x.jsonl", row))
    assert record.query == (ImageRef(data=PNG),)
    assert record.positive == (("a boat",), ("a ship",))
    assert record.negative == (("a car",), ("a bus",))


def test_text_and_image_of_a_candidate_are_its_parts(tmp_path: Path) -> None:
    row = {
        "query": {"image": "a.png", "text": "the same in red"},
        "positive_text": "a red boat",
        "positive_image": "red boat.png",
        "negative": [{"text": "a car"}, {"image": "c.png"}],
    }
    record = read_single(write_lines(tmp_path / "x.jsonl", row))
    image, positive, negative = (
        ImageRef(path=tmp_path / name) for name in ("a.png", "red boat.png", "c.png")
    )
    assert record.query == (image, "the same in red")
    assert record.positive == ((positive, "a red boat"),)
    assert record.negative == (("a car",), (negative,))


def test_right_and_wrong_texts_of_an_image_are_captions_and_negatives(tmp_path: Path) -> None:
    row = {"image": "a.png", "caption": "x", "positive": "y", "negative": "z"}
    record = read_single(write_lines(tmp_path / "x.jsonl", row))
    assert record.kind == "pair" and record.short == ("x", "y") and record.negative == (("z",),)


def test_columns_that_nothing_learns_are_counted(tmp_path: Path) -> None:
    row = {"query": "a", "image": "a.png", "answer": "b", "label": 1, "page": "c d"}
    (record,), ignored = read_with_ignored(write_lines(tmp_path / "x.jsonl", row))
    assert record.metadata == {"answer": "b", "label": 1, "page": "c d"}
    assert len(ignored) == 2 and "`answer`" in ignored[0] and "`label`" in ignored[1]


@pytest.mark.parametrize(
    ("column", "text"), [("details", "a red boat"), ("Tags", "boat"), ("x", "boat, red; sea")]
)
def test_texts_of_a_table_without_captions_are_reported(
    column: str, text: str, tmp_path: Path
) -> None:
    row = {"image": "a.png", column: text, "colour": "red", "code": "A1 77", "price": "12 EUR"}
    (record,), (message,) = read_with_ignored(write_lines(tmp_path / "x.jsonl", row))
    assert record.metadata[column] == text
    assert f"`{column}`" in message and f"caption={column}" in message
    _, ignored = read_with_ignored(tmp_path / "x.jsonl", columns={"caption": column})
    assert ignored == []


def test_a_list_of_images_is_a_list_of_candidates_but_no_pair(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "x.jsonl", {"query": "a", "images": ["a.png", "b.png"]})
    assert len(read_single(source).positive) == 2
    write_lines(source, {"caption": "a", "images": ["a.png"]})
    assert read_single(source).image == ImageRef(path=tmp_path / "a.png")
    write_lines(source, {"caption": "a", "images": ["a.png", "b.png"]})
    assert "2 images in a pair" in str(read_error(source))


def test_embedded_images_without_a_role_are_counted(tmp_path: Path) -> None:
    row = {"image": {"bytes": PNG, "path": "a.png"}, "mask": {"bytes": PNG, "path": "b.png"}}
    pa.parquet.write_table(pa.Table.from_pylist([row]), tmp_path / "x.parquet")
    (record,), ignored = read_with_ignored(tmp_path / "x.parquet")
    assert record.metadata == {} and ignored == ["1 row with a column `mask` that is not read"]


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
        ({"query": "x", "image": "a.png", "positive": "y"}, "image", "query or a right candidate"),
        ({"image": "a.png", "positive": "b.png"}, "positive", "an image, and no query"),
        ({"query": "x", "positive": None}, "positive", "no positive"),
        ({"query": "x", "negative": "y", "image": ""}, "image", "no image"),
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
