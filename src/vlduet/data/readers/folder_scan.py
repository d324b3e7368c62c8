"""What lies in a folder: images, other files and subfolders, without what a system put there.

Nothing that is left out is left out silently: it is counted in `IgnoredData`, recycle bins,
thumbnails and hidden files by their names, links and pipes by their paths.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from vlduet.data.image_formats import IMAGE_SUFFIXES, is_image_file
from vlduet.data.quarantine import QUARANTINE_SUFFIX
from vlduet.data.readers.rows import IgnoredData

SYSTEM_FOLDERS = re.compile(
    r"@(eadir|tmp|recycle|recently-snapshot|snapshot|sharesnap|sharebin|appdata)"  # Synology, QNAP
    r"|#(recycle|snapshot)|~snapshot|trashbox|network trash folder|files_trashbin|files_versions"
    r"|\$recycle\.bin|recycler|recycled|system volume information|found\.\d{3}|dfsrprivate"
    r"|lost\+found|__macosx|temporary items|resource\.frk|.+\.lrdata",
    re.IGNORECASE,
)
"""Names of folders of recycle bins, snapshots and thumbnails; others begin with a dot."""
SYSTEM_FILES = re.compile(
    r"(eh)?thumbs(_vista)?\.db|desktop\.ini|icon\r|picasa\.ini|zbthumbnail\.info", re.IGNORECASE
)
"""Names of files that a system keeps beside images; others begin with a dot."""


@dataclass(slots=True)
class FolderContent:
    """Names in one folder, sorted, without what is counted as left out."""

    images: list[str] = field(default_factory=list)
    """Files that are images, and broken links whose names end as those of images."""
    other_files: list[str] = field(default_factory=list)
    """Other regular files."""
    subfolders: list[str] = field(default_factory=list)

    @property
    def files(self) -> list[str]:
        """Names of all files, sorted."""
        return sorted([*self.images, *self.other_files])


def scan_folder(folder: Path, ignored: IgnoredData) -> FolderContent:
    """Return what a folder holds, and count in `ignored` what is left out.

    Left out are names that start with a dot, `SYSTEM_FOLDERS`, `SYSTEM_FILES`, indexes of ours
    (which hold copies of images), links to folders, broken links to other files than images, pipes,
    sockets and devices; and silently the files that list what our own commands left out.

    Raises:
        OSError: the folder cannot be read.
    """
    content = FolderContent()
    with os.scandir(folder) as iterator:
        entries = sorted(iterator, key=lambda entry: entry.name)
    for entry in entries:
        path = folder / entry.name
        kind = _find_kind(entry)
        pattern = SYSTEM_FOLDERS if kind == "folder" else SYSTEM_FILES
        if entry.name.startswith(".") or pattern.fullmatch(entry.name):
            ignored.add("system", "._*" if entry.name.startswith("._") else entry.name)
        elif kind == "folder" and entry.is_symlink():
            ignored.add("linked folder", str(path))
        elif kind == "folder" and os.path.isdir(path / "store" / "rows.lance"):
            ignored.add("system", f"{entry.name} (an index)")
        elif kind == "folder":
            content.subfolders.append(entry.name)
        elif kind == "special":
            ignored.add("special file", str(path))
        elif kind == "missing" and path.suffix.lower() not in IMAGE_SUFFIXES:
            ignored.add("broken link", str(path))
        elif kind == "missing" or is_image_file(path):
            content.images.append(entry.name)
        elif not entry.name.endswith(QUARANTINE_SUFFIX):
            content.other_files.append(entry.name)
    return content


def iter_folders(
    folder: Path, ignored: IgnoredData, *, errors: list[tuple[Path, OSError]]
) -> Iterator[tuple[Path, FolderContent]]:
    """Yield a folder and those below it with their contents, sorted, from the top down.

    Folders that cannot be read are appended to `errors` with the reason.
    """
    try:
        content = scan_folder(folder, ignored)
    except OSError as error:
        errors.append((folder, error))
        return
    yield folder, content
    for name in content.subfolders:
        yield from iter_folders(folder / name, ignored, errors=errors)


def _find_kind(entry: os.DirEntry[str]) -> str:
    """Return ``folder``, ``file``, ``special`` or, for a broken link, ``missing``.

    An entry whose kind cannot be found out is a ``file``, whose reading then says why.
    """
    try:
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return "file"
        return "special" if os.path.exists(entry) else "missing"
    except OSError:
        return "file"
