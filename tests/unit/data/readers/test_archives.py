"""Members of webdataset archives are rows; what is not read is counted, and a break reported."""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.record_files import (
    LLAVA,
    PNG,
    describe_messages,
    read_error,
    read_single,
    read_with_errors,
)
from vlduet.data import images
from vlduet.data.formats import read_records
from vlduet.data.jsonl_output import stream_to_jsonl
from vlduet.data.readers.archives import read_tar_rows
from vlduet.data.readers.rows import IgnoredData, ReadContext
from vlduet.data.record_json import parse_record, record_to_json
from vlduet.data.records import ImageRef, Place, Record
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


# --- which member is what

TEXTS = [  # (ending, value of the row beside the image; None: not read)
    ("txt", {"captions": ["a", "b"]}),
    ("TXT", {"captions": ["a", "b"]}),
    ("text", {"captions": ["a", "b"]}),
    ("captions", {"captions": ["a", "b"]}),
    ("output.txt", {"captions": ["a", "b"]}),
    ("caption.txt", {"captions": ["a", "b"]}),
    ("0.txt", {"captions": ["a", "b"]}),
    ("png.txt", {"captions": ["a", "b"]}),
    ("long.txt", {"long": "a\nb"}),
    ("negative_0.txt", {"negative_0": "a\nb"}),
    ("cls", {"cls": "a\nb"}),
    ("label.txt", None),
    ("input.txt", None),
    ("x.cls", None),
    ("npy", None),
    ("tar.gz", None),
]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(("ending", "expected"), TEXTS)
def test_a_member_is_read_by_its_ending_or_counted(
    ending: str, expected: dict[str, Any] | None, suffix: str, tmp_path: Path
) -> None:
    members = {"s0.input.png": PNG, f"s0.{ending}": b"\xef\xbb\xbfa\nb\n"}
    value, messages = read_value(write_tar(tmp_path / f"x{suffix}", members))
    assert images.read_bytes(value.pop("image")) == PNG
    assert value == (expected or {})
    assert len(messages) == (expected is None) and all(f"`*.{ending}`" in m for m in messages)


endings = st.lists(
    st.sampled_from(["png", "JPG", "txt", "json", "caption", "npy", "0", "1", "input", "seg", "é"]),
    min_size=1,
    max_size=3,
).map(".".join)


@settings(max_examples=150, deadline=None)
@given(st.sets(endings, min_size=1, max_size=5), st.sampled_from(SUFFIXES))
def test_every_member_is_in_the_row_or_counted(
    tmp_path_factory: pytest.TempPathFactory, names: set[str], suffix: str
) -> None:
    unique = {name.lower(): name for name in names}.values()
    contents = {
        name: b'{"v%d": "json %d"}' % (i, i) if name.lower().endswith("json") else b"text %d" % i
        for i, name in enumerate(unique)
    }
    shard = tmp_path_factory.getbasetemp() / f"members{suffix}"
    write_tar(shard, {f"k.{name}": data for name, data in contents.items()})
    context = ReadContext(shard.parent)
    rows = list(read_tar_rows(shard, context))
    assert all(row.error is None for row in rows)
    text = repr([_read_all(row.value) for row in rows])
    counted = " ".join(context.ignored.messages())
    for i, name in enumerate(contents):
        marker = f"json {i}'" if name.lower().endswith("json") else f"text {i}'"
        assert (marker in text) != (f"`*.{name.lower()}`" in counted), name


def _read_all(value: Any) -> Any:
    """Return the value of a row with the texts that its images hold instead of references."""
    if isinstance(value, ImageRef):
        return images.read_bytes(value).decode()
    if isinstance(value, dict):
        return {key: _read_all(item) for key, item in value.items()}
    return [_read_all(item) for item in value] if isinstance(value, list) else value


def test_numbered_images_are_ordered_by_number_and_named_images_are_counted(
    tmp_path: Path,
) -> None:
    names = ["10.png", "2.png", "seg.png", "png"]
    members = {f"k.{name}": name.encode() for name in names}
    value, messages = read_value(write_tar(tmp_path / "x.tar", members))
    assert [images.read_bytes(ref) for ref in value["images"]] == [b"png", b"2.png", b"10.png"]
    assert messages == ["1 archive member `*.seg.png`, not read"]


def test_equal_endings_are_one_line_of_the_report(tmp_path: Path) -> None:
    members = {f"{i:04d}.{ending}": PNG for i in range(1000) for ending in ("png", "output.npy")}
    records, errors, messages = read_counted(write_tar(tmp_path / "x.tar", members))
    assert len(records) == 1000 and errors == []
    assert messages == ["1,000 archive members `*.output.npy`, not read"]


