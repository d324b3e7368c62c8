"""Splits share no image or caption, have the sizes that were given, and can be repeated."""

from __future__ import annotations

import base64
import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers import tiny
from vlduet.data import images
from vlduet.data.formats import read_records
from vlduet.data.records import ImageRef
from vlduet.data.sources import RecordSource
from vlduet.data.tools.check import check_files
from vlduet.data.tools.split import DEFAULT_SHARES, assign_splits, split_records
from vlduet.errors import ConfigError, DataError

SOURCE = Path("source.jsonl")


def write_image(path: Path, seed: int, *, side: int = 24) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = images.load_image(tiny.random_image(seed, 24))
    path.write_bytes(images.encode_png(image.resize((side, side))))
    return path


@pytest.fixture
def album(tmp_path: Path) -> Path:
    """Write 60 pairs: 40 of their own, 10 with scaled copies of images, 10 with equal captions."""
    lines = ["filename,caption"]
    for i in range(60):
        seed = i if i < 50 else i - 10
        if 40 <= i < 50:
            write_image(tmp_path / f"photos/{i}.png", i - 40, side=48)
            caption = f"A picture of its own, number {i}"
        else:
            write_image(tmp_path / f"photos/{i}.png", seed if i < 50 else i + 100)
            caption = f"This is picture number {i if i < 50 else i - 20}"
            caption = caption if i < 50 else caption.upper() + "!"
        lines.append(f'{i}.png,"{caption}"')
    (tmp_path / "album.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_splits_have_no_leak_and_every_record(album: Path) -> None:
    source = RecordSource(album / "album.csv", root=album / "photos")
    report = split_records(source, album / "deep" / "splits")
    assert report.records == {"train": 48, "val": 6, "test": 6}
    assert report.group_sizes == {1: 20, 2: 20} and report.largest_group == 2
    assert sum(report.groups.values()) == 40 and report.dropped == 0
    files = [Path(file) for file in report.files.values()]
    assert [file.name for file in files] == ["train.jsonl", "val.jsonl", "test.jsonl"]
    checked = check_files(files)
    assert checked.ok and not checked.leaks, str(checked)
    captions = [record.short for file in files for record in read_records(file)]
    expected = [record.short for record in source.read()]
    assert sorted(captions) == sorted(expected)
    stored = json.loads((album / "deep" / "splits" / "split.json").read_text())
    assert stored["records"] == report.records and stored["shares"] == DEFAULT_SHARES


def test_equal_arguments_give_equal_files_and_seeds_differ(album: Path) -> None:
    source = RecordSource(album / "album.csv", root=album / "photos")
    texts = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        split_records(source, album / name, seed=seed)
        texts[name] = (album / name / "val.jsonl").read_text()
    assert texts["a"] == texts["b"] != texts["c"]
    ids = [record.id for record in read_records(album / "a" / "train.jsonl")]
    all_ids = [record.id for record in source.read()]
    assert ids == [record_id for record_id in all_ids if record_id in ids], "in the source's order"


def test_records_connect_through_others(tmp_path: Path) -> None:
    """Record 1 shares its image with 0 and its caption with 2; the chat has the image of 2."""
    caption, other = "a boat on the lake", "two dogs in the snow"
    rows: list[dict[str, Any]] = [
        {"id": "0", "image": "a.png", "short": other},
        {"id": "1", "image": "a-copy.png", "short": caption},
        {"id": "2", "image": "b.png", "long": caption.upper()},
        {
            "id": "3",
            "messages": [
                {"role": "user", "content": [{"image": "b.png"}, {"text": "What?"}]},
                {"role": "assistant", "content": "A boat."},
            ],
        },
    ]
    for name, seed in (("a.png", 1), ("a-copy.png", 1), ("b.png", 2)):
        write_image(tmp_path / name, seed)
    for i in range(4):
        write_image(tmp_path / f"own-{i}.png", 10 + i)
        rows.append({"id": f"own-{i}", "image": f"own-{i}.png", "short": "a dog"})
    source = tmp_path / "all.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = split_records(source, tmp_path / "out", shares={"train": 0.5, "test": 0.5})
    assert report.group_sizes == {1: 4, 4: 1}, "short captions repeat by chance"
    train = {record.id for record in read_records(tmp_path / "out" / "train.jsonl")}
    assert train in ({"0", "1", "2", "3"}, {f"own-{i}" for i in range(4)})


def test_unreadable_records_are_left_out_and_listed(tmp_path: Path) -> None:
    rows = []
    for i in range(6):
        write_image(tmp_path / f"{i}.png", i)
        rows.append(json.dumps({"id": str(i), "image": f"{i}.png"}))
    (tmp_path / "1.png").unlink()
    (tmp_path / "3.png").write_bytes(b"no image")
    source = tmp_path / "all.jsonl"
    source.write_text("\n".join([*rows[:5], "{broken", rows[5]]) + "\n")
    report = split_records(source, tmp_path / "out", shares={"a": 0.5, "b": 0.5})
    assert report.records == {"a": 2, "b": 2} and report.dropped == 3
    files = (tmp_path / "out" / "a.jsonl", tmp_path / "out" / "b.jsonl")
    ids = [record.id for file in files for record in read_records(file)]
    assert sorted(ids) == ["0", "2", "4", "5"]
    assert len((tmp_path / "out" / "split.quarantine.jsonl").read_text().splitlines()) == 3


def test_images_without_files_get_files_next_to_the_splits(tmp_path: Path) -> None:
    rows = []
    for i in range(4):
        data = base64.b64encode(images.read_bytes(tiny.random_image(i))).decode()
        rows.append(json.dumps({"id": str(i), "image": f"data:image/png;base64,{data}"}))
    (tmp_path / "all.jsonl").write_text("\n".join(rows) + "\n")
    split_records(tmp_path / "all.jsonl", tmp_path / "out", shares={"a": 0.5, "b": 0.5})
    records = list(read_records(tmp_path / "out" / "b.jsonl"))
    assert len(records) == 2
    for record in records:
        expected = images.image_key(tiny.random_image(int(record.id)))
        assert record.image is not None and images.image_key(record.image) == expected
        assert isinstance(record.image, ImageRef) and record.image.path is not None


def test_one_group_of_most_records_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = []
    for i in range(10):
        write_image(tmp_path / f"{i}.png", i)
        caption = "a photograph of a product" if i < 7 else f"caption number {i} of ten"
        rows.append(json.dumps({"id": str(i), "image": f"{i}.png", "short": caption}))
    source = tmp_path / "all.jsonl"
    source.write_text("\n".join(rows) + "\n")
    report = split_records(source, tmp_path / "out")
    assert report.records == {"train": 8, "val": 1, "test": 1} and report.largest_group == 7
    assert "7 of 10 records are in one group" in caplog.text


def test_too_few_groups_are_an_error_and_leave_no_file(tmp_path: Path) -> None:
    rows = []
    for i in range(5):
        write_image(tmp_path / f"{i}.png", i)
        rows.append(json.dumps({"id": str(i), "image": f"{i}.png", "short": "the same caption"}))
    source = tmp_path / "all.jsonl"
    source.write_text("\n".join(rows) + "\n")
    with pytest.raises(DataError, match="nothing is left for val, test"):
        split_records(source, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.jsonl"))


@pytest.mark.parametrize(
    "shares",
    [
        {"train": 1.0},
        {"train": 0.8, "test": 0.1},
        {"train": 1.2, "test": -0.2},
        {"train": float("nan"), "test": 0.5},
        {"../train": 0.5, "test": 0.5},
        {"train": 1.0, "test": 0.0},
    ],
)
def test_shares_that_are_not_valid_are_refused(tmp_path: Path, shares: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="--shares"):
        split_records(tmp_path / "all.jsonl", tmp_path / "out", shares=shares)


@given(
    sizes=st.lists(st.integers(1, 9), min_size=3, max_size=60),
    shares=st.sampled_from([(0.8, 0.1, 0.1), (0.5, 0.5), (0.6, 0.2, 0.2), (0.98, 0.02)]),
    seed=st.integers(0, 5),
)
def test_groups_stay_whole_and_sizes_are_met(
    sizes: list[int], shares: tuple[float, ...], seed: int
) -> None:
    named = {f"split{i}": share for i, share in enumerate(shares)}
    total = sum(sizes)
    numbers = list(range(total))
    random.Random(seed).shuffle(numbers)
    groups = []
    for size in sizes:
        groups.append(sorted(numbers.pop() for _ in range(size)))
    ids = [f"id-{i}" for i in range(total)]
    try:
        splits = assign_splits(groups, ids, shares=named, seed=seed, place=SOURCE)
    except DataError:
        assert len(sizes) < 20 or max(sizes) > 1, "single records fill every split"
        return
    for members in groups:
        assert len({splits[i] for i in members}) == 1
    for name, share in named.items():
        error = abs(splits.count(name) - max(1, share * total))
        assert error <= max(sizes) + len(named), (name, splits.count(name), share * total)
    shuffled = [list(members) for members in groups]
    random.Random(seed + 1).shuffle(shuffled)
    assert assign_splits(shuffled, ids, shares=named, seed=seed, place=SOURCE) == splits
