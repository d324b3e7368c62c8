"""Folders are replaced whole, whatever interrupts the writer."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from vlduet.errors import ConfigError
from vlduet.files import read_json_lines, recover_folder, replace_folder_atomically


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_whole_folder_replaces_everything(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "model"
    for text in ("one", "two"):
        with replace_folder_atomically(folder, marker="mark") as inside:
            (inside / "mark").touch()
            (inside / f"{text}.txt").write_text(text)
    assert files(folder) == {"mark": b"", "two.txt": b"two"}
    assert list(folder.parent.iterdir()) == [folder]


def test_whole_folder_survives_an_exception(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "old.txt").write_text("old")
    with (
        pytest.raises(OSError, match="disk full"),
        replace_folder_atomically(folder, marker="old.txt") as inside,
    ):
        (inside / "new.txt").write_text("half")
        raise OSError("disk full")
    assert files(folder) == {"old.txt": b"old"} and list(tmp_path.iterdir()) == [folder]


KILLED = """
import os, sys
from pathlib import Path
from vlduet.files import whole_folder
real, calls = Path.rename, []
def rename(self, target):
    calls.append(target)
    if len(calls) == int(sys.argv[2]):
        os._exit(9)
    return real(self, target)
Path.rename = rename
with whole_folder(Path(sys.argv[1]), mark="old.txt") as inside:
    (inside / "new.txt").write_text("new")
"""


@pytest.mark.parametrize("rename", [1, 2], ids=["before the swap", "between the two renames"])
def test_whole_folder_survives_a_kill(tmp_path: Path, rename: int) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "old.txt").write_text("old")
    ended = subprocess.run(
        [sys.executable, "-c", KILLED, folder, str(rename)], check=False, timeout=120
    )
    assert ended.returncode == 9
    assert folder.exists() == (rename == 1)
    assert files(recover_folder(folder)) == {"old.txt": b"old"}
    with replace_folder_atomically(folder, marker="old.txt") as inside:
        (inside / "newer.txt").write_text("newer")
    assert files(folder) == {"newer.txt": b"newer"} and list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("theirs", ["folder", "file"])
def test_whole_folder_never_replaces_what_is_not_ours(tmp_path: Path, theirs: str) -> None:
    target = tmp_path / "photos"
    if theirs == "folder":
        target.mkdir()
        (target / "notes.txt").write_text("precious")
    else:
        target.write_text("precious")
    with (
        pytest.raises(ConfigError, match="something here already"),
        replace_folder_atomically(target, marker="mark"),
    ):
        pass
    assert files(tmp_path) == {"photos/notes.txt" if theirs == "folder" else "photos": b"precious"}


def test_whole_folder_fills_an_empty_one_even_where_one_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with replace_folder_atomically(Path("."), marker="mark") as inside:
        (inside / "mark").touch()
    assert files(tmp_path) == {"empty/mark": b""}


def test_the_folder_here_is_recovered_as_any(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert recover_folder(Path(".")) == Path(".")


def test_a_line_ends_where_json_says(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"a": "one\u2028line"}\n{"half": \n')
    assert read_json_lines(tmp_path / "x.jsonl") == [{"a": "one\u2028line"}]
