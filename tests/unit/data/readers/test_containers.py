"""Tables of Parquet and Arrow, and patterns of files."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from helpers.record_files import (
    PNG,
    read_error,
    write_lines,
)
from vlduet.data import images
from vlduet.data.formats import read_records
from vlduet.data.jsonl_output import check_output_path
from vlduet.data.records import ImageRef
from vlduet.errors import DataError


def image_table() -> pa.Table:
    """Return a table of an embedded image with a caption, and of an image file without one."""
    rows = [
        {"image": {"bytes": PNG, "path": "a.png"}, "text": "one"},
        {"image": {"bytes": None, "path": "b.png"}},
    ]
    return pa.Table.from_pylist(rows)


def check_image_table(source: Path, root: Path) -> None:
    first, second = read_records(source)
    assert first.image is not None and first.short == ("one",)
    assert images.read_bytes(first.image) == PNG
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


# --- patterns


def write_shards(folder: Path, *names: str) -> None:
    """Write files of one record each, whose caption is the file's name."""
    folder.mkdir(exist_ok=True)
    for name in names:
        write_lines(folder / name, {"image": "a.png", "caption": name})


def read_captions(source: Path) -> list[str]:
    return [record.short[0] for record in read_records(source)]


def test_patterns_name_the_files_of_one_data_set(tmp_path: Path) -> None:
    write_shards(tmp_path, "s-08.jsonl", "s-09.jsonl", "s-10.jsonl", "t.jsonl")
    shards = ["s-08.jsonl", "s-09.jsonl", "s-10.jsonl"]
    assert read_captions(tmp_path / "s-*.jsonl") == shards
    assert read_captions(tmp_path / "s-{08..10}.jsonl") == shards
    assert read_captions(tmp_path / "s-{10..08}.jsonl") == shards[::-1]
    assert read_captions(tmp_path / "{t,s-0[89]}.jsonl") == ["t.jsonl", *shards[:2]]
    assert read_captions(tmp_path / "**" / "s-1?.jsonl") == shards[2:]


def test_images_of_a_pattern_start_from_the_folder_of_each_file(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_shards(tmp_path / name, "x.jsonl")
    first, second = read_records(tmp_path / "*" / "x.jsonl")
    assert second.image == ImageRef(path=tmp_path / "b" / "a.png")
    assert (first.id, second.id) == ("a/x.jsonl:1", "b/x.jsonl:1"), "ids are distinct"


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("z*.jsonl", "no file matches"),
        ("s-{1..3}.jsonl", "no file '.*s-2.jsonl'"),
        ("*", "several kinds: .csv, .jsonl"),
        ("{0..99999999}.tar", "more than 100,000 files"),
        ("s-1.{jsonl,xyz}", r"does not end in '.xyz'"),
    ],
)
def test_a_pattern_that_is_no_data_set_is_an_error(
    pattern: str, message: str, tmp_path: Path
) -> None:
    write_shards(tmp_path, "s-1.jsonl", "s-3.jsonl")
    for name in ("t.csv", "s-1.xyz"):
        if not pattern.startswith("*") or name == "t.csv":
            (tmp_path / name).write_text("image,caption\n")
    with pytest.raises(DataError, match=message):
        read_records(tmp_path / pattern)


def test_a_file_whose_name_looks_like_a_pattern_is_read_itself(tmp_path: Path) -> None:
    write_shards(tmp_path, "s[1].jsonl", "s1.jsonl")
    assert read_captions(tmp_path / "s[1].jsonl") == ["s[1].jsonl"]


def test_an_output_must_not_match_the_pattern_of_its_source(tmp_path: Path) -> None:
    write_shards(tmp_path, "a.jsonl", "b.jsonl")
    with pytest.raises(DataError, match="is there already"):
        check_output_path(tmp_path / "a.jsonl", tmp_path / "*.jsonl")
    check_output_path(tmp_path / "c.jsonl", tmp_path / "*.jsonl")
