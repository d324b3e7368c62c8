"""Rows of JSON, tables, archives and folders; a broken row does not stop the others."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from helpers.record_files import (
    PNG,
    read_error,
    read_single,
    read_with_errors,
    write_lines,
)
from vlduet.data.formats import read_records
from vlduet.data.records import ImageRef
from vlduet.errors import DataError


def relative_places(source: Path, errors: list[DataError]) -> list[str]:
    """Return the places of errors without the path of the source."""
    return [str(error.place).removeprefix(f"{source}:") for error in errors]


# --- JSON


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


# --- tables


@pytest.mark.parametrize(("suffix", "delimiter"), [("csv", ","), ("csv", ";"), ("tsv", "\t")])
def test_tables_have_a_header_and_any_usual_delimiter(
    suffix: str, delimiter: str, tmp_path: Path
) -> None:
    source = tmp_path / f"x.{suffix}"
    rows = [
        ["file_name", "caption", "title", "year"],
        ["a.png", '"one\ntwo"', "T", "1990"],
        ["b.png", "", "", ""],
    ]
    source.write_text("\ufeff" + "\n".join(delimiter.join(row) for row in rows))
    first, second = read_records(source)
    assert first.image == ImageRef(path=tmp_path / "a.png") and first.short == ("one\ntwo", "T")
    assert first.metadata == {"year": 1990}
    assert (first.id, second.id) == (f"x.{suffix}:2", f"x.{suffix}:4")
    assert second.short == () and second.place is not None and second.place.line == 4


def test_broken_rows_of_a_table_do_not_stop_the_others(tmp_path: Path) -> None:
    source = tmp_path / "x.csv"
    lines = [
        b"image,caption",
        b"a.png,one",
        b"b.png,two,three",
        b"c.png,\xff",
        b'd.png,"x" y',
        b",no image",
        b"e.png,five",
    ]
    source.write_bytes(b"\n".join(lines) + b"\n")
    records, errors = read_with_errors(source)
    assert [record.short for record in records] == [("one",), ("five",)]
    assert relative_places(source, errors) == ["3:three", "4:caption", "5", "6:image"]


def test_a_header_with_equal_columns_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("image,text,text\na.png,b,c\n")
    assert "a column twice: image, text, text" in str(read_error(tmp_path / "x.csv"))


def test_the_case_of_a_file_s_suffix_does_not_matter(tmp_path: Path) -> None:
    (tmp_path / "T.CSV").write_text("image,caption\na.png,a boat\n")
    assert read_single(tmp_path / "T.CSV").short == ("a boat",)


def image_table() -> pa.Table:
    """Return a table of an embedded image with a caption, and of an image file without one."""
    rows = [
        {"image": {"bytes": PNG, "path": "a.png"}, "text": "one"},
        {"image": {"bytes": None, "path": "b.png"}},
    ]
    return pa.Table.from_pylist(rows)


def check_image_table(source: Path, root: Path) -> None:
    first, second = read_records(source)
    assert first.image == ImageRef(data=PNG) and first.short == ("one",)
    assert second.image == ImageRef(path=root / "b.png") and second.short == ()


def test_parquet_and_both_kinds_of_arrow_files_are_read(tmp_path: Path) -> None:
    table = image_table()
    pa.parquet.write_table(table, tmp_path / "x.parquet")
    check_image_table(tmp_path / "x.parquet", tmp_path)
    for name, open_writer in (("a.arrow", pa.ipc.new_stream), ("b.arrow", pa.ipc.new_file)):
        with open_writer(tmp_path / name, table.schema) as writer:
            writer.write_table(table)
        check_image_table(tmp_path / name, tmp_path)


def test_a_saved_hugging_face_dataset_is_read_and_splits_must_be_named(tmp_path: Path) -> None:
    table = image_table()
    folder = tmp_path / "saved" / "train"
    folder.mkdir(parents=True)
    shard = "data-00000-of-00001.arrow"
    with pa.ipc.new_stream(folder / shard, table.schema) as writer:
        writer.write_table(table)
    (folder / "dataset_info.json").write_text("{}")
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": shard}]}))
    check_image_table(folder, folder)
    (folder.parent / "dataset_dict.json").write_text('{"splits": ["train"]}')
    assert f"Name one: {folder}" in str(read_error(folder.parent))


def test_a_broken_table_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_bytes(b"PAR1 nonsense")
    assert "broken parquet" in str(read_error(tmp_path / "x.parquet"))


# --- folders of images


def test_images_below_a_folder_are_rows_with_captions_of_text_files(tmp_path: Path) -> None:
    for name in ("b.png", "deep/a.PNG", ".hidden/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(PNG)
    (tmp_path / "deep" / "a.txt").write_text("A cat.\n\nTwo cats.\n")
    (tmp_path / "notes.md").write_text("no image")
    records = list(read_records(tmp_path))
    assert [record.id for record in records] == ["b.png", "deep/a.PNG"]
    assert [record.short for record in records] == [(), ("A cat.", "Two cats.")]
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe")
    (record,), (error,) = read_with_errors(tmp_path)
    assert record.id == "deep/a.PNG" and error.place == str(tmp_path / "b.txt")


def test_file_names_that_are_not_utf8_are_errors(tmp_path: Path) -> None:
    for name in (b"good.png", b"caf\xe9.png"):
        (tmp_path / os.fsdecode(name)).write_bytes(PNG)
    (record,), (error,) = read_with_errors(tmp_path)
    assert record.id == "good.png"
    assert "not UTF-8" in str(error) and str(error).isascii()
