"""Lists of files with size and SHA-256, and their verification: a file that exists may be damaged.

The manifest of a folder that is written or unpacked holds such a list, and is written last. Sizes
are compared whenever the folder is opened. A content is hashed once for each size and time of
modification: hashes are remembered in the cache folder (``hashes/``), one file for each folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import sys
import time
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypedDict

from vlduet.errors import ModelError, VLDuetError
from vlduet.files import write_atomically
from vlduet.structured_files import read_json_object

MIN_REMEMBERED_BYTES = 1 << 24
"""Number of bytes from which on a process remembers their hashes for the next one."""
MIN_AGE_NS = 2 * 10**9
"""Age of a file before its hash is remembered: a clock may not tell two later changes apart."""
MAX_HASH_THREADS = 8
"""Number of files that are hashed at a time."""
CHANGED = "has another content than the one that was written"
UNSEALED_KEYS = ("base", "manifest_sha256")
"""Keys of a manifest that its hash leaves out: the path of a model's base may be edited."""


class FileDigest(TypedDict):
    """Size and content of a file."""

    size: int
    sha256: str


class Damage(NamedTuple):
    """A file that is not what was written."""

    name: str
    """Path in the folder, in POSIX form."""
    reason: str
    """Predicate of a sentence about the file, such as ``is missing``."""

    def __str__(self) -> str:
        return f"{self.name} {self.reason}"


class _FileVersion(NamedTuple):
    """State of a file that its content belongs to; times are in nanoseconds."""

    size: int
    modified: int
    changed: int
    """Time of the last change of the file's data or attributes: copies cannot set it."""


_memories: dict[Path, dict[str, tuple[_FileVersion, str]]] = {}
"""Remembered hashes of this process, by the path of their file in the cache folder."""


def cache_dir() -> Path:
    """Return the cache folder as an absolute path, without creating it.

    It is VLDUET_CACHE if that is set, else ``vlduet`` in the user's cache folder: that of macOS or
    Windows, or elsewhere XDG_CACHE_HOME or ``~/.cache``.
    """
    override = os.environ.get("VLDUET_CACHE")
    if override:
        return Path(override).expanduser().absolute()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "vlduet"
    if sys.platform == "win32":
        return Path.home() / "AppData" / "Local" / "vlduet"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vlduet"


def list_files(folder: Path, *, exclude: Collection[str] = ()) -> list[str]:
    """Return the paths of all files below a folder, relative to it, in POSIX form and sorted.

    Args:
        folder: existing folder; links to files count as files, links to folders are not followed.
        exclude: relative paths to leave out, such as that of the manifest.
    """
    paths = (path for path in folder.rglob("*") if path.is_file())
    names = {path.relative_to(folder).as_posix() for path in paths}
    return sorted(names - set(exclude))


def hash_files(
    folder: Path, names: Iterable[str], *, reread: bool = False
) -> dict[str, FileDigest]:
    """Return size and SHA-256 of files in a folder by name, in the order of `names`.

    A file that has the size and the times of an earlier call is not read again. Several files are
    read at a time. New hashes of large files are remembered in the cache folder, if it is writable.

    Args:
        folder: folder that the names are relative to.
        names: paths of regular files, in POSIX form.
        reread: read every file, whatever is remembered.

    Raises:
        OSError: a file is missing or cannot be read, or is a folder, a pipe or a device.
    """
    versions = {name: _stat_version(folder / name) for name in names}
    memory = _read_memory(folder)
    hashes: dict[str, str] = {}
    for name, version in versions.items():
        if not reread and name in memory and memory[name][0] == version:
            hashes[name] = memory[name][1]
    unread = [name for name in versions if name not in hashes]
    if unread:
        with ThreadPoolExecutor(min(MAX_HASH_THREADS, os.cpu_count() or 1)) as pool:
            digests = pool.map(lambda name: _hash_file(folder / name), unread)
            hashes.update(zip(unread, digests, strict=True))
    now = time.time_ns()
    for name in unread:
        if max(versions[name].modified, versions[name].changed) < now - MIN_AGE_NS:
            memory[name] = versions[name], hashes[name]
    if sum(versions[name].size for name in unread) >= MIN_REMEMBERED_BYTES:
        _write_memory(folder, memory)
    return {name: {"size": versions[name].size, "sha256": hashes[name]} for name in versions}


