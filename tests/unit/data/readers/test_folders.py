"""Folders: splits are named, tables beside images are read, and what is not read is counted."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from helpers.record_files import (
    PNG,
    read_error,
    read_single,
    read_with_errors,
    read_with_ignored,
    write_lines,
)
from vlduet.data.formats import read_records


def write_files(folder: Path, *names: str, text: str | None = None) -> None:
    """Write files below a folder: images, or the same text into all."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(PNG if text is None else text.encode())


def read_captions(source: Path) -> dict[str, tuple[str, ...]]:
    """Return the short captions by the path of the image below the source."""
    captions = {}
    for record in read_records(source):
        assert record.image is not None and record.image.path is not None
        captions[record.image.path.relative_to(source).as_posix()] = record.short
    return captions


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


# --- splits


@pytest.mark.parametrize(
    ("train", "test"),
    [("train/a.png", "test/b.png"), ("img/train2017/a.png", "img/val2017/b.png")],
)
def test_splits_are_named_and_each_can_be_read_alone(train: str, test: str, tmp_path: Path) -> None:
    write_files(tmp_path, train, test)
    splits = [(tmp_path / name).parent for name in (train, test)]
    for folder in splits:
        write_lines(folder / "metadata.jsonl", {"file_name": "a.png", "text": folder.name})
    error = str(read_error(tmp_path))
    assert "several splits in one folder" in error and all(str(s) in error for s in splits)
    assert read_captions(splits[0]) == {"a.png": (splits[0].name,)}


def test_a_table_above_the_splits_decides_itself(tmp_path: Path) -> None:
    write_files(tmp_path, "train/a.png", "test/b.png")
    write_files(tmp_path, "metadata.csv", text="file_name,text\ntrain/a.png,x\n")
    records, ignored = read_with_ignored(tmp_path)
    assert len(records) == 1
    assert ignored == [f"1 image that {tmp_path / 'metadata.csv'} does not list"]


# --- tables beside images

TABLES = {
    "metadata.csv": "file_name,text\nimages/a.png,one\n",
    "captions.csv": "file_name;caption\nimages/a.png;one\n",
    "labels.tsv": "path\tdescription_en\nimages/a.png\tone\n",
    "captions.txt": "image,caption\nimages/a.png,one\n",
    "captions.json": '{"images/a.png": "one"}',
    "list.json": '[{"image": "images/a.png", "caption": "one"}]',
    "any.jsonl": '{"image_file_name": "images/a.png", "caption": "one"}',
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_in_a_folder_of_images_is_read_and_other_files_are_counted(
    name: str, tmp_path: Path
) -> None:
    write_files(tmp_path, "images/a.png", "images/b.png")
    write_files(tmp_path, name, text=TABLES[name])
    write_files(tmp_path, "README.md", "LICENSE", "doc.pdf", "config.json", text="{}")
    (record,), ignored = read_with_ignored(tmp_path)
    assert [*record.short, record.long] in (["one", None], ["one"]) or record.long == "one"
    assert sorted(ignored) == [
        "1 file is not read: 1 .pdf (doc.pdf)",
        f"1 image that {tmp_path / name} does not list",
        f"the file {tmp_path / 'config.json'} is not read",
    ]


def test_two_tables_in_a_folder_of_images_are_named(tmp_path: Path) -> None:
    write_files(tmp_path, "a.png")
    write_files(tmp_path, "captions.csv", "more.csv", text="image,caption\na.png,x\n")
    assert "captions.csv" in str(read_error(tmp_path)) and "more.csv" in str(read_error(tmp_path))
    write_files(tmp_path, "metadata.csv", text="file_name,text\na.png,y\n")
    (record,), ignored = read_with_ignored(tmp_path)
    assert record.short == ("y",) and len(ignored) == 2, "a metadata file precedes others"


def test_a_broken_table_in_a_folder_of_images_is_an_error(tmp_path: Path) -> None:
    write_files(tmp_path, "a.png")
    write_files(tmp_path, "captions.csv", text="image,image\na.png,x\n")
    assert "a column twice" in str(read_error(tmp_path))


def test_metadata_of_subfolders_has_ids_of_its_own(tmp_path: Path) -> None:
    write_files(tmp_path, "x/a.png", "y/a.png", "y/deep/b.png", "c.png")
    write_files(tmp_path, "c.txt", text="see")
    write_files(tmp_path, "x/metadata.csv", "y/metadata.csv", text="file_name,text\na.png,z\n")
    records, ignored = read_with_ignored(tmp_path)
    assert [record.id for record in records] == ["c.png", "x/metadata.csv:2", "y/metadata.csv:2"]
    assert ignored == [f"1 image that {tmp_path / 'y' / 'metadata.csv'} does not list"]


def test_files_with_the_name_of_an_image_hold_its_captions_and_columns(tmp_path: Path) -> None:
    write_files(tmp_path, "00000/0.jpg", "00000/1.png")
    value = {"caption": "one", "url": "http://a", "width": 4}
    write_files(tmp_path, "00000/0.json", text=json.dumps(value))
    write_files(tmp_path, "00000/0.txt", "00000/1.caption", text="one\n")
    write_files(tmp_path, "00000_stats.json", "00000.parquet", text="x")
    (first, second), ignored = read_with_ignored(tmp_path)
    assert first.short == ("one",) == second.short and ignored == []
    assert first.metadata == {"url": "http://a", "width": 4}
    write_files(tmp_path, "00000/0.json", text="[1")
    (record,), (error,) = read_with_errors(tmp_path)
    assert record.id == "00000/1.png" and "broken JSON" in str(error)


def test_photos_that_cannot_be_read_and_texts_without_an_image_are_counted(tmp_path: Path) -> None:
    write_files(tmp_path, "a.png", "b.HEIC", "deep/c.heic")
    write_files(tmp_path, "d.mp4", "lost.txt", text="a caption")
    os.symlink(tmp_path / "deep", tmp_path / "link")
    records, ignored = read_with_ignored(tmp_path)
    assert [record.id for record in records] == ["a.png", "b.HEIC", "deep/c.heic"]
    assert sorted(ignored) == [
        "1 file is not read: 1 .mp4 (d.mp4)",
        f"1 linked folder, not followed: {tmp_path / 'link'}",
        f"the file {tmp_path / 'lost.txt'} is not read",
    ]


def test_a_linked_image_is_read(tmp_path: Path) -> None:
    write_files(tmp_path, "elsewhere/a.png")
    (tmp_path / "photos").mkdir()
    os.symlink(tmp_path / "elsewhere" / "a.png", tmp_path / "photos" / "b.png")
    assert read_single(tmp_path / "photos").id == "b.png"


def test_files_of_records_in_subfolders_are_named(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write_lines(tmp_path / "data" / "x.jsonl", {"image": "a.png", "caption": "x"})
    assert str(tmp_path / "data" / "x.jsonl") in str(read_error(tmp_path))


def test_the_root_holds_for_the_images_of_a_folder_s_table(tmp_path: Path) -> None:
    write_files(tmp_path, "shop/photos/a.png")
    write_files(tmp_path, "shop/products.csv", text="filename,caption\na.png,x\n")
    (record,), ignored = read_with_ignored(tmp_path / "shop", root=tmp_path / "shop" / "photos")
    assert record.image is not None and record.image.path is not None
    assert record.image.path.is_file() and ignored == []
