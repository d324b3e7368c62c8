"""The data check finds every broken record and image, and what two files share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from helpers.tiny import random_image
from vlduet.data import images
from vlduet.data.records import ImageRef
from vlduet.data.tools.check import check_files


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def put(path: Path, seed: int) -> str:
    data = random_image(seed).data
    assert data is not None
    path.write_bytes(data)
    return path.name


def smooth(side: int) -> ImageRef:
    """The same scene at any size: near-duplicates of one another."""
    y, x = np.mgrid[0 : 1 : side * 1j, 0 : 1 : side * 1j]
    pixels = np.stack([255 * x, 255 * y, 255 * x * y], -1).astype(np.uint8)
    pixels[side // 4 : side // 2, side // 4 : side // 2] = (200, 20, 20)
    return ImageRef(data=images.encode_png(images.from_pixels(pixels)))


def test_a_clean_file(tmp_path: Path) -> None:
    rows = [
        {"id": str(i), "image": put(tmp_path / f"{i}.png", i), "short": f"caption number {i}"}
        for i in range(3)
    ]
    rows.append({"id": "again", "image": "0.png", "long": "The first one once more."})
    report = check_files([write(tmp_path / "x.jsonl", *rows)])
    (file,) = report.files
    assert report.ok and not report.leaks
    assert (file.records, file.images, file.distinct_images, file.captions) == (4, 4, 3, 4)
    assert file.kinds == {"pair": 4} and file.words["short"] == {"min": 3, "median": 3, "max": 3}
    assert json.loads(json.dumps(report.to_json()))["ok"] is True


def test_problems_name_line_field_cause_and_fix(tmp_path: Path) -> None:
    good = put(tmp_path / "good.png", 0)
    (tmp_path / "drawing.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    (tmp_path / "cut.png").write_bytes((tmp_path / good).read_bytes()[:200])
    source = write(
        tmp_path / "x.jsonl",
        {"id": "a", "image": good},
        {"id": "a", "image": good},
        {"id": "b", "image": "gone.png"},
        {"id": "c", "image": "drawing.svg"},
        {"id": "d", "image": "cut.png"},
        {"id": "e", "image": good, "shrt": "x"},
    )
    report = check_files([source])
    assert not report.ok and report.files[0].records == 5
    found = {p.line: p for p in report.problems}
    assert sorted(p.line or 0 for p in report.problems) == [2, 3, 4, 5, 6]
    assert {p.file for p in report.problems} == {str(source)} and all(
        p.fix for p in report.problems
    )
    assert found[2].field == "id" and found[3].field == "image" and found[6].field == "shrt"
    assert "SVG" in found[4].cause and "truncated" in found[5].cause
    assert f"error: {source}:6:shrt: unknown key 'shrt'" in str(report)


def test_what_two_files_share(tmp_path: Path) -> None:
    put(tmp_path / "same.png", 1)
    put(tmp_path / "copy.png", 1)
    put(tmp_path / "own.png", 2)
    for name, side in (("large.png", 96), ("small.png", 64)):
        data = smooth(side).data
        assert data is not None
        (tmp_path / name).write_bytes(data)
    train = write(
        tmp_path / "train.jsonl",
        {"id": "1", "image": "same.png", "short": "A boat on the lake."},
        {"id": "2", "image": "large.png", "short": "a dog"},
    )
    test = write(
        tmp_path / "test.jsonl",
        {"id": "3", "image": "copy.png", "short": "a dog"},
        {"id": "4", "image": "small.png", "short": "a boat, on the lake"},
        {"id": "5", "image": "own.png"},
    )
    report = check_files([train, test])
    leaks = {leak.kind: (leak.one, leak.other) for leak in report.leaks}
    assert leaks == {
        "same image": (f"{train}:1", f"{test}:1"),
        "similar image": (f"{train}:2", f"{test}:2"),
        "same caption": (f"{train}:1", f"{test}:2"),
    }
    assert report.ok and sum(report.num_leaks.values()) == 3, "leaks are warnings"


def test_two_checks_are_equal(tmp_path: Path) -> None:
    rows = [
        {"id": str(i), "image": put(tmp_path / f"{i}.png", i) if i % 3 else "gone.png"}
        for i in range(50)
    ]
    source = write(tmp_path / "x.jsonl", *rows)
    assert check_files([source]).to_json() == check_files([source]).to_json()
