"""Folders that tests of damage change, and that are expensive to write again."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def restore_folder(folder: Path) -> Iterator[Path]:
    """Yield a folder that the block may change, and bring back its present content afterwards."""
    copy = folder.with_name("copy")
    shutil.copytree(folder, copy)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)
        copy.rename(folder)
