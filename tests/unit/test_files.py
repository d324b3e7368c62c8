"""Atomic files and folders: complete or unchanged, even if the writer is killed."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from helpers.processes import run_process
from vlduet.errors import ConfigError
from vlduet.files import (
    open_for_append,
    read_json_lines,
    recover_folder,
    replace_folder_atomically,
    write_text_atomically,
)


def read_files(folder: Path) -> dict[str, bytes]:
    """Return the content of all files in a folder by their relative paths."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_a_text_file_is_replaced_and_its_folder_created(tmp_path: Path) -> None:
    path = tmp_path / "new" / "x.txt"
    for text in ("first", "lone surrogate \ud800"):
        write_text_atomically(path, text)
    assert read_files(tmp_path) == {"new/x.txt": b"lone surrogate ?"}


def test_a_replaced_folder_contains_only_the_new_files(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "model"
    for name in ("first", "second"):
        with replace_folder_atomically(folder, marker="marker") as temporary:
            (temporary / "marker").touch()
            (temporary / f"{name}.txt").write_text(name)
    assert read_files(folder) == {"marker": b"", "second.txt": b"second"}
    assert list(folder.parent.iterdir()) == [folder]


def test_an_exception_leaves_the_folder_unchanged(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "old.txt").write_text("old")
    with (
        pytest.raises(OSError, match="disk full"),
        replace_folder_atomically(folder, marker="old.txt") as temporary,
    ):
        (temporary / "new.txt").write_text("half")
        raise OSError("disk full")
    assert read_files(folder) == {"old.txt": b"old"}
    assert list(tmp_path.iterdir()) == [folder]


KILLED_WRITER = """
import os, sys
from pathlib import Path
from vlduet.files import replace_folder_atomically
original_rename = Path.rename
num_renames = 0
def rename(self, target):
    global num_renames
    num_renames += 1
    if num_renames == int(sys.argv[2]):
        os._exit(9)
    return original_rename(self, target)
Path.rename = rename
with replace_folder_atomically(Path(sys.argv[1]), marker="old.txt") as temporary:
    (temporary / "new.txt").write_text("new")
"""


@pytest.mark.parametrize("rename", [1, 2], ids=["before the exchange", "between the two renames"])
def test_a_killed_writer_leaves_the_old_version(tmp_path: Path, rename: int) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "old.txt").write_text("old")
    command = [sys.executable, "-c", KILLED_WRITER, folder, str(rename)]
    process = run_process(command)
    assert process.returncode == 9
    assert folder.exists() == (rename == 1)
    assert read_files(recover_folder(folder)) == {"old.txt": b"old"}
    with replace_folder_atomically(folder, marker="old.txt") as temporary:
        (temporary / "newer.txt").write_text("newer")
    assert read_files(folder) == {"newer.txt": b"newer"}
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_files_of_the_user_are_never_replaced(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "photos"
    if kind == "folder":
        target.mkdir()
        (target / "notes.txt").write_text("precious")
    else:
        target.write_text("precious")
    with (
        pytest.raises(ConfigError, match="output folder is not empty"),
        replace_folder_atomically(target, marker="marker"),
    ):
        pass
    name = "photos/notes.txt" if kind == "folder" else "photos"
    assert read_files(tmp_path) == {name: b"precious"}


def test_the_empty_current_folder_can_be_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with replace_folder_atomically(Path("."), marker="marker") as temporary:
        (temporary / "marker").touch()
    assert read_files(tmp_path) == {"empty/marker": b""}


def test_recovering_the_current_folder_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert recover_folder(Path(".")) == Path(".")
    assert list(tmp_path.iterdir()) == []


def test_json_lines_end_at_newlines_only_and_broken_ones_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    assert read_json_lines(path) == []
    path.write_text('{"a": "one\u2028line"}\n{"half": \n')
    assert read_json_lines(path) == [{"a": "one\u2028line"}]


def test_a_pipe_is_neither_read_nor_appended_to(tmp_path: Path) -> None:
    """Both would wait forever."""
    os.mkfifo(tmp_path / "pipe")
    for use in (read_json_lines, open_for_append):
        with pytest.raises(ConfigError, match="not a regular file"):
            use(tmp_path / "pipe")


def test_appending_starts_a_new_line_after_an_incomplete_one(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    for text in ('{"a": 1}\n{"ha', '{"b": 2}\n', '{"c": 3}\n'):
        with open_for_append(path) as file:
            file.write(text)
    assert path.read_text() == '{"a": 1}\n{"ha\n{"b": 2}\n{"c": 3}\n'
