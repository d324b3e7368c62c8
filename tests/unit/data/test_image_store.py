"""Images that are bytes in memory become files; all references stay where they are."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest

from helpers.record_files import PNG
from vlduet.data import images
from vlduet.data.image_store import ImageStore
from vlduet.data.records import ByteRange, ImageRef, Message, Record
from vlduet.errors import DataError

DATA = ImageRef(data=PNG)


def test_bytes_become_files_and_other_images_stay(tmp_path: Path) -> None:
    span = ByteRange(tmp_path / "x.tar", 0, 1, "x.tar:a.png", (1, 1))
    references = (ImageRef(path=tmp_path / "a.png"), ImageRef(byte_range=span))
    record = Record("a", messages=(Message("user", ("Look.", DATA, *references, DATA)),))
    store = ImageStore(tmp_path / "deep" / "images")
    moved = store.write_images(record)
    first, *same, last = moved.images()
    assert same == list(references) and first == last and first.path is not None
    assert first.path.parent == tmp_path / "deep" / "images" and images.read_bytes(first) == PNG
    assert store.num_bytes == 2 * len(PNG) and moved.messages[0].parts[0] == "Look."
    store.close()
    assert first.path.exists()


def test_a_complete_file_is_not_replaced_and_an_empty_file_is(tmp_path: Path) -> None:
    ref = images.write_image_file(DATA, tmp_path)
    assert ref.path is not None
    ref.path.chmod(0o444)
    before = ref.path.stat()
    assert images.write_image_file(DATA, tmp_path) == ref
    assert ref.path.stat().st_ino == before.st_ino
    ref.path.chmod(0o644)
    ref.path.write_bytes(b"")
    assert images.read_bytes(images.write_image_file(DATA, tmp_path)) == PNG
    assert [path.name for path in tmp_path.iterdir()] == [ref.path.name]


@pytest.mark.parametrize("content", [bytes(len(PNG)), PNG[:-1], PNG[:-1] + b"x", PNG + b"x"])
def test_a_damaged_file_is_replaced(content: bytes, tmp_path: Path) -> None:
    """The right size is no proof: a full disk or a power failure may leave zeros."""
    path = images.write_image_file(DATA, tmp_path).path
    assert path is not None
    path.write_bytes(content)
    assert images.read_bytes(images.write_image_file(DATA, tmp_path)) == PNG


@pytest.mark.parametrize("is_closed", [True, False])
def test_temporary_files_are_deleted_with_the_store(is_closed: bool) -> None:
    store = ImageStore(None)
    store.close()
    path = store.write_images(Record("a", image=DATA)).images()[0].path
    assert path is not None and path.read_bytes() == PNG
    if is_closed:
        store.close()
    del store
    gc.collect()
    assert not path.parent.exists()


def test_a_file_in_place_of_the_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write an image"):
        ImageStore(tmp_path / "file" / "images").write_images(Record("a", image=DATA))
