"""Locks of the folders and files that commands write: one writer at a time.

The operating system holds a lock and releases it when its process ends, however it ends: the lock
file of a killed process does not block. A thread may take a lock that it holds already. Who takes a
lock deletes the drafts that killed writers left: nobody else can be writing them.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from vlduet.errors import ConfigError, LockError

LOCK_NAME = ".lock"
"""Name of the lock file inside a folder that is written in place."""
_DRAFT = re.compile(r"\.(?P<name>.+)\.\d+\.draft", re.DOTALL)


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder that is written in place; the folder is created if it is missing.

    The lock is the file `LOCK_NAME` in the folder, which is deleted after the block. So is a folder
    that did not exist before, if the block has left it empty. Drafts directly in the folder are
    deleted first (`remove_drafts`).

    Raises:
        LockError: another process or thread holds the lock; there is no waiting.
        ConfigError: `folder` is a file.
        OSError: the folder cannot be created or written.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError("is a file", place=folder, fix="Name a new or an empty folder")
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with _hold_lock(folder / LOCK_NAME, folder):
            remove_drafts(folder)
            yield
    finally:
        if is_new:
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()


@contextlib.contextmanager
def lock_output(path: Path) -> Iterator[None]:
    """Hold the lock of a file, or of a folder that is replaced by a new version of it.

    The lock is the file ``.NAME.lock`` beside `path`, which is deleted after the block. Missing
    parent folders are created; `path` itself need not exist. Its drafts are deleted first
    (`remove_drafts`).

    Raises:
        LockError: another process or thread holds the lock; there is no waiting.
        OSError: the parent folder cannot be created or written.
    """
    # Resolved, because '.' and 'x/..' have no name from which to derive a neighbour's name.
    resolved = path.resolve()
    resolved.parent.mkdir(parents=True, exist_ok=True)
    with _hold_lock(resolved.with_name(f".{resolved.name}.lock"), path):
        remove_drafts(resolved.parent, resolved.name)
        yield


def draft_path(path: Path) -> Path:
    """Return ``.NAME.PID.draft`` beside `path`, which this process writes before it renames it."""
    return path.with_name(f".{path.name}.{os.getpid()}.draft")


def remove_drafts(folder: Path, name: str | None = None) -> None:
    """Delete the drafts (`draft_path`) of a file, or of all files, that killed processes left.

    Only the holder of a lock that all writers of these files take may call this function.

    Args:
        folder: folder of the files; its subfolders are left as they are. It may be missing.
        name: name of a file; None: those of all files.
    """
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for file in folder.iterdir():
            match = _DRAFT.fullmatch(file.name)
            if match is not None and name in (None, match["name"]):
                file.unlink(missing_ok=True)


@contextlib.contextmanager
def _hold_lock(file: Path, place: Path) -> Iterator[None]:
    """Hold the system's lock of `file`, which is created, and delete the file at the end.

    Raises LockError about `place` if another process or thread holds it, and OSError if the file
    cannot be created. A file with content is not ours and stays.
    """
    lock = FileLock(file.resolve(), timeout=0, is_singleton=True)
    try:
        lock.acquire()
    except Timeout:
        message = "another process is writing here"
        raise LockError(message, place=place, fix="Wait for it to end, or name another") from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows does not delete open files
            # Deleted while it is locked: whoever opened it before finds it without a name, and
            # FileLock then opens a new one.
            if lock.lock_counter == 1 and file.stat().st_size == 0:
                file.unlink()
        lock.release()
