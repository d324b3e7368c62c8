"""Links, thumbnails and other items of a folder that are no data are left out and counted."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from helpers.record_files import PNG, read_with_errors, read_with_ignored
from vlduet.data import image_formats
from vlduet.data.formats import append_unlisted_images, read_records
from vlduet.data.readers import folder_scan
from vlduet.data.readers.rows import IgnoredData
from vlduet.data.sources import RecordSource
from vlduet.errors import DataError

SYSTEM_FOLDERS = (
    "@eaDir", "#recycle", "$RECYCLE.BIN", ".Trash-1000", ".Trashes", "lost+found", "@Recycle",
    ".@__thumb", "System Volume Information", "__MACOSX", "RECYCLER", "#snapshot", "FOUND.000",
    "Previews.lrdata", ".thumbnails", ".dtrash", ".picasaoriginals",
)  # fmt: skip
SYSTEM_FILES = ("Thumbs.db", "ehthumbs.db", "desktop.ini", ".DS_Store", "._a.png", ".picasa.ini")


def write_images(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(PNG)


def read_ids(folder: Path) -> list[str]:
    return [record.id for record in read_records(folder)]


@pytest.mark.parametrize("name", SYSTEM_FOLDERS)
def test_thumbnails_and_recycle_bins_are_left_out_and_counted(tmp_path: Path, name: str) -> None:
    write_images(tmp_path, "a.png", f"{name}/b.png", f"deep/{name}/x/c.png", "deep/d.png")
    ignored = IgnoredData()
    records = list(read_records(tmp_path, ignored=ignored))
    assert [record.id for record in records] == ["a.png", "deep/d.png"]
    assert ignored.count_system_files() == {name: 2} and not ignored.count_files()
    assert f"{name} (2)" in ignored.describe_system_files()[0]
    assert not ignored, "a strict source may have them"


def test_files_of_a_system_are_left_out_and_counted(tmp_path: Path) -> None:
    write_images(tmp_path, "a.png", *SYSTEM_FILES)
    ignored = IgnoredData()
    assert len(list(read_records(tmp_path, ignored=ignored))) == 1
    counts = dict.fromkeys(SYSTEM_FILES, 1)
    counts["._*"] = counts.pop("._a.png")
    assert ignored.count_system_files() == counts


def test_similar_names_are_read(tmp_path: Path) -> None:
    names = ["recycled bottles/a.png", "lost and found/b.png", "thumbnails/c.png", "#1/d.png"]
    write_images(tmp_path, *names, "x.jpg/e.png", "ümläut ☃ \"'.PNG", " .png")
    assert sorted(read_ids(tmp_path)) == sorted(
        [*names, "x.jpg/e.png", "ümläut ☃ \"'.PNG", " .png"]
    )


def test_a_source_with_such_a_name_is_read(tmp_path: Path) -> None:
    write_images(tmp_path, "#recycle/a.png")
    assert read_ids(tmp_path / "#recycle") == ["a.png"]


def test_links_and_pipes_are_reported_and_end_no_reading(tmp_path: Path) -> None:
    write_images(tmp_path, "lib/a.png", "elsewhere/b.png")
    lib = tmp_path / "lib"
    os.symlink("../elsewhere", lib / "more.jpg")
    os.symlink(".", lib / "cycle")
    os.symlink("gone", lib / "nothing")
    os.symlink("gone.png", lib / "photo.png")
    os.symlink("../elsewhere/b.png", lib / "linked.png")
    os.mkfifo(lib / "pipe.png")
    ignored = IgnoredData()
    records = list(read_records(lib, ignored=ignored))
    assert [record.id for record in records] == ["a.png", "linked.png", "photo.png"]
    assert ignored.count_files() == {"linked folder": 2, "broken link": 1, "special file": 1}
    sentences = ignored.describe_files()
    assert f"2 linked folders, not followed: {lib / 'cycle'}, {lib / 'more.jpg'}" in sentences
    assert f"1 link without a target, not read: {lib / 'nothing'}" in sentences
    assert f"1 pipe, socket or device, not read: {lib / 'pipe.png'}" in sentences


def test_other_files_are_counted_by_their_endings_with_examples(tmp_path: Path) -> None:
    write_images(tmp_path, "a.png")
    for name in ("1.MOV", "2.mov", "3.mov", "4.mov", "b.dng", "noise"):
        (tmp_path / name).write_bytes(b"II*\0" if name == "b.dng" else b"?")
    _, messages = read_with_ignored(tmp_path)
    assert messages == [
        "6 files are not read: 4 .mov (1.MOV, 2.mov, 3.mov, ...), 1 .dng (b.dng), "
        "1 without an ending (noise)"
    ]
    with pytest.raises(DataError, match="6 files are not read"):
        list(RecordSource(tmp_path, strict=True).read())


def test_a_heic_without_the_extra_is_an_error_with_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images(tmp_path, "a.png", "wrong.heic")
    (tmp_path / "b.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    monkeypatch.setattr(image_formats, "can_decode_heic", lambda: False)
    records, (error,) = read_with_errors(tmp_path)
    assert [record.id for record in records] == ["a.png", "wrong.heic"]
    assert error.place == str(tmp_path / "b.HEIC") and 'pip install "vlduet[heic]"' in str(error)


def test_a_folder_that_cannot_be_read_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images(tmp_path, "a.png", "locked/b.png")
    scan = folder_scan.scan_folder

    def scan_unless_locked(folder: Path, ignored: IgnoredData) -> Any:
        if folder.name == "locked":
            raise PermissionError(13, "Permission denied")
        return scan(folder, ignored)

    monkeypatch.setattr("vlduet.data.readers.folders.scan_folder", scan_unless_locked)
    monkeypatch.setattr(folder_scan, "scan_folder", scan_unless_locked)
    (record,), (error,) = read_with_errors(tmp_path)
    assert record.id == "a.png" and "cannot be read (Permission denied)" in str(error)
    errors: list[DataError] = []
    unlisted = list(append_unlisted_images([], tmp_path, on_error=errors.append))
    assert [record.id for record in unlisted] == ["a.png"]
    assert "cannot be read (Permission denied)" in str(errors[0])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_without_permission_leaves_the_others_readable(tmp_path: Path) -> None:
    write_images(tmp_path, "a.png", "locked/b.png")
    (tmp_path / "locked").chmod(0)
    (record,), (error,) = read_with_errors(tmp_path)
    (tmp_path / "locked").chmod(0o700)
    assert record.id == "a.png" and "Permission denied" in str(error)


def test_an_index_in_the_source_is_left_out(tmp_path: Path) -> None:
    write_images(tmp_path, "a.png", "ix/images/0123456789abcdef")
    (tmp_path / "ix" / "store" / "rows.lance").mkdir(parents=True)
    ignored = IgnoredData()
    assert [record.id for record in read_records(tmp_path, ignored=ignored)] == ["a.png"]
    assert ignored.count_system_files() == {"ix (an index)": 1}


def test_an_entry_whose_kind_is_unknown_is_read_as_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images(tmp_path, "a.png")

    class Entry:
        name = "b.png"

        def is_dir(self) -> bool:
            raise PermissionError(13, "Permission denied")

    assert folder_scan._find_kind(Entry()) == "file"  # type: ignore[arg-type]
