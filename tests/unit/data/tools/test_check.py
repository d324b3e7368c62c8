"""The check finds every broken record and image, and what two files share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers import tiny
from vlduet.data import images
from vlduet.data.readers.rows import IgnoredData
from vlduet.data.records import ImageRef
from vlduet.data.sources import RecordSource
from vlduet.data.tools import check_report
from vlduet.data.tools.check import check_files


def write_rows(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_image(path: Path, seed: int) -> str:
    """Write a random image, and return the name of the file."""
    path.write_bytes(images.read_bytes(tiny.random_image(seed)))
    return path.name


def smooth_scene(side: int) -> ImageRef:
    """Return the same scene at any size: near-duplicates of one another."""
    y, x = np.mgrid[0 : 1 : side * 1j, 0 : 1 : side * 1j]
    pixels = np.stack([255 * x, 255 * y, 255 * x * y], -1).astype(np.uint8)
    pixels[side // 4 : side // 2, side // 4 : side // 2] = (200, 20, 20)
    return ImageRef(data=images.encode_png(images.from_pixels(pixels)))


def test_the_report_of_a_correct_file_counts_its_contents(tmp_path: Path) -> None:
    rows = []
    for i in range(3):
        name = write_image(tmp_path / f"{i}.png", i)
        rows.append({"id": str(i), "image": name, "short": f"caption number {i}"})
    rows.append({"id": "again", "image": "0.png", "long": "The first one once more."})
    rows.append({"id": "bare", "image": "0.png"})
    report = check_files([write_rows(tmp_path / "x.jsonl", *rows)])
    (file,) = report.files
    assert report.ok and not report.leaks
    assert (file.records, file.images, file.distinct_images) == (5, 5, 3)
    assert (file.captions, file.bare) == (4, 1)
    assert file.kinds == {"pair": 5}
    assert file.words == {
        "short": {"min": 3, "median": 3, "max": 3},
        "long": {"min": 5, "median": 5, "max": 5},
    }
    assert json.loads(json.dumps(report.to_json()))["ok"] is True


def test_text_lengths_are_reported_by_role(tmp_path: Path) -> None:
    text, pair = {"text": "one two"}, [[{"text": "one two three"}]]
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a b c d"}]
    source = write_rows(
        tmp_path / "x.jsonl",
        {"id": "i", "parts": [text]},
        {"id": "c", "messages": chat},
        {"id": "r", "query": [text], "positive": pair, "negative": pair},
    )
    (file,) = check_files([source]).files
    assert file.kinds == {"interleaved": 1, "chat": 1, "retrieval": 1}
    medians = {role: count["median"] for role, count in file.words.items()}
    assert medians == {"slice": 2, "turn": 2.5, "retrieval": 3}


def test_problems_name_line_field_cause_and_remedy(tmp_path: Path) -> None:
    good = write_image(tmp_path / "good.png", 0)
    (tmp_path / "drawing.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    (tmp_path / "cut.png").write_bytes((tmp_path / good).read_bytes()[:200])
    source = write_rows(
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
    assert {problem.file for problem in report.problems} == {str(source)}
    assert all(problem.fix for problem in report.problems)
    fields = {problem.line: problem.field for problem in report.problems}
    assert len(report.problems) == 5
    assert fields == {2: "id", 3: "image", 4: "image", 5: "image", 6: "shrt"}
    causes = {problem.line: problem.cause for problem in report.problems}
    assert "SVG" in causes[4] and "truncated" in causes[5]
    assert f"error: {source}:6:shrt: unknown key 'shrt'" in str(report)


def test_shared_images_and_captions_are_warnings(tmp_path: Path) -> None:
    write_image(tmp_path / "same.png", 1)
    write_image(tmp_path / "copy.png", 1)
    write_image(tmp_path / "own.png", 2)
    for name, side in (("large.png", 96), ("small.png", 64)):
        (tmp_path / name).write_bytes(images.read_bytes(smooth_scene(side)))
    train = write_rows(
        tmp_path / "train.jsonl",
        {"id": "1", "image": "same.png", "short": "A boat on the lake."},
        {"id": "2", "image": "large.png", "short": "a dog"},
    )
    test = write_rows(
        tmp_path / "test.jsonl",
        {"id": "3", "image": "copy.png", "short": "a dog"},
        {"id": "4", "image": "small.png", "short": "a boat, on the lake"},
        {"id": "5", "image": "own.png"},
    )
    report = check_files([train, test])
    assert {leak.kind: (leak.first_place, leak.second_place) for leak in report.leaks} == {
        "same image": (f"{train}:1", f"{test}:1"),
        "similar image": (f"{train}:2", f"{test}:2"),
        "same caption": (f"{train}:1", f"{test}:2"),
    }
    assert report.ok and sum(report.num_leaks.values()) == 3
    assert "warning: 1 x same caption in two of the files" in str(report)
    (caption_leak,) = [leak for leak in report.to_json()["leaks"] if leak["kind"] == "same caption"]
    assert caption_leak == {
        "kind": "same caption",
        "one": f"{train}:1",
        "other": f"{test}:2",
        "what": "A boat on the lake.",
    }


def test_equal_checks_give_equal_reports(tmp_path: Path) -> None:
    rows = []
    for i in range(50):
        name = write_image(tmp_path / f"{i}.png", i) if i % 3 else "gone.png"
        rows.append({"id": str(i), "image": name})
    source = write_rows(tmp_path / "x.jsonl", *rows)
    first, second = check_files([source]), check_files([source])
    assert first.to_json() == second.to_json()
    assert first.files[0].distinct_images == 33
    assert len(first.problems) == 1, "a file that several records refer to is reported once"


def test_missing_images_are_one_line_with_the_folder_that_has_them(tmp_path: Path) -> None:
    lines = ["filename,caption"]
    (tmp_path / "photos").mkdir()
    for i in range(40):
        write_image(tmp_path / "photos" / f"{i}.png", i)
        lines.append(f"{i}.png,caption number {i}")
    source = tmp_path / "shop.csv"
    source.write_text("\n".join(lines) + "\n")
    report = check_files([source])
    (line,) = [line for line in str(report).splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: {source}: 40 images do not exist: ")
    assert "0.png (line 2)" in line and "and 37 more" in line
    assert f"--root {tmp_path / 'photos'}" in line
    assert str(report).endswith("40 errors, 0 warnings")
    values = report.to_json()
    assert values["causes"] == [{"source": str(source), "cause": "no such image", "count": 40}]
    assert all("--root" in problem["fix"] for problem in values["problems"])
    assert check_files([RecordSource(source, root=tmp_path / "photos")]).ok


def test_errors_of_one_cause_are_printed_thrice_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check_report, "MAX_LISTED", 10)
    name = write_image(tmp_path / "a.png", 0)
    rows = []
    for i in range(30):
        key = "shrt" if i % 3 else "short"
        rows.append({"id": str(i), "image": name, key: f"caption {i}"})
    rows += [{"id": "0", "image": name}, {"id": "3", "image": name}]
    source = write_rows(tmp_path / "x.jsonl", *rows)
    report = check_files([source])
    assert report.num_errors == 22 and len(report.problems) == 12
    lines = [line for line in str(report).splitlines() if line.startswith("error: ")]
    assert [line.startswith(f"error: {source}:") for line in lines[:3]] == [True] * 3
    assert lines[3] == f"error: {source}: 17 more of this kind (unknown key)"
    assert len(lines) == 6 and all("already" in line for line in lines[4:])
    counts = {cause["cause"]: cause["count"] for cause in report.to_json()["causes"]}
    assert counts == {"unknown key": 20, "an id stands twice": 2}


def test_metadata_keys_are_listed_with_the_kinds_of_their_values(tmp_path: Path) -> None:
    name = write_image(tmp_path / "a.png", 0)
    rows = []
    for i, colour in enumerate(("red", 7, None)):
        metadata = {"price": 1.5 + i, "colour": colour, "new": True, "tags": ["a"], "shop": {}}
        rows.append({"id": str(i), "image": name, "metadata": metadata})
    report = check_files([write_rows(tmp_path / "x.jsonl", *rows)])
    (file,) = report.files
    assert file.metadata["colour"] == ["text", "number"] and file.metadata["new"] == ["flag"]
    line = "  metadata: price (number), colour (text or number), new (flag), tags (list)"
    assert f"{line}, shop (object)" in str(report).splitlines()
    many_keys = {f"key{i}": i for i in range(check_report.MAX_PRINTED_KEYS + 5)}
    source = write_rows(tmp_path / "y.jsonl", {"id": "0", "image": name, "metadata": many_keys})
    assert str(check_files([source])).splitlines()[1].endswith("key19 (number) and 5 more")


def test_what_is_not_read_is_a_warning_and_for_a_strict_source_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = write_image(tmp_path / "a.png", 0)
    source = write_rows(tmp_path / "x.jsonl", {"id": "0", "image": name})
    monkeypatch.setattr(IgnoredData, "messages", lambda self: ["3 rows with a column `colour`"])
    report = check_files([source])
    assert report.ok and report.files[0].ignored == ["3 rows with a column `colour`"]
    assert f"warning: {source}: 3 rows with a column `colour`" in str(report)
    assert str(report).endswith("0 errors, 1 warnings") and report.to_json()["warnings"] == 1
    strict = check_files([RecordSource(source, strict=True)])
    assert not strict.ok and strict.num_errors == 1 and not strict.files[0].ignored
    assert f"error: {source}: 3 rows with a column `colour`. " in str(strict)


@pytest.mark.parametrize("text", ["", "filename,caption\n", "\n\n"])
def test_a_file_without_records_is_an_error(tmp_path: Path, text: str) -> None:
    source = tmp_path / "shop.csv"
    source.write_text(text)
    report = check_files([source])
    assert not report.ok and f"error: {source}: there is no record. Write" in str(report)


def test_prices_that_are_kept_as_text_are_a_warning(tmp_path: Path) -> None:
    name = write_image(tmp_path / "a.png", 0)
    source = tmp_path / "shop.csv"
    source.write_text(f"image;price\n{name};12,5\n{name};3,99\n")
    report = check_files([source])
    assert report.ok and report.num_warnings == 1
    assert f"warning: {source}: `price` is kept as text" in str(report)
    source.write_text(f"image;price\n{name};12.50\n{name};3\n")
    report = check_files([source])
    assert report.num_warnings == 0 and report.files[0].metadata == {"price": ["number"]}


def test_many_unread_files_are_a_few_lines_and_a_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = write_image(tmp_path / "a.png", 0)
    source = write_rows(tmp_path / "x.jsonl", {"id": "0", "image": name})
    sentences = [f"the file {i}.txt is not read" for i in range(500)]
    monkeypatch.setattr(IgnoredData, "messages", lambda self: sentences)
    report = check_files([source])
    assert len(str(report).splitlines()) < 30 and "480 more are not read" in str(report)
    assert str(report).endswith("0 errors, 500 warnings")
    assert report.to_json()["files"][0]["ignored"] == sentences
