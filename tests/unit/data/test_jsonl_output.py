"""Records are written completely or not at all; images given as bytes become files."""

from __future__ import annotations

import base64
import re
from pathlib import Path

import pytest

from helpers.record_files import PNG, PNG_URL, read_single, read_with_errors, write_lines
from vlduet.data.formats import read_records
from vlduet.data.jsonl_output import (
    check_output_path,
    find_output_damage,
    lock_jsonl_output,
    stream_to_jsonl,
)
from vlduet.data.sources import RecordSource
from vlduet.errors import DataError

PARTS_ROW = {"id": "a", "parts": [{"text": "x"}]}


def test_inline_images_become_files_named_by_content(tmp_path: Path) -> None:
    svg_url = "data:;base64," + base64.b64encode(b"<svg/>").decode()
    source = write_lines(
        tmp_path / "x.jsonl",
        {"id": "a", "image": PNG_URL, "short": "one"},
        {"id": "b", "image": "b.png"},
        {"id": "c", "image": PNG_URL},
        {"id": "d", "image": svg_url},
    )
    target = tmp_path / "out" / "y.jsonl"
    assert len(list(stream_to_jsonl(read_records(source), target))) == 4
    paths = []
    for record in read_records(target):
        assert record.image is not None and record.image.path is not None
        paths.append(record.image.path.resolve())
    assert paths[0].read_bytes() == PNG and paths[0] == paths[2]
    assert paths[1] == (tmp_path / "b.png").resolve()
    assert paths[3].name.endswith(".bin"), "not one of the image formats that are read"
    names = {path.name for path in target.parent.iterdir()}
    assert names == {"y-images", "y.jsonl", ".y.jsonl.files.json"}


def test_an_error_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "x.jsonl", PARTS_ROW, "{broken")
    target = tmp_path / "y.jsonl"
    target.write_text("old")
    with pytest.raises(DataError, match="broken JSON"):
        list(stream_to_jsonl(read_records(source), target))
    assert target.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.jsonl", "y.jsonl"]


def write_output(folder: Path) -> Path:
    """Write two records with one image to a new output in a folder, and return its path."""
    rows = [{"id": name, "image": PNG_URL, "short": name} for name in ("one", "two")]
    source = write_lines(folder / "source.jsonl", *rows)
    list(stream_to_jsonl(read_records(source), folder / "out" / "x.jsonl"))
    return folder / "out" / "x.jsonl"


@pytest.mark.parametrize("damage", ["cut", "flipped", "image cut", "image missing", "list cut"])
def test_an_output_that_was_changed_is_a_warning_and_an_error_if_strict(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_output(tmp_path)
    assert len(list(RecordSource(path, strict=True).read())) == 2
    (image,) = (path.parent / "x-images").iterdir()
    content = path.read_bytes()
    if damage == "cut":  # between two records
        path.write_bytes(content[: content.index(b"\n") + 1])
    elif damage == "flipped":
        path.write_bytes(content.replace(b"one", b"ons"))
    elif damage == "image cut":
        image.write_bytes(image.read_bytes()[:-1])
    elif damage == "image missing":
        image.unlink()
    else:
        (path.parent / ".x.jsonl.files.json").write_text('{"files": {')
    names = {"cut": "x.jsonl has", "flipped": "x.jsonl has", "list cut": "broken JSON"}
    message = names.get(damage, f"x-images/{image.name} ")
    list(RecordSource(path).read())
    (warning,) = [text for text in caplog.messages if "Write it again" in text]
    assert message in warning and str(path) in warning
    with pytest.raises(DataError, match=re.escape(message)):
        RecordSource(path, strict=True).read()


def test_a_new_output_gets_a_new_list_and_a_copy_without_list_is_not_compared(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_output(tmp_path)
    write_output(tmp_path)
    assert find_output_damage(path) == ([], 2)
    (tmp_path / "copy.jsonl").write_bytes(path.read_bytes()[:-5])
    assert find_output_damage(tmp_path / "copy.jsonl") == ([], 0) and not caplog.messages


def test_lone_surrogates_are_errors_except_in_metadata(tmp_path: Path) -> None:
    source = write_lines(
        tmp_path / "rows.jsonl",
        '{"id": "a", "image": "\\ud83d.png", "short": "x"}',
        '{"id": "\\ud83d", "image": "a.png"}',
        '{"image": "b.png", "caption": "y", "id": "\\ud83d"}',
        '{"id": "b", "image": "b.png", "metadata": {"from": "\\ud83d", "name": "é"}}',
    )
    records, errors = read_with_errors(source)
    assert len(errors) == 3 and all(str(error).isascii() for error in errors)
    (record,) = stream_to_jsonl(records, tmp_path / "out.jsonl")
    assert record.metadata == {"from": "\ud83d", "name": "é"}
    assert read_single(tmp_path / "out.jsonl").metadata == record.metadata


def test_an_output_must_not_be_a_part_of_its_source(tmp_path: Path) -> None:
    existing = write_lines(tmp_path / "train.jsonl", PARTS_ROW)
    for source in (existing, tmp_path):
        with pytest.raises(DataError, match="--to"):
            check_output_path(existing, source)
    with pytest.raises(DataError, match=r"no \.jsonl file"):
        check_output_path(tmp_path / "x.json", tmp_path)
    check_output_path(existing, tmp_path, allow_existing=True)
    check_output_path(tmp_path / "new.jsonl", tmp_path)


def test_drafts_of_a_killed_run_are_deleted_by_the_next_one(tmp_path: Path) -> None:
    target = tmp_path / "out.jsonl"
    (tmp_path / "out-images").mkdir()
    names = (".out.jsonl.files.json", "out-images/a.png", ".other.jsonl.files.json")
    drafts = []
    for path in map(tmp_path.joinpath, names):
        drafts.append(path.with_name(f".{path.name}.4711.draft"))
        drafts[-1].touch()
    with lock_jsonl_output(target, tmp_path / "source.jsonl"):
        assert [draft.exists() for draft in drafts] == [False, False, True]
