"""JSON in every form in which data sets come; a broken row does not stop the others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.record_files import (
    read_error,
    read_single,
    read_with_errors,
    read_with_ignored,
    relative_places,
    write_lines,
)
from vlduet.data.formats import read_records
from vlduet.data.readers import json_files
from vlduet.data.readers.rows import ReadContext
from vlduet.errors import DataError

ROWS = [{"image": "a.png", "caption": "one"}, {"image": "b.png", "caption": "zwölf", "n": 3}]


def write_json(path: Path, value: Any, **options: Any) -> Path:
    """Write a value as JSON."""
    path.write_text(json.dumps(value, **options))
    return path


def read_captions(source: Path) -> list[tuple[str, ...]]:
    return [record.short for record in read_records(source)]


def test_broken_lines_do_not_stop_the_others(tmp_path: Path) -> None:
    good = {"id": "a", "image": "a.png", "short": "x"}
    misspelt = {**good, "extra": 1}
    source = write_lines(tmp_path / "x.jsonl", "{broken", misspelt, "[1]", good, {"id": "b"})
    source.write_bytes(source.read_bytes() + b'{"id": "\xff"}\n')
    records, errors = read_with_errors(source, format="records")
    assert [record.id for record in records] == ["a"]
    assert relative_places(source, errors) == ["1", "2:extra", "3", "5", "6"]


def test_errors_of_a_json_list_name_the_line(tmp_path: Path) -> None:
    source = tmp_path / "x.json"
    source.write_text(
        '[\n{"id": "a", "image": "a.png"},\n{"id": "", "image": "b.png"},\n{"id": oops}]'
    )
    records, errors = read_with_errors(source)
    assert [record.id for record in records] == ["a"]
    assert relative_places(source, errors) == ["3:id", "4"]


def test_json_lines_in_a_json_file_and_other_values(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "x.json", {"id": "a", "image": "a.png"})
    assert read_single(source).id == "a"
    source.write_text('"text"')
    assert "neither a list nor lines" in str(read_error(source))


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
@pytest.mark.parametrize("number", ["9" * 5000, "[" * 100_000], ids=["long number", "deep list"])
def test_json_beyond_the_decoder_s_limits_is_a_broken_row(
    suffix: str, number: str, tmp_path: Path
) -> None:
    row = '{"id": "a", "metadata": {"n": ' + number + "}}"
    source = tmp_path / f"x.{suffix}"
    source.write_text(f"[{row}]" if suffix == "json" else row)
    records, errors = read_with_errors(source)
    assert records == [] and len(errors) == 1


def test_reading_is_lazy(tmp_path: Path) -> None:
    good = {"id": "a", "image": "a.png", "short": "x"}
    source = write_lines(tmp_path / "x.jsonl", *[good] * 100, "{broken")
    assert next(read_records(source)).id == "a"


# --- encodings and layouts


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("layout", ["lines", "list", "pretty list", "pretty objects"])
@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_layout_encoding_and_ending_do_not_matter(
    encoding: str, layout: str, suffix: str, tmp_path: Path
) -> None:
    texts = {
        "lines": "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS),
        "list": json.dumps(ROWS, ensure_ascii=False),
        "pretty list": json.dumps(ROWS, indent=1),
        "pretty objects": "\n".join(json.dumps(row, indent=2) for row in ROWS),
    }
    source = tmp_path / f"x.{suffix}"
    source.write_text(texts[layout], encoding=encoding)
    first, second = read_records(source)
    assert (first.short, second.short, second.metadata) == (("one",), ("zwölf",), {"n": 3})
    assert (first.id, second.id) == (f"x.{suffix}:1", f"x.{suffix}:2")


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=8), st.integers(0, 3) | st.none())
def test_items_of_a_list_have_distinct_ids(
    tmp_path_factory: pytest.TempPathFactory, blank_lines: list[int], indent: int | None
) -> None:
    items = [json.dumps({"image": "a.png"}, indent=indent) + "\n" * n for n in blank_lines]
    source = tmp_path_factory.mktemp("list") / "x.json"
    source.write_text(f"[{', '.join(items)}]")
    ids = [record.id for record in read_records(source)]
    assert ids == [f"x.json:{number}" for number in range(1, len(items) + 1)]


def test_a_broken_file_is_one_error(tmp_path: Path) -> None:
    pretty = json.dumps({"id": "a", "image": "a.png", "short": ["x", "y"]}, indent=2)
    for suffix in ("json", "jsonl"):
        source = tmp_path / f"x.{suffix}"
        source.write_text(pretty.replace('"a.png"', "a.png"))
        assert read_error(source).place == f"{source}:3"
        source.write_text("some\n" * 40)
        assert "no JSON" in str(read_error(source)) or "neither a list" in str(read_error(source))
    source = tmp_path / "latin.jsonl"
    source.write_bytes('{"image": "ä.png"}\n'.encode("latin-1") * 3)
    assert "none of the first 3 can be read" in str(read_error(source))
    source.write_bytes('{"image": "a.png"}'.encode("utf-16-le"))
    assert "UTF-16 without a byte order mark" in str(read_error(source))


def test_a_first_line_that_breaks_off_is_an_error_of_this_line(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "x.jsonl", '{"image": "a.png",', ROWS[1])
    records, errors = read_with_errors(source)
    assert len(records) == 1 and relative_places(source, errors) == ["1"]


def test_text_behind_a_list_is_an_error(tmp_path: Path) -> None:
    source = tmp_path / "x.json"
    source.write_text(json.dumps(ROWS) + json.dumps(ROWS))
    records, errors = read_with_errors(source)
    assert len(records) == 2 and "text behind the end" in str(errors[0])


# --- one object


def coco() -> dict[str, Any]:
    """Return captions in the form of COCO, in another order than the images."""
    return {
        "info": {"year": 2017},
        "images": [
            {"id": 9, "file_name": "a.png", "width": 4, "license": 1},
            {"id": 25, "file_name": "b.png"},
            {"id": 3, "file_name": "c.png"},
        ],
        "annotations": [
            {"id": 1, "image_id": 25, "caption": "b one"},
            {"id": 2, "image_id": 9, "caption": "a one"},
            {"id": 3, "image_id": 25, "caption": "b two"},
        ],
        "categories": [],
    }


@pytest.mark.parametrize("indent", [None, 1])
def test_captions_of_coco_are_joined_with_their_images(indent: int | None, tmp_path: Path) -> None:
    records, ignored = read_with_ignored(write_json(tmp_path / "x.json", coco(), indent=indent))
    assert [record.short for record in records] == [("a one",), ("b one", "b two"), ()]
    assert [record.id for record in records] == ["9", "25", "3"] and ignored == []
    assert records[0].metadata == {"width": 4, "license": 1}


def test_what_is_not_read_of_coco_is_counted(tmp_path: Path) -> None:
    value = coco()
    value["annotations"] += [{"image_id": 9, "bbox": [1, 2, 3, 4]}, {"image_id": 7, "caption": "x"}]
    value["panoptic"] = [{"x": 1}]
    _, ignored = read_with_ignored(write_json(tmp_path / "x.json", value))
    assert ignored == [
        "1 annotation not read: they have no caption",
        "1 annotation not read: their image is not listed",
        "the key `panoptic` of 1 JSON object, not read",
    ]
    value["images"].append(value["images"][0])
    assert "same id" in str(read_error(write_json(tmp_path / "x.json", value)))


def test_sentences_of_karpathy_are_captions_and_splits_are_named(tmp_path: Path) -> None:
    images = [
        {"filename": "a.png", "filepath": "val2014", "split": "train", "sentences": [{"raw": "x"}]},
        {"filename": "b.png", "filepath": "", "split": "restval", "sentences": [{"raw": "y"}]},
    ]
    source = write_json(tmp_path / "x.json", {"images": images, "dataset": "coco"})
    first, second = read_records(source)
    assert first.image is not None and second.image is not None
    assert first.image.path == tmp_path / "val2014" / "a.png" and first.short == ("x",)
    assert second.image.path == tmp_path / "b.png" and second.metadata == {"split": "restval"}
    images[0]["split"] = "test"
    write_json(source, {"images": images})
    assert "several splits in one file: test (1), restval (1)" in str(read_error(source))


@pytest.mark.parametrize("key", ["data", "annotations", "rows"])
def test_a_list_under_a_key_holds_the_rows(key: str, tmp_path: Path) -> None:
    source = write_json(tmp_path / "x.json", {"version": 1, key: ROWS, "more": [1]}, indent=2)
    records, ignored = read_with_ignored(source)
    assert [record.short for record in records] == [("one",), ("zwölf",)]
    assert ignored == ["the key `more` of 1 JSON object, not read"]
    write_json(source, {"train": ROWS, "test": ROWS})
    assert "several lists of rows: train, test" in str(read_error(source))


def test_an_object_with_image_files_as_keys_holds_captions(tmp_path: Path) -> None:
    value = {"a.png": "one", "b.jpg": ["x", "y"], "c.webp": {"caption": "z", "price": 3}}
    records = list(read_records(write_json(tmp_path / "x.json", value)))
    assert [record.short for record in records] == [("one",), ("x", "y"), ("z",)]
    assert records[2].metadata == {"price": 3}


@pytest.mark.parametrize("indent", [None, 2])
def test_one_object_is_a_record_or_one_error(indent: int | None, tmp_path: Path) -> None:
    row = {"messages": [{"role": "assistant", "content": "x"}], "images": []}
    source = write_json(tmp_path / "x.json", row, indent=indent)
    assert read_single(source).kind == "chat"
    write_json(source, {"foo": 1, "bar": [{"x": 1}]}, indent=indent)
    message = str(read_error(source))
    assert "one JSON object, not recognised by its keys: foo, bar" in message


def test_a_line_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"id": "' + "x" * 5000)
    monkeypatch.setattr(json_files, "MAX_LINE_BYTES", 1000)
    with pytest.raises(DataError, match=r"a\.jsonl: a line of more than"):
        list(json_files.read_jsonl_rows(path, ReadContext(tmp_path)))