@pytest.mark.parametrize("column", ["label.txt", "label", "LABEL.TXT"])
def test_a_member_can_be_named_as_a_column(column: str, tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "x.tar", {"k.png": PNG, "k.label.txt": b"A cat.", "k.txt": b"No."})
    (record,), errors, messages = read_counted(shard, caption=column)
    assert record.short == ("A cat.",) and errors == [] and "label" not in " ".join(messages)


def test_images_and_texts_of_a_query_and_its_candidates(tmp_path: Path) -> None:
    members = {
        "k.query.png": PNG,
        "k.query.txt": b"the same, but red",
        "k.positive.png": PNG + b"1",
        "k.negative_0.png": PNG + b"2",
    }
    (record,), errors, messages = read_counted(write_tar(tmp_path / "x.tar", members))
    assert errors == [] and messages == [] and record.kind == "retrieval"
    assert "the same, but red" in record.query and len(record.query) == 2
    contents = [images.read_bytes(ref) for ref in record.images()]
    assert contents == [PNG, PNG + b"1", PNG + b"2"]


def test_a_single_json_is_the_row_and_a_second_one_a_column(tmp_path: Path) -> None:
    members = {"k.png": PNG, "k.meta.json": b'{"price": 3}'}
    value, _ = read_value(write_tar(tmp_path / "x.tar", members))
    assert value["price"] == 3
    value, _ = read_value(write_tar(tmp_path / "x.tar", {**members, "k.json": b'{"year": 1990}'}))
    assert (value["year"], value["meta"]) == (1990, {"price": 3})


def test_captions_of_json_and_text_are_joined_and_replaced_keys_counted(tmp_path: Path) -> None:
    row = {"caption": "Other.", "captions": ["Third."], "long": "L", "cls": "7"}
    members = {
        "k.png": PNG,
        "k.txt": b"A cat.",
        "k.json": json.dumps(row).encode(),
        "k.long.txt": b"M",
        "k.cls": b"7",
    }
    value, messages = read_value(write_tar(tmp_path / "x.tar", members))
    assert value["captions"] == ["A cat.", "Third."] and value["caption"] == "Other."
    assert value["long"] == "M" and value["cls"] == "7"
    assert messages == ["1 row with a column `long` that is not read"]


def test_files_that_archivers_add_are_skipped_and_hidden_ones_counted(tmp_path: Path) -> None:
    members = {
        "./._k.png": b"resource fork",
        "./k.png": PNG,
        "./._k.txt": b"resource fork",
        "./k.txt": b"A cat.",
        "__MACOSX/k.png": b"x",
        "PaxHeaders.12/k.png": b"x",
        ".DS_Store": b"x",
        ".cache/a.png": PNG,
        ".cache/b.png": PNG,
        "LICENSE": b"x",
    }
    (record,), errors, messages = read_counted(write_tar(tmp_path / "x.tar.gz", members))
    assert (record.id, record.short) == ("x/k", ("A cat.",)) and errors == []
    assert messages == [
        "2 archive members `.cache`, not read",
        "1 archive member `LICENSE`, not read",
    ]


# --- rows that are wrong

SPLIT = [("a.png", PNG), ("b.png", PNG), ("a.txt", b"one"), ("b.txt", b"two")]


def test_members_of_a_key_may_lie_apart_in_an_uncompressed_archive(tmp_path: Path) -> None:
    records = list(read_records(write_tar(tmp_path / "x.tar", SPLIT)))
    assert [(record.id, record.short) for record in records] == [
        ("x/a", ("one",)),
        ("x/b", ("two",)),
    ]


def test_members_of_a_key_that_lie_apart_in_a_compressed_archive_are_errors(
    tmp_path: Path,
) -> None:
    _, errors = read_with_errors(write_tar(tmp_path / "x.tar.gz", SPLIT))
    assert [error.place for error in errors] == [f"{tmp_path / 'x.tar.gz'}:{key}" for key in "ab"]
    assert all("no neighbours" in error.message for error in errors)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.png", PNG), ("a.PNG", PNG)], "two members 'png'"),
        ([("a.png", PNG), ("a.json", b"[1]")], "not a JSON object"),
        ([("a.png", PNG), ("a.json", b"{")], "broken JSON"),
        ([("a.png", PNG), ("a.txt", b"\xff")], "broken text"),
        ([(os.fsdecode(b"a\xe9.png"), PNG)], "not UTF-8"),
    ],
)
def test_a_wrong_member_is_the_error_of_its_row(
    members: list[tuple[str, bytes]], message: str, suffix: str, tmp_path: Path
) -> None:
    shard = write_tar(tmp_path / f"x{suffix}", [*members, ("b.png", PNG)])
    (record,), (error,) = read_with_errors(shard)
    assert record.id == "x/b" and message in error.message and str(error).isascii()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_truncated_archive_gives_its_complete_rows_and_one_error(
    suffix: str, tmp_path: Path
) -> None:
    noise = os.urandom(60_000)
    members = {"a.png": PNG, "a.txt": b"one", "b.png": PNG + noise, "b.txt": b"two"}
    shard = write_tar(tmp_path / f"x{suffix}", members)
    shard.write_bytes(shard.read_bytes()[:40_000])
    (record,), (error,) = read_with_errors(shard)
    assert record.id == "x/a" and "truncated" in error.message


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_archive_behind_another_one_is_an_error_not_ignored(suffix: str, tmp_path: Path) -> None:
    first, second = (write_tar(tmp_path / f"{name}{suffix}", {f"{name}.png": PNG}) for name in "ab")
    first.write_bytes(first.read_bytes() + second.read_bytes())
    _, errors = read_with_errors(first)
    assert len(errors) == 1 and "data behind the end" in errors[0].message