def parse_files(value: object) -> dict[str, FileDigest]:
    """Return a list of files that was read from JSON; raise ValueError if it is none."""
    if not isinstance(value, dict):
        raise ValueError("no list of files")
    files: dict[str, FileDigest] = {}
    for name, digest in value.items():
        match digest:
            case {"size": int(size), "sha256": str(sha256)}:
                files[str(name)] = {"size": size, "sha256": sha256}
            case _:
                raise ValueError(f"no size and hash of {name}")
    return files


def find_damage(
    folder: Path, files: Mapping[str, FileDigest], *, reread: bool = False
) -> list[Damage]:
    """Return the files of a list that a folder lacks or has otherwise; [] if all are as listed.

    Contents are read only where all sizes are right. Files that are not in the list are ignored.

    Args:
        folder: folder that the names are relative to; it may be missing.
        files: size and SHA-256 by name, as from `hash_files`.
        reread: read every file, also those that were read before and have not changed since.
    """
    damage = [*_compare_sizes(folder, files)]
    if damage:
        return damage
    try:
        actual = hash_files(folder, files, reread=reread)
        different = [name for name in files if actual[name] != files[name]]
        if different and not reread:  # what is remembered may itself be damaged
            actual = hash_files(folder, different, reread=True)
    except OSError as error:
        name = Path(error.filename or "a file").name
        return [Damage(name, f"cannot be read ({error.strerror or error})")]
    return [Damage(name, CHANGED) for name in different if actual[name] != files[name]]


def _compare_sizes(folder: Path, files: Mapping[str, FileDigest]) -> Iterable[Damage]:
    """Yield the files that are missing, no regular files below `folder`, or of another size."""
    for name, digest in files.items():
        relative = PurePosixPath(name)
        if relative.is_absolute() or ".." in relative.parts:
            yield Damage(name, "is outside of the folder")
            continue
        try:
            size = _stat_version(folder / name).size
        except OSError as error:
            is_missing = isinstance(error, FileNotFoundError | NotADirectoryError)
            reason = "is missing" if is_missing else f"cannot be read ({error.strerror or error})"
            yield Damage(name, reason)
            continue
        if size != digest["size"]:
            yield Damage(name, f"has {size} bytes instead of {digest['size']}")


def _hash_file(path: Path) -> str:
    """Return the SHA-256 of a file's content in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _stat_version(path: Path) -> _FileVersion:
    """Return the version of a regular file; raise OSError for anything else, or nothing."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(None, "no regular file", str(path))
    return _FileVersion(status.st_size, status.st_mtime_ns, status.st_ctime_ns)


# --------------------------------------------------------------------- manifests


def seal_manifest(
    manifest: Mapping[str, Any], folder: Path, *, names: Iterable[str] | None = None
) -> dict[str, Any]:
    """Return a manifest with a list of files (``files``) and its own hash (``manifest_sha256``).

    Args:
        manifest: content of the manifest, which will be the last file that is written.
        folder: folder of the manifest.
        names: files to list, in POSIX form; None: all that the folder holds.
    """
    sealed = json.loads(json.dumps(manifest))  # as it will be read: tuples become lists
    sealed["files"] = hash_files(folder, list_files(folder) if names is None else names)
    return {**sealed, "manifest_sha256": _hash_manifest(sealed)}


