"""Unchanged image files are read once, and documents stay with the source that they came from."""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers.fake_embedder import COLOURS, paint, write_pairs, write_records
from vlduet.data import images
from vlduet.data.records import ImageRef
from vlduet.errors import RetrievalError
from vlduet.retrieval.build import BuildOptions, BuildReport, build_index
from vlduet.retrieval.index import Index
from vlduet.retrieval.search import search
from vlduet.retrieval.source_state import STATE_FILENAME, name_source


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that gets the name of every image file whose bytes are read."""
    names: list[str] = []
    read_bytes = images.read_bytes

    def count(ref: ImageRef) -> bytes:
        names.append(Path(ref.name).name)
        return read_bytes(ref)

    monkeypatch.setattr(images, "read_bytes", count)
    return names


def age(folder: Path, seconds: float = 100) -> None:
    """Set the modification time of all files back."""
    for path in folder.rglob("*"):
        status = path.stat()
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns - int(seconds * 1e9)))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    for name, colour in COLOURS.items():
        paint(folder / f"{name}.png", colour)
    age(folder)
    return folder


def test_unchanged_files_are_not_read_again(
    photos: Path, tmp_path: Path, model: Any, reads: list[str]
) -> None:
    def build(**options: Any) -> BuildReport:
        reads.clear()
        return build_index(model, photos, to=tmp_path / "index", options=BuildOptions(**options))

    assert build().added == 4 and {*reads} == {f"{name}.png" for name in COLOURS}
    assert build().kept == 4 and reads == []
    assert build(rehash=True).kept == 4 and len(reads) == 4
    paint(photos / "red.png", (9, 9, 9))
    assert build().updated == 1 and {*reads} == {"red.png"}
    assert build().kept == 4 and reads == ["red.png"], (
        "it was read within two seconds of its change"
    )
    age(photos)
    assert build().kept == 4 and len(reads) == 4, "all modification times have changed"
    (photos / "blue.png").rename(photos / "old")
    shutil.copy2(photos / "old", photos / "blue.png")
    (photos / "old").unlink()
    assert build().kept == 4 and reads == ["blue.png"], "the inode has changed"


def test_images_of_records_are_not_read_again(tmp_path: Path, model: Any, reads: list[str]) -> None:
    source = write_pairs(tmp_path / "source")
    age(source.parent)
    build_index(model, source, to=tmp_path / "index", side="record")
    reads.clear()
    assert build_index(model, source, to=tmp_path / "index").kept == 4 and reads == []
    (source.parent / "images" / "red.png").unlink()
    report = build_index(model, source, to=tmp_path / "index")
    assert report.outdated == 1 and report.causes == {"no such image": 1}


def test_versions_of_missing_files_are_forgotten_by_prune(
    photos: Path, tmp_path: Path, model: Any
) -> None:
    build_index(model, photos, to=tmp_path / "index")
    (photos / "red.png").unlink()
    build_index(model, photos, to=tmp_path / "index", prune=True)
    with sqlite3.connect(tmp_path / "index" / STATE_FILENAME) as database:
        assert database.execute("SELECT count(*) FROM images").fetchone() == (3,)
        assert database.execute("SELECT count(*) FROM documents").fetchone() == (3,)


# --- several sources


def copy_with_another_content(folder: Path, to: Path) -> Path:
    """Write images of the same names and of other colours."""
    for i, path in enumerate(sorted(folder.iterdir())):
        paint(to / path.name, (i, 0, 0))
    return to


Change = Callable[[Path, Path], object]


@pytest.mark.parametrize("change", [shutil.copytree, copy_with_another_content])
def test_another_source_with_equal_names_is_refused_and_changes_nothing(
    photos: Path, tmp_path: Path, model: Any, change: Change
) -> None:
    other, to = tmp_path / "other", tmp_path / "index"
    build_index(model, photos, to=to)
    change(photos, other)
    paint(other / "new.png", (5, 5, 5))
    with pytest.raises(RetrievalError, match=r"4 documents have the id.*photos.*--force"):
        build_index(model, other, to=to)
    with Index.open(to, model) as index:
        assert index.manifest.complete and index.manifest.source == str(photos)
        hits = search(index, model, "red", k=9)
        assert len(hits) == 4 and hits[0].image == ImageRef(path=photos / "red.png")
    assert build_index(model, photos, to=to).kept == 4
    report = build_index(model, other, to=to, options=BuildOptions(force=True))
    assert (report.updated, report.added, report.other_sources) == (4, 1, 0)


def test_sources_with_other_ids_keep_their_documents(
    photos: Path, tmp_path: Path, model: Any
) -> None:
    to, more = tmp_path / "index", tmp_path / "more"
    paint(more / "black.png", (0, 0, 0))
    paint(more / "white.png", (255, 255, 255))
    build_index(model, photos, to=to)
    report = build_index(model, more, to=to, prune=True)
    assert (report.added, report.absent, report.removed, report.other_sources) == (2, 0, 0, 4)
    (more / "white.png").unlink()
    report = build_index(model, more, to=to, prune=True)
    assert (report.removed, report.count) == (1, 5)
    report = build_index(model, photos, to=to, prune=True)
    assert (report.kept, report.removed, report.other_sources) == (4, 0, 1)


def test_a_source_at_a_new_path_keeps_its_documents(
    photos: Path, tmp_path: Path, model: Any
) -> None:
    to = tmp_path / "index"
    build_index(model, photos, to=to)
    moved = photos.rename(tmp_path / "moved")
    paint(moved / "new.png", (5, 5, 5))
    (moved / "red.png").unlink()
    report = build_index(model, moved, to=to, prune=True)
    assert (report.added, report.updated, report.removed, report.embedded) == (1, 3, 1, 1)
    assert report.other_sources == 0
    again = moved.rename(tmp_path / "again")
    paint(again / "blue.png", (7, 7, 7))
    with pytest.raises(RetrievalError, match=r"1 of them another content.*moved here, add --force"):
        build_index(model, again, to=to)
    report = build_index(model, again, to=to, options=BuildOptions(force=True))
    assert (report.updated, report.other_sources) == (4, 0)


def test_a_source_at_a_new_path_with_its_index_is_the_same(
    photos: Path, tmp_path: Path, model: Any
) -> None:
    (tmp_path / "project").mkdir()
    photos = photos.rename(tmp_path / "project" / "photos")
    build_index(model, photos, to=tmp_path / "project" / "index")
    (tmp_path / "project").rename(tmp_path / "moved")
    paint(tmp_path / "moved" / "photos" / "blue.png", (7, 7, 7))
    report = build_index(model, tmp_path / "moved" / "photos", to=tmp_path / "moved" / "index")
    assert (report.updated, report.other_sources, report.embedded) == (4, 0, 1)


def test_a_copy_of_an_index_and_its_source_is_updated_without_the_originals(
    photos: Path, tmp_path: Path, model: Any
) -> None:
    original, copy = tmp_path / "original", tmp_path / "copy"
    original.mkdir()
    build_index(model, photos.rename(original / "photos"), to=original / "index")
    shutil.copytree(original, copy)
    with pytest.raises(RetrievalError, match="4 documents have the id"):
        build_index(model, copy / "photos", to=copy / "index")
    shutil.rmtree(original)
    for num_updated in (4, 0):
        report = build_index(model, copy / "photos", to=copy / "index")
        assert (report.updated, report.count, report.other_sources) == (num_updated, 4, 0)
    assert report.embedded == 0


def test_an_index_of_an_earlier_version_remembers_its_last_source(
    photos: Path, tmp_path: Path, model: Any
) -> None:
    other = copy_with_another_content(photos, tmp_path / "other")
    build_index(model, photos, to=tmp_path / "index")
    (tmp_path / "index" / STATE_FILENAME).unlink()
    with pytest.raises(RetrievalError, match="4 documents have the id"):
        build_index(model, other, to=tmp_path / "index")
    assert build_index(model, photos, to=tmp_path / "index").kept == 4


def test_records_of_another_file_with_equal_ids_are_refused(tmp_path: Path, model: Any) -> None:
    rows = [{"id": str(i), "parts": [{"text": f"word{i}"}]} for i in range(3)]
    first = write_records(tmp_path / "a.jsonl", rows)
    second = write_records(tmp_path / "b.jsonl", [{"id": "2", "parts": [{"text": "other"}]}])
    build_index(model, first, to=tmp_path / "index", side="text")
    with pytest.raises(RetrievalError, match="a document has the id of a document of"):
        build_index(model, second, to=tmp_path / "index")
    write_records(second, [{"id": "3", "parts": [{"text": "other"}]}])
    report = build_index(model, second, to=tmp_path / "index")
    assert (report.added, report.absent, report.other_sources) == (1, 0, 3)


def test_revisions_of_a_data_set_on_the_hub_are_one_source(tmp_path: Path) -> None:
    cache = tmp_path / "datasets--org--name" / "snapshots"
    names = {name_source(cache / commit) for commit in ("0" * 40, "1" * 40)}
    assert len(names) == 1 and names != {name_source(tmp_path)}


@pytest.mark.parametrize("damage", [b"no database" * 99, b""])
def test_a_broken_file_is_an_error_with_a_remedy_or_empty(
    photos: Path, tmp_path: Path, model: Any, damage: bytes
) -> None:
    build_index(model, photos, to=tmp_path / "index")
    (tmp_path / "index" / STATE_FILENAME).write_bytes(damage)
    if damage:
        message = r"sources\.sqlite: cannot be used.*Delete this file.*without --prune"
        with pytest.raises(RetrievalError, match=message):
            build_index(model, photos, to=tmp_path / "index")
        (tmp_path / "index" / STATE_FILENAME).unlink()
    assert build_index(model, photos, to=tmp_path / "index").kept == 4