def test_a_member_of_negative_size_is_an_error(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "x.tar", {"a.png": PNG})
    info = tarfile.TarInfo("b.png")
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = tarfile.itn(-1024, 12, tarfile.GNU_FORMAT)
    header[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(header))[0]
    shard.write_bytes(shard.read_bytes()[:1024] + bytes(header) + bytes(10240))
    _, errors = read_with_errors(shard)
    assert len(errors) == 1 and "negative size" in errors[0].message


# --- images in the archive


def test_only_images_of_a_compressed_archive_are_in_memory(tmp_path: Path) -> None:
    for suffix in SUFFIXES:
        record = read_single(write_tar(tmp_path / f"x{suffix}", {"a.png": PNG, "a.txt": b"one"}))
        assert record.image is not None and (record.image.data is None) == (suffix == ".tar")
        assert images.load_image(record.image).size == (4, 4)


def test_an_archive_that_changes_or_disappears_is_an_image_error(tmp_path: Path) -> None:
    members = {"a.png": PNG, "b.png": PNG}
    shard = write_tar(tmp_path / "x.tar", members)
    ref, _ = (record.image for record in read_records(shard))
    assert ref is not None and ref.name == f"{shard}:a.png"
    content = shard.read_bytes()
    for change in (content[:700], content + bytes(512), content.replace(b"a.png", b"c.png")):
        shard.write_bytes(change)
        os.utime(shard, ns=(1, 1))
        with pytest.raises(ImageError, match=r"has changed") as caught:
            images.load_image(ref)
        assert caught.value.place == f"{shard}:a.png" and caught.value.fix
    shard.unlink()
    with pytest.raises(ImageError, match="No such file"):
        images.load_image(ref)


def test_images_of_an_archive_become_files_of_converted_records(tmp_path: Path) -> None:
    members = {"a.png": PNG, "a.txt": b"one", "b.png": PNG, "b.txt": b"two"}
    records = list(read_records(write_tar(tmp_path / "x.tar", members)))
    target = tmp_path / "out" / "y.jsonl"
    assert list(stream_to_jsonl(records, target)) == records
    converted = list(read_records(target))
    assert [record.short for record in converted] == [("one",), ("two",)]
    (image,) = (tmp_path / "out" / "y-images").iterdir()
    assert image.read_bytes() == PNG and image.suffix == ".png"
    assert {record.images()[0].path for record in converted} == {image}
    inline = parse_record(
        record_to_json(records[0], root=tmp_path), place=Place("x"), root=tmp_path
    )
    assert inline.image == ImageRef(data=PNG)


def test_an_archive_without_known_images_names_the_members_that_are_not_read(
    tmp_path: Path,
) -> None:
    shard = write_tar(tmp_path / "x.tar", {"a.psd": b"x", "a.txt": b"one"})
    assert "1 archive member `*.psd`, not read" in str(read_error(shard))


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_an_extended_header_of_any_size_is_refused(
    suffix: str, is_first: bool, kind: bytes, tmp_path: Path
) -> None:
    header = tarfile.TarInfo("PaxHeaders/a")
    header.type, header.size = kind, 2 * 2**20
    bomb = header.tobuf(tarfile.USTAR_FORMAT) + b"10 a=bcde\n".ljust(2 * 2**20, b"\0")
    text = tarfile.TarInfo("a.txt")
    text.size = 1
    member = text.tobuf(tarfile.USTAR_FORMAT) + b"x".ljust(512, b"\0")
    content = (bomb + member if is_first else member + bomb) + bytes(1024)
    path = tmp_path / f"a{suffix}"
    path.write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    rows = list(read_tar_rows(path, ReadContext(tmp_path, {}, IgnoredData())))
    errors = [row.error for row in rows if row.error is not None]
    assert len(errors) == 1 and "header of 2 MiB" in str(errors[0]) and path.name in str(errors[0])
