"""Write files and folders so that they are complete or absent, even if the process is killed.

A file is written under a temporary name beside its target, flushed to the disk and renamed. A
folder is written beside its target too; two renames then exchange the old and the new version.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TextIO

from vlduet.errors import ConfigError
from vlduet.library_errors import name_full_disk
from vlduet.locks import draft_path, lock_output
from vlduet.structured_files import parse_json, require_regular_file


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write one file so that it is complete or unchanged, also after a power failure.

    Args:
        path: The file to create or replace. Its folder must exist.
        write: Function that writes the whole content into the open binary file that it receives.
            If it raises, the exception propagates and `path` stays as it was. The temporary file
            (`vlduet.locks.draft_path`) is deleted in every case.

    Raises:
        OSError: The folder is missing, or the file cannot be written; a full disk names `path`.
    """
    draft = draft_path(path)
    try:
        with name_full_disk(path), draft.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    fsync_paths([path.parent])


def write_text_atomically(path: Path, text: str) -> None:
    """Write a UTF-8 text file with `write_atomically`; create its folder if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Captions may contain lone surrogates, which have no UTF-8 encoding.
    write_atomically(path, lambda file: file.write(text.encode("utf-8", "replace")))


def read_json_lines(path: Path) -> list[Any]:
    """Return the parsed values of a JSON lines file, in file order.

    Empty lines and lines that are not valid JSON (`parse_json`) are skipped silently: a killed
    process leaves an incomplete last line. Invalid UTF-8 is replaced. A file that does not exist
    gives []. Raises ConfigError for a folder, pipe or device.
    """
    if not path.exists():
        return []
    require_regular_file(path, error_class=ConfigError)
    values = []
    text = path.read_text(encoding="utf-8", errors="replace")
    # Not splitlines(): JSON strings may contain U+2028 and others that it takes for line ends.
    for line in filter(None, text.split("\n")):
        try:
            values.append(parse_json(line, place=path, error_class=ConfigError, fix=""))
        except ConfigError:
            continue
    return values


def open_for_append(path: Path) -> TextIO:
    """Return a text file opened to append lines (UTF-8); the caller closes it.

    The file is created if it is missing. If a killed process left a last line without a newline, a
    newline is written first, so that the next line does not continue it. Raises OSError if the
    folder is missing or the file cannot be opened, and ConfigError for a folder, pipe or device.
    """
    require_regular_file(path, error_class=ConfigError)
    is_incomplete = (
        path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
    )
    file = path.open("a", encoding="utf-8")
    if is_incomplete:
        file.write("\n")
    return file


def fsync_paths(paths: Iterable[Path]) -> None:
    """Ask the operating system to flush existing files and folders to the disk.

    Paths that may not be opened are skipped; a missing one raises FileNotFoundError.
    """
    for path in paths:
        try:
            handle = os.open(path, os.O_RDONLY)
        except PermissionError:  # Windows cannot open folders
            continue
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def require_empty_folder(folder: Path) -> None:
    """Raise ConfigError unless `folder` does not exist yet or is an empty folder."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ConfigError(
            "the output folder is not empty", place=folder, fix="Name a new or an empty folder"
        )


@contextmanager
def replace_folder_atomically(folder: Path, *, marker: str) -> Iterator[Path]:
    """Yield the empty folder ``.NAME.writing`` beside `folder`, which replaces it after the block.

    The content is flushed to the disk before the exchange, so that after a crash either the old or
    the new version is complete. An exchange that a crash interrupted is finished first
    (`recover_folder`). If the block raises, the temporary folder is deleted, `folder` stays as it
    was, and the exception propagates.

    Args:
        folder: The folder to create or replace; missing parent folders are created.
        marker: Name of a file that every version of this folder contains. An existing folder
            without it is not ours, and is replaced only if it is empty.

    Raises:
        LockError: Before the block, if another process is writing the same folder.
        ConfigError: Before the block, if `folder` is a file, or is not empty and has no marker.
        OSError: The disk is full (the error names `folder`), or a file cannot be written.
    """
    # Resolved, because '.' and 'x/..' have no name from which to derive a neighbour's name.
    folder = folder.resolve()
    temporary = folder.with_name(f".{folder.name}.writing")
    previous = folder.with_name(f".{folder.name}.old")
    with lock_output(folder):
        recover_folder(folder)
        if not (folder / marker).is_file():
            require_empty_folder(folder)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            with name_full_disk(folder):
                yield temporary
                fsync_paths([temporary, *temporary.rglob("*")])
            shutil.rmtree(previous, ignore_errors=True)
            if folder.exists():
                folder.rename(previous)
            temporary.rename(folder)
            fsync_paths([folder.parent])
            shutil.rmtree(previous, ignore_errors=True)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def recover_folder(folder: Path) -> Path:
    """Restore a folder that a crash left under its backup name, and return `folder` itself.

    A process killed between the two renames of `replace_folder_atomically` leaves only
    ``.NAME.old``, which is renamed back. In all other cases nothing changes; the folder need not
    exist.
    """
    resolved = folder.resolve()
    previous = resolved.with_name(f".{resolved.name}.old")
    if not resolved.exists() and previous.exists():
        previous.rename(resolved)
    return folder
