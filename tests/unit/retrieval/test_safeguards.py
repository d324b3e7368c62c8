"""Nothing is pruned that may only be unseen: unreadable, not mounted, or behind a link."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers.fake_embedder import paint, write_records
from vlduet.data import images
from vlduet.data.records import ImageRef
from vlduet.errors import ImageError, RetrievalError
from vlduet.retrieval.build import BuildOptions, build_index
from vlduet.retrieval.index import Index


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Return a folder of eight images: four directly in it, and four in two levels below."""
    folder = tmp_path / "photos"
    for i in range(4):
        paint(folder / f"{i}.png", (i, 0, 0))
        paint(folder / "disk" / f"{i % 2}" / f"{i}.png", (0, i, 0))
    return folder


def delete_image(photos: Path) -> None:
    (photos / "0.png").unlink()


def empty_an_image(photos: Path) -> None:
    delete_image(photos)
    (photos / "1.png").write_bytes(b"")


def cut_an_image(photos: Path) -> None:
    delete_image(photos)
    (photos / "1.png").write_bytes((photos / "1.png").read_bytes()[:40])


def break_a_link(photos: Path) -> None:
    delete_image(photos)
    (photos / "1.png").unlink()
    os.symlink("/nowhere/1.png", photos / "1.png")


def break_the_file_of_captions(photos: Path) -> None:
    delete_image(photos)
    (photos / "1.txt").write_bytes(b"\xff\xfe")


UNREADABLE = [empty_an_image, cut_an_image, break_a_link, break_the_file_of_captions]


@pytest.mark.parametrize("change", UNREADABLE)
@pytest.mark.parametrize("force", [False, True])
def test_what_cannot_be_read_prevents_pruning(
    photos: Path, tmp_path: Path, model: Any, change: Callable[[Path], None], force: bool
) -> None:
    to = tmp_path / "index"
    build_index(model, photos, to=to)
    change(photos)
    options = BuildOptions(force=force)
    match = r"1 files or records cannot be read, so nothing is pruned.*quarantine\.jsonl"
    with pytest.raises(RetrievalError, match=match):
        build_index(model, photos, to=to, prune=True, options=options)
    with Index.open(to) as index:
        assert index.count() == 8 and index.manifest.complete


def test_an_image_without_permission_prevents_pruning(
    photos: Path, tmp_path: Path, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_index(model, photos, to=tmp_path / "index")
    delete_image(photos)
    read_bytes = images.read_bytes

    def refuse(ref: ImageRef) -> bytes:
        if ref.path == photos / "1.png":
            raise ImageError("cannot read the image (Permission denied)", place=ref.name)
        return read_bytes(ref)

    monkeypatch.setattr(images, "read_bytes", refuse)
    with pytest.raises(RetrievalError, match="nothing is pruned"):
        build_index(model, photos, to=tmp_path / "index", prune=True)
    report = build_index(model, photos, to=tmp_path / "index")
    assert (report.kept, report.outdated, report.absent, report.count) == (6, 1, 1, 8)


def test_most_documents_are_pruned_by_force_only(photos: Path, tmp_path: Path, model: Any) -> None:
    to = tmp_path / "index"
    build_index(model, photos, to=to)
    shutil.rmtree(photos / "disk")
    assert build_index(model, photos, to=to, prune=True).removed == 4, "exactly half is there"
    for i in range(1, 4):
        (photos / f"{i}.png").unlink()
    with pytest.raises(RetrievalError, match=r"only 1 of 4 indexed documents.*--force"):
        build_index(model, photos, to=to, prune=True)
    report = build_index(model, photos, to=to, prune=True, options=BuildOptions(force=True))
    assert (report.removed, report.count) == (3, 1)


def test_new_documents_do_not_stand_in_for_absent_ones(
    photos: Path, tmp_path: Path, model: Any
) -> None:
    build_index(model, photos, to=tmp_path / "index")
    shutil.rmtree(photos)
    for i in range(20):
        paint(photos / f"new{i}.png", (0, 0, i))
    with pytest.raises(RetrievalError, match="only 0 of 8 indexed documents"):
        build_index(model, photos, to=tmp_path / "index", prune=True)


def test_a_folder_that_is_empty_may_be_a_drive(photos: Path, tmp_path: Path, model: Any) -> None:
    to = tmp_path / "index"
    build_index(model, photos, to=to)
    for name in ("0", "1"):
        shutil.rmtree(photos / "disk" / name)
    with pytest.raises(RetrievalError, match=r"the folder .*disk, of which 4 documents"):
        build_index(model, photos, to=to, prune=True)
    (photos / "disk").rmdir()
    assert build_index(model, photos, to=to, prune=True).removed == 4


def test_an_empty_source_removes_nothing(photos: Path, tmp_path: Path, model: Any) -> None:
    build_index(model, photos, to=tmp_path / "index")
    shutil.rmtree(photos)
    for folder in (photos, photos / "disk"):
        with pytest.raises(Exception, match=r"no such file|neither images nor records"):
            build_index(
                model, photos, to=tmp_path / "index", prune=True, options=BuildOptions(force=True)
            )
        folder.mkdir(parents=True)
    assert Index.open(tmp_path / "index").count() == 8


def test_documents_behind_a_new_link_are_not_pruned(
    photos: Path, tmp_path: Path, model: Any
) -> None:
    to = tmp_path / "index"
    build_index(model, photos, to=to)
    (photos / "disk").rename(tmp_path / "elsewhere")
    os.symlink("../elsewhere", photos / "disk")
    options = BuildOptions(force=True)
    with pytest.raises(RetrievalError, match=r"'disk/0/0.png' lies in a linked folder"):
        build_index(model, photos, to=to, prune=True, options=options)
    report = build_index(model, photos, to=to)
    assert report.unread == {"linked folder": 1} and report.absent == 4


def test_records_without_images_are_pruned_and_long_texts_are_not(
    tmp_path: Path, model: Any
) -> None:
    """A record that still exists without what is embedded is absent; nothing was unreadable."""
    rows = [{"id": str(i), "parts": [{"text": f"word{i}"}]} for i in range(4)]
    source, to = write_records(tmp_path / "r.jsonl", rows), tmp_path / "index"
    build_index(model, source, to=to, side="text")
    paint(tmp_path / "a.png", (0, 0, 0))
    rows[0] = {"id": "0", "parts": [{"image": "a.png"}]}
    write_records(source, rows)
    report = build_index(model, source, to=to, prune=True)
    assert (report.removed, report.kept, report.quarantined) == (1, 3, 1)


def test_file_of_records_updates_the_metadata_of_equal_documents(
    tmp_path: Path, model: Any
) -> None:
    to = tmp_path / "index"
    row = {"id": "same", "parts": [{"text": "red"}]}
    write_records(tmp_path / "a.jsonl", [row])
    build_index(model, tmp_path / "a.jsonl", to=to, side="record")
    rows = [row | {"metadata": {"hue": "red"}}, {"id": "new", "parts": [{"text": "blue"}]}]
    write_records(tmp_path / "b.jsonl", rows)
    report = build_index(model, tmp_path / "b.jsonl", to=to, side="record")
    assert (report.count, report.embedded, report.updated) == (2, 1, 1)
    write_records(tmp_path / "c.jsonl", [row | {"parts": [{"text": "green"}]}])
    with pytest.raises(RetrievalError, match="nothing was changed"):
        build_index(model, tmp_path / "c.jsonl", to=to, side="record")
