"""Remedies for images that do not exist: the folder or the file that was probably meant."""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

MAX_SEARCHED_FOLDERS = 300
MAX_SEARCHED_FILES = 20_000
MAX_SEARCH_DEPTH = 2
"""Number of folders between a starting point of the search and a folder that is searched."""
MAX_PROBED_NAMES = 20
"""Number of missing images that are looked for; the others probably have the same cause."""


def suggest_remedy(
    missing: Sequence[Path], root: Path, *, setting: str = "Add --root "
) -> str | None:
    """Return the sentence that helps against missing images; None if nothing similar exists.

    The first `MAX_PROBED_NAMES` images are looked for in some folders below `root`, beside it and
    above it. The folder in which most of their paths exist would be the right ``--root``. Without
    any, a file is named that differs from an image in folder, case or ending only.

    Args:
        missing: paths of the images, as they were looked for.
        root: folder that relative paths started from.
        setting: how the right folder is set; the sentence begins with it and the folder.
    """
    probed = missing[:MAX_PROBED_NAMES]
    relative = [path.relative_to(root) for path in probed if path.is_relative_to(root)]
    folders = list(itertools.islice(_iter_folders(root), MAX_SEARCHED_FOLDERS))
    matches = [_list_existing(folder, relative) for folder in folders]
    best = max(range(len(folders)), key=lambda i: len(matches[i]))  # the nearest of equal ones
    if matches[best]:
        return f"{setting}{folders[best]}, where '{matches[best][0]}' exists"
    path_by_name: dict[str, Path] = {}
    for path in reversed(probed):
        name = _file_name(path).lower()
        path_by_name |= {name: path, name.rpartition(".")[0] or name: path}
    files = itertools.chain.from_iterable(map(_list_files, folders))
    for file in itertools.islice(files, MAX_SEARCHED_FILES):
        similar = path_by_name.get(file.name.lower()) or path_by_name.get(file.stem.lower())
        if similar is not None:
            return f"'{file}' exists: correct folder, case or ending of '{_file_name(similar)}'"
    return None


def _list_existing(folder: Path, names: Sequence[Path]) -> list[Path]:
    """Return those of `names` that are files in `folder`."""
    return [name for name in names if (folder / name).is_file()]


def _file_name(path: Path) -> str:
    """Return the last component of a path, which may be one of Windows."""
    return path.name.rpartition("\\")[2]


def _iter_folders(root: Path) -> Iterator[Path]:
    """Yield folders without repetitions: `root`, those below it, its parents, and those below.

    Hidden folders and symbolic links are left out, and so is what cannot be read.
    """
    visited = set[Path]()
    for start in (root, _parent_of(root), _parent_of(_parent_of(root))):
        queue = deque([(start, 0)])
        while queue:
            folder, depth = queue.popleft()
            if folder.resolve() in visited:
                continue
            visited.add(folder.resolve())
            yield folder
            if depth < MAX_SEARCH_DEPTH:
                queue += [(child, depth + 1) for child in _list_entries(folder, files=False)]


def _parent_of(folder: Path) -> Path:
    """Return the folder above, relative if `folder` is: that of ``.`` is ``..``."""
    return Path(os.path.normpath(folder / ".."))


def _list_files(folder: Path) -> list[Path]:
    return _list_entries(folder, files=True)


def _list_entries(folder: Path, *, files: bool) -> list[Path]:
    """Return the sorted files or folders directly in a folder; [] if it cannot be read.

    Hidden entries and symbolic links are left out.
    """
    try:
        with os.scandir(folder) as entries:
            names = [
                entry.name
                for entry in entries
                if not entry.name.startswith(".")
                and (entry.is_file if files else entry.is_dir)(follow_symlinks=False)
            ]
    except OSError:
        return []
    return [folder / name for name in sorted(names)]