def reseal_manifest(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return a changed manifest with the hash of its content; its list of files stays."""
    unsealed = {key: value for key, value in manifest.items() if key != "manifest_sha256"}
    content = json.loads(json.dumps(unsealed))
    return {**content, "manifest_sha256": _hash_manifest(content)}


def find_manifest_damage(
    folder: Path, manifest: Mapping[str, Any], *, name: str, reread: bool = False
) -> list[Damage]:
    """Return the damage of a manifest and of the files of its list; [] if there is none.

    One of an earlier version, without list and hash, has nothing to compare with.

    Args:
        folder: folder of the manifest.
        manifest: its content.
        name: name of its file.
        reread: see `find_damage`.
    """
    damage = [] if is_intact(manifest) else [Damage(name, CHANGED)]
    return damage + find_damage(folder, get_listed_files(manifest), reread=reread)


def describe_damage(
    folder: Path, manifest: Mapping[str, Any], *, name: str
) -> tuple[list[str], int]:
    """Return a line for each file that `find_manifest_damage` finds, and the number of listed ones.

    All of them are read.
    """
    damage = find_manifest_damage(folder, manifest, name=name, reread=True)
    lines = [f"{folder / file_name}: {reason}" for file_name, reason in damage]
    return lines, len(get_listed_files(manifest))


def verify_manifest(
    folder: Path,
    manifest: Mapping[str, Any],
    *,
    name: str,
    error_class: type[VLDuetError] = ModelError,
    fix: str = "Copy the folder again",
) -> None:
    """Check a folder against its manifest, as `find_manifest_damage` does.

    Raises:
        VLDuetError: of `error_class`, at the first damaged file.
    """
    for damage in find_manifest_damage(folder, manifest, name=name):
        raise error_class(damage.reason, place=folder / damage.name, fix=fix)


def is_intact(manifest: Mapping[str, Any]) -> bool:
    """Return whether a manifest has the hash of its content, or is of an earlier version."""
    is_sealed = "files" in manifest or "manifest_sha256" in manifest
    return not is_sealed or manifest.get("manifest_sha256") == _hash_manifest(manifest)


def get_listed_files(manifest: Mapping[str, Any], key: str = "files") -> dict[str, FileDigest]:
    """Return a list of files of a manifest, {} if it is broken or of an earlier version.

    A broken one is damage of the manifest, which its hash shows.
    """
    try:
        return parse_files(manifest.get(key, {}))
    except ValueError:
        return {}


def _hash_manifest(manifest: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a manifest's content without UNSEALED_KEYS, in any layout."""
    content = {key: value for key, value in manifest.items() if key not in UNSEALED_KEYS}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


# --------------------------------------------------------------------- remembered hashes


def _memory_path(folder: Path) -> Path:
    """Return the path of the file with the remembered hashes of a folder."""
    key = hashlib.sha256(str(folder.resolve()).encode("utf-8", "surrogateescape")).hexdigest()
    return cache_dir() / "hashes" / f"{key[:32]}.json"


def _read_memory(folder: Path) -> dict[str, tuple[_FileVersion, str]]:
    """Return version and hash of the files of a folder; {} if they are missing or unreadable.

    The result is a dict that this process keeps, and which the caller extends.
    """
    path = _memory_path(folder)
    if path not in _memories:
        try:
            rows = read_json_object(path, error_class=ModelError, fix="Delete it")
            _memories[path] = {
                str(name): (_FileVersion(size, modified, changed), str(sha256))
                for name, (size, modified, changed, sha256) in rows.items()
            }
        except (ModelError, ValueError, TypeError):
            _memories[path] = {}
    return _memories[path]


def _write_memory(folder: Path, memory: Mapping[str, tuple[_FileVersion, str]]) -> None:
    """Write the remembered hashes of a folder, without those of files that were deleted since.

    A cache that cannot be written is left as it is.
    """
    rows = {
        name: [*version, sha256]
        for name, (version, sha256) in memory.items()
        if (folder / name).exists()
    }
    path = _memory_path(folder)
    content = json.dumps(rows).encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: file.write(content))
    except OSError:
        return
