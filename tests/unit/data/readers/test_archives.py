"""Members of webdataset archives are rows; whatever is not read is counted, and a break reported."""

from __future__ import annotations

import io
import itertools
import json
import os
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.record_files import LLAVA, PNG, describe_messages, read_single, read_with_errors
from vlduet.data import images
from vlduet.data.formats import read_records
from vlduet.data.readers.archives import read_tar_rows
from vlduet.data.readers.rows import IgnoredData, ReadContext
from vlduet.data.records import ImageRef, Record
from vlduet.errors import DataError, ImageError

SUFFIXES = (".tar", ".tar.gz")
Members = Mapping[str, bytes] | Sequence[tuple[str, bytes]]


def write_tar(path: Path, members: Members, *, link: str | None = None) -> Path:
    """Write an archive of files and, at its end, of a link to a system file."""
    pairs = members.items() if isinstance(members, Mapping) else members
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        for name, data in pairs:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        if link:
            info = tarfile.TarInfo(link)
            info.type = tarfile.SYMTYPE
            info.linkname = "/etc/passwd"
            archive.addfile(info)
    return path


def read_counted(path: Path, **columns: str) -> tuple[list[Record], list[DataError], list[str]]:
    """Return the records of an archive, the errors of other rows, and what was not read."""
    ignored = IgnoredData()
    errors: list[DataError] = []
    records = read_records(path, columns=columns, ignored=ignored, on_error=errors.append)
    return list(records), errors, ignored.messages()


def read_value(path: Path) -> tuple[dict[str, Any], list[str]]:
    """Return the value of the only row of an archive, and what was not read."""
    context = ReadContext(path.parent)
    (row,) = read_tar_rows(path, context)
    assert row.error is None
    return row.value, context.ignored.messages()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_members_of_one_key_are_a_row_and_links_are_refused(suffix: str, tmp_path: Path) -> None:
    members = {
        "0/a.png": PNG,
        "0/a.txt": b"A cat.",
        "0/a.json": b'{"year": 1990, "caption": "A cat."}',
    }
    shard = write_tar(tmp_path / f"x-000{suffix}", members, link="z.png")
    (record,), (error,) = read_with_errors(shard)
    assert (record.id, record.short, record.metadata) == ("x-000/0/a", ("A cat.",), {"year": 1990})
    assert record.image is not None and images.read_bytes(record.image) == PNG
    assert error.place == f"{shard}:z.png" and "refused" in error.message
    assert list(tmp_path.iterdir()) == [shard], "nothing is unpacked"


def test_the_json_of_a_member_may_have_any_format(tmp_path: Path) -> None:
    row = json.dumps({**LLAVA, "id": "b", "image": "gone.png"}).encode()
    shard = write_tar(tmp_path / "x.tar", {"b.png": PNG, "b.json": row})
    chat = read_single(shard)
    assert chat.id == "b" and describe_messages(chat)[0] == ("user", ["bytes", "What?"])
