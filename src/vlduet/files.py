"""Files and folders that are there whole or not at all, whenever a process is killed or the power fails."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TextIO

from vlduet.errors import ConfigError


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file that either is there whole or not at all, power loss included."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with draft.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    fsync_paths([path.parent])


def write_text_atomically(path: Path, text: str) -> None:
    """Write a text as `atomic_write` does, making the folder where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Captions may hold lone surrogates, which UTF-8 has no bytes for.
    write_atomically(path, lambda file: file.write(text.encode("utf-8", "replace")))


def read_json_lines(path: Path) -> list[Any]:
    """The values of a JSON lines file that may not exist; a line that was cut short (kill -9) is left out."""
    found = []
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for line in filter(None, text.split("\n")):  # splitlines knows more line ends than JSON does
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def open_for_append(path: Path) -> TextIO:
    """A file opened to add lines; half a line that a killed process left is closed first."""
    half = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
    out = path.open("a", encoding="utf-8")
    if half:
        out.write("\n")
    return out


def fsync_paths(paths: Iterable[Path]) -> None:
    """Ask the system to bring files and folders to the disk."""
    for path in paths:
        try:
            handle = os.open(path, os.O_RDONLY)
        except PermissionError:  # Windows opens no folders
            continue
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def require_empty_folder(folder: Path) -> None:
    """Raises ConfigError where a folder is to be made and something stands already."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ConfigError(
            "there is something here already", place=folder, fix="Name a new or an empty folder"
        )


@contextmanager
def replace_folder_atomically(folder: Path, *, marker: str) -> Iterator[Path]:
    """A temporary folder that takes `folder`'s place at the end, or leaves it as it was.

    Everything is flushed to disk before the swap, so after a crash one of the two versions opens.

    Args:
        mark: a file of every version. What stands there without it is not ours to replace.

    Raises:
        ConfigError: something else is there.
    """
    folder = recover_folder(folder.resolve())  # of '.' and of 'x/..' there is no name to put beside
    if not (folder / marker).is_file():
        require_empty_folder(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.writing")
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        fsync_paths([temporary, *temporary.rglob("*")])
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
        fsync_paths([folder.parent])
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def recover_folder(folder: Path) -> Path:
    """`folder`, brought back where a kill fell between the two renames of `whole_folder`."""
    whole = folder.resolve()
    old = whole.with_name(f".{whole.name}.old")
    if not whole.exists() and old.exists():
        old.rename(whole)
    return folder
