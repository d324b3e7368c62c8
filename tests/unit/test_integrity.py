"""Lists of files: every damage is found, and unchanged files are read once."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vlduet import integrity
from vlduet.integrity import Damage, find_damage, hash_files, list_files, parse_files

CONTENTS = {"a.bin": b"0123456789", "sub/b.bin": b"abcdefghij", "sub/deep/c": b"", "d": b"x"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder in which also hashes of small files are remembered."""
    monkeypatch.setenv("VLDUET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(integrity, "MIN_REMEMBERED_BYTES", 1)
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the files of CONTENTS, written a minute ago."""
    return write_folder(tmp_path / "folder")


def write_folder(folder: Path) -> Path:
    for name, content in CONTENTS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def read_names(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are read to be hashed, in a process that remembers nothing."""
    names: list[str] = []
    hash_file = integrity._hash_file

    def hash_and_record(path: Path) -> str:
        names.append(path.name)
        return hash_file(path)

    monkeypatch.setattr(integrity, "_hash_file", hash_and_record)
    monkeypatch.setattr(integrity, "_memories", {})
    return names


def test_a_list_has_all_files_with_size_and_hash(folder: Path) -> None:
    assert list_files(folder, exclude=["d"]) == ["a.bin", "sub/b.bin", "sub/deep/c"]
    files = hash_files(folder, list_files(folder))
    assert files == {
        name: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in CONTENTS.items()
    }
    assert parse_files(json.loads(json.dumps(files))) == files
    assert find_damage(folder, files) == []


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_every_change_of_a_byte_or_a_size_is_found(folder: Path, data: st.DataObject) -> None:
    write_folder(folder)
    files = hash_files(folder, CONTENTS)
    name = data.draw(st.sampled_from(sorted(CONTENTS)))
    content = bytearray(CONTENTS[name])
    position = data.draw(st.integers(0, len(content)))
    if position == len(content):
        content += b"?"
    elif data.draw(st.booleans()):
        content[position] ^= data.draw(st.integers(1, 255))
    else:
        del content[position]
    (folder / name).write_bytes(content)
    assert [damage.name for damage in find_damage(folder, files)] == [name]


def test_missing_exchanged_and_foreign_files_are_named(folder: Path, tmp_path: Path) -> None:
    files = hash_files(folder, CONTENTS)
    (folder / "d").unlink()
    shutil.rmtree(folder / "sub" / "deep")
    (folder / "sub" / "deep").write_text("")
    (folder / "sub" / "b.bin").unlink()
    (folder / "sub" / "b.bin").mkdir()
    reasons = dict(find_damage(folder, files))
    assert reasons.pop("sub/b.bin").startswith("cannot be read")
    assert reasons == dict.fromkeys(["d", "sub/deep/c"], "is missing")
    shutil.rmtree(folder)
    assert len(find_damage(folder, files)) == len(files)
    write_folder(folder)
    (folder / "a.bin").rename(folder / "third")
    (folder / "sub" / "b.bin").rename(folder / "a.bin")
    (folder / "third").rename(folder / "sub" / "b.bin")
    assert {damage.name for damage in find_damage(folder, files)} == {"a.bin", "sub/b.bin"}
    for name in ("../d", str(tmp_path / "d")):
        assert find_damage(folder, {name: files["d"]}) == [Damage(name, "is outside of the folder")]


def test_a_pipe_is_not_waited_for(folder: Path) -> None:
    files = hash_files(folder, ["d"])
    (folder / "d").unlink()
    os.mkfifo(folder / "d")
    assert [str(damage) for damage in find_damage(folder, files)] == [
        "d cannot be read (no regular file)"
    ]


def test_an_unchanged_file_is_read_once_also_by_another_process(
    folder: Path, read_names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(integrity, "MIN_AGE_NS", 0)
    time.sleep(0.02)
    files = hash_files(folder, CONTENTS)
    assert sorted(read_names) == ["a.bin", "b.bin", "c", "d"]
    read_names.clear()
    assert find_damage(folder, files) == [] and read_names == []
    integrity._memories.clear()
    assert find_damage(folder, files) == [] and read_names == []
    assert find_damage(folder, files, reread=True) == [] and len(read_names) == 4
    read_names.clear()
    (folder / "d").write_bytes(b"y")
    assert [damage.name for damage in find_damage(folder, files)] == ["d"]
    assert set(read_names) == {"d"}


def test_a_content_of_the_same_size_and_time_is_found(folder: Path, read_names: list[str]) -> None:
    """Copies that keep the time of modification do not keep the time of change."""
    files = hash_files(folder, CONTENTS)
    status = (folder / "a.bin").stat()
    time.sleep(0.02)
    (folder / "a.bin").write_bytes(b"9876543210")
    os.utime(folder / "a.bin", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert [damage.name for damage in find_damage(folder, files)] == ["a.bin"]


def test_a_file_younger_than_two_seconds_is_hashed_again(
    folder: Path, read_names: list[str]
) -> None:
    """The clock of a file system may not tell apart two changes within its resolution."""
    files = hash_files(folder, CONTENTS)
    read_names.clear()
    assert find_damage(folder, files) == [] and len(read_names) == 4


@pytest.mark.parametrize(
    "content", [b"", b"[]", b'{"d": 4}', b'{"d": [1, 2]}', b"\xff\xfe", b"[" * 5000, b"{"]
)
def test_a_damaged_or_missing_memory_is_no_error(
    content: bytes, folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(integrity, "MIN_AGE_NS", 0)
    files = hash_files(folder, CONTENTS)
    (memory,) = (cache / "hashes").iterdir()
    memory.write_bytes(content)
    monkeypatch.setattr(integrity, "_memories", {})
    assert find_damage(folder, files) == []


def test_a_wrong_remembered_hash_is_corrected(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(integrity, "MIN_AGE_NS", 0)
    time.sleep(0.02)
    files = hash_files(folder, CONTENTS)
    (memory,) = (cache / "hashes").iterdir()
    memory.write_text(memory.read_text().replace(files["d"]["sha256"], "0" * 64))
    monkeypatch.setattr(integrity, "_memories", {})
    assert hash_files(folder, ["d"])["d"]["sha256"] == "0" * 64
    assert find_damage(folder, files) == []


def test_a_read_only_cache_of_hashes_is_no_error(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VLDUET_CACHE", str(tmp_path / "file" / "cache"))
    assert find_damage(folder, hash_files(folder, CONTENTS)) == []


@pytest.mark.parametrize(
    "value", [None, [], {"a": 1}, {"a": {"size": 1}}, {"a": {"size": "1", "sha256": ""}}]
)
def test_what_is_no_list_of_files_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match=r"no (list|size)"):
        parse_files(value)
