"""The default model was made of nothing that anything else trains on or tests with.

Compared are the lists in ``experiments/nano/lists``, which are committed; nothing is downloaded.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from helpers.small_corpora import write_noise_png
from vlduet.data import images
from vlduet.data.records import ImageRef, Record

EXPERIMENT = Path(__file__).parents[3] / "experiments/nano"


@pytest.fixture
def lists(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Module of the experiment that reads, writes and compares lists."""
    monkeypatch.syspath_prepend(str(EXPERIMENT))
    monkeypatch.delitem(sys.modules, "lists", raising=False)
    return __import__("lists")


def write_list(
    lists: ModuleType, folder: Path, *, seeds: range, texts: tuple[str, ...]
) -> tuple[Path, list[ImageRef]]:
    """Write a list of noise images with these seeds; return its path and the image files."""
    refs = []
    for seed in seeds:
        path = folder / f"images/{seed}.png"
        write_noise_png(path, seed)
        refs.append(ImageRef(path=path))
    lists.write_item_list(folder / "list", refs, texts)
    return folder / "list", refs


def test_the_base_has_nothing_in_common_with_what_is_trained_on_or_tested(lists: Any) -> None:
    base = lists.read_item_list(lists.BASE)
    evaluated = lists.load_evaluated_list()
    assert len(base.file_hashes) > 1000 and len(base.captions) > 1000
    assert len(evaluated.file_hashes) > 10_000 and len(evaluated.captions) > 10_000
    assert lists.find_overlaps(base, evaluated) == []


def test_a_caption_of_a_stamp_in_the_base_is_noticed(lists: Any) -> None:
    evaluated = lists.load_evaluated_list()
    assert {"crowned crane", "face with peeking eye"} <= evaluated.captions
    planted = lists.ItemList(frozenset(), [], frozenset({"crowned crane", "no such text"}))
    assert lists.find_overlaps(planted, evaluated) == ["the text 'crowned crane' is in both lists"]


def test_an_equal_and_a_nearly_equal_image_are_noticed(lists: Any, tmp_path: Path) -> None:
    path, refs = write_list(lists, tmp_path / "a", seeds=range(6), texts=("A fox.",))
    evaluated = lists.read_item_list(path)
    copies = tmp_path / "b/images"
    copies.mkdir(parents=True)
    shutil.copy(refs[2].path or "", copies / "copy.png")
    pixels = images.to_pixels(images.load_image(refs[4])).copy()
    pixels[:4] = 255 - pixels[:4]
    near = images.encode_png(images.from_pixels(pixels))
    (copies / "near.png").write_bytes(near)
    write_noise_png(copies / "other.png", 99)
    base_refs = [ImageRef(path=copies / name) for name in ("copy.png", "near.png", "other.png")]
    lists.write_item_list(tmp_path / "b/list", base_refs, ["a dog"])
    overlaps = lists.find_overlaps(lists.read_item_list(tmp_path / "b/list"), evaluated)
    num_equal_files = sum(line.startswith("the image file") for line in overlaps)
    assert (num_equal_files, len(overlaps)) == (1, 3), overlaps


def test_a_list_is_read_back_unchanged(lists: Any, tmp_path: Path) -> None:
    texts = ("The Red Fox!", "a red fox", "", "An", "Blue\nboat")
    path, refs = write_list(lists, tmp_path, seeds=range(3), texts=texts)
    files = {file.name: file.read_bytes() for file in tmp_path.glob("list.*")}
    items = lists.read_item_list(path)
    assert items.captions == {"red fox", "blue boat"}
    assert items.file_hashes == {lists.hash_file(ref.path) for ref in refs}
    assert len(items.fingerprints) == 3
    lists.write_item_list(path, [*reversed(refs), refs[0]], reversed(texts))
    assert files == {file.name: file.read_bytes() for file in tmp_path.glob("list.*")}


def test_an_empty_list_has_nothing_in_common_with_anything(lists: Any, tmp_path: Path) -> None:
    lists.write_item_list(tmp_path / "none", [], [])
    empty = lists.read_item_list(tmp_path / "none")
    assert (empty.file_hashes, empty.fingerprints, empty.captions) == (frozenset(), [], frozenset())
    assert lists.find_overlaps(empty, lists.load_evaluated_list()) == []


def test_captions_short_texts_and_answers_of_a_record_are_listed(lists: Any) -> None:
    long_text = "x" * (lists.MAX_TEXT_CHARS + 1)
    pair = Record(
        "a",
        short=("A hen.", long_text),
        long=long_text,
        metadata={"category": "animals/birds", "regions": ["Victoria"], "cost": np.int64(3)},
    )
    texts = list(lists.list_texts(pair))
    assert sorted(texts) == sorted(["A hen.", long_text, "animals/birds", "Victoria", "animals"])
    story = Record("b", parts=("A title", long_text))
    assert list(lists.list_texts(story)) == ["A title", ""]
