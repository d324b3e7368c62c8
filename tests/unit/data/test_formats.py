"""Everybody's formats become records; what is wrong is named by file, line and field, and the rest goes on."""

from __future__ import annotations

import base64
import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.tiny import random_image
from vlduet.data.formats import (
    FORMATS,
    check_output_path,
    detect_format,
    read_records,
    stream_to_jsonl,
)
from vlduet.data.readers.rows import SourceRow
from vlduet.data.records import ImageRef, Place, Record
from vlduet.errors import DataError

PNG = random_image(side=4).data
assert PNG is not None
URL = "data:image/png;base64," + base64.b64encode(PNG).decode()


def lines(path: Path, *rows: Any) -> Path:
    path.write_text(
        "".join(json.dumps(row) + "\n" if not isinstance(row, str) else row + "\n" for row in rows)
    )
    return path


def only(path: Path, format: str | None = None) -> Record:
    (record,) = read_records(path, format=format)
    return record


def turns(record: Record) -> list[tuple[str, list[str]]]:
    """Images as their file names."""
    return [
        (m.role, [p if isinstance(p, str) else p.path.name if p.path else "bytes" for p in m.parts])
        for m in record.messages
    ]


def error_of(path: Path, format: str | None = None) -> DataError:
    with pytest.raises(DataError) as caught:
        list(read_records(path, format=format))
    assert caught.value.fix, "an error without a remedy"
    return caught.value


LLAVA = {
    "id": "7",
    "image": "a.png",
    "conversations": [
        {"from": "human", "value": "<image>\nWhat?"},
        {"from": "gpt", "value": "A cat."},
    ],
}
OPENAI = {
    "messages": [
        {"role": "developer", "content": "Be brief."},
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": URL}},
                {"type": "text", "text": "What?"},
            ],
        },
        {"role": "assistant", "content": "A cat."},
    ]
}
TRL = {
    "images": ["a.png"],
    "messages": [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
    ],
}
TRL_PROMPT = {
    "images": ["a.png"],
    "prompt": [{"role": "user", "content": "What?"}],
    "completion": "A cat.",
}
SWIFT = {
    "images": ["a.png"],
    "messages": [
        {"role": "user", "content": "<image>What?"},
        {"role": "assistant", "content": "A cat."},
    ],
}
SWIFT_QUERY = {
    "images": "a.png",
    "query": "<image>What?",
    "response": "A cat.",
    "history": [["Hi", "Hello"]],
}
MMEB = {
    "qry": "<|image_1|>\nFind its caption.",
    "qry_image_path": "a.png",
    "pos_text": "A cat.",
    "pos_image_path": "",
    "neg_text": ["A dog.", "A bird."],
    "neg_image_path": ["", "b.png"],
}
CHAT = [("user", ["a.png", "What?"]), ("assistant", ["A cat."])]


@pytest.mark.parametrize(
    ("row", "format", "expected"),
    [
        (LLAVA, "llava", CHAT),
        (
            OPENAI,
            "messages",
            [("system", ["Be brief."]), ("user", ["bytes", "What?"]), ("assistant", ["A cat."])],
        ),
        (TRL, "messages", CHAT),
        (TRL_PROMPT, "messages", CHAT),
        (SWIFT, "ms-swift", CHAT),
        (SWIFT_QUERY, "ms-swift", [("user", ["Hi"]), ("assistant", ["Hello"]), *CHAT]),
    ],
    ids=["llava", "openai", "trl", "trl prompt", "ms-swift", "ms-swift query"],
)
@pytest.mark.parametrize("ending", [".jsonl", ".json", ".parquet"])
def test_chats(
    row: dict[str, Any], format: str, expected: list[Any], ending: str, tmp_path: Path
) -> None:
    if ending == ".parquet" and row is OPENAI:
        pytest.skip("a column of both strings and lists is no table")
    source = tmp_path / f"x{ending}"
    if ending == ".parquet":
        pa.parquet.write_table(pa.Table.from_pylist([row]), source)
    else:
        source.write_text(json.dumps(row if ending == ".jsonl" else [row]))
    assert detect_format(source) == format
    record = only(source)
    assert turns(record) == expected and record.kind == "chat"
    assert record.id == row.get("id", f"x{ending}:1")
    for ref in record.images():
        assert ref.path is None or ref.path == tmp_path / ref.path.name


def test_several_llava_images_go_to_their_tags(tmp_path: Path) -> None:
    row = {**LLAVA, "image": ["a.png", "b.png"]}
    row["conversations"] = [
        {"from": "human", "value": "<image> and <image>?"},
        {"from": "gpt", "value": "Two."},
    ]
    assert turns(only(lines(tmp_path / "x.jsonl", row)))[0] == (
        "user",
        ["a.png", "and", "b.png", "?"],
    )


def test_mmeb(tmp_path: Path) -> None:
    record = only(lines(tmp_path / "x.jsonl", MMEB))
    a, b = ImageRef(path=tmp_path / "a.png"), ImageRef(path=tmp_path / "b.png")
    assert record.kind == "retrieval" and record.query == (a, "Find its caption.")
    assert record.positive == (("A cat.",),) and record.negative == (("A dog.",), (b, "A bird."))
    evaluation = {
        "qry_text": "boat",
        "qry_img_path": "",
        "tgt_text": ["", ""],
        "tgt_img_path": ["a.png", "b.png"],
    }
    record = only(lines(tmp_path / "y.jsonl", evaluation))
    assert (record.positive, record.negative) == (((a,),), ((b,),))


def test_our_own_jsonl_and_a_json_list(tmp_path: Path) -> None:
    rows = [
        {"id": "a", "image": "a.png", "short": "x"},
        {"id": "b", "parts": [{"text": "One. Two."}]},
    ]
    ours = list(read_records(lines(tmp_path / "x.jsonl", *rows)))
    assert [r.kind for r in ours] == ["pair", "interleaved"] and ours[1].parts == ("One.", "Two.")
    (tmp_path / "x.json").write_text(json.dumps(rows, indent=1))
    assert list(read_records(tmp_path / "x.json")) == ours
    other = next(read_records(tmp_path / "x.jsonl", root=tmp_path / "images"))
    assert other.image == ImageRef(path=tmp_path / "images" / "a.png")


def test_folder_of_images(tmp_path: Path) -> None:
    for name in ("b.png", "deep/a.PNG", ".hidden/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(PNG)
    (tmp_path / "deep" / "a.txt").write_text("A cat.\n\nTwo cats.\n")
    (tmp_path / "notes.md").write_text("no image")
    records = list(read_records(tmp_path))
    assert [(r.id, r.short) for r in records] == [
        ("b.png", ()),
        ("deep/a.PNG", ("A cat.", "Two cats.")),
    ]
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe")
    errors: list[DataError] = []
    assert [r.id for r in read_records(tmp_path, on_error=errors.append)] == ["deep/a.PNG"]
    assert [e.place for e in errors] == [str(tmp_path / "b.txt")]


@pytest.mark.parametrize(("ending", "tab"), [("csv", ","), ("csv", ";"), ("tsv", "\t")])
def test_csv(ending: str, tab: str, tmp_path: Path) -> None:
    source = tmp_path / f"x.{ending}"
    rows = [
        ["file_name", "caption", "title", "year"],
        ["a.png", '"one\ntwo"', "T", "1990"],
        ["b.png", "", "", ""],
    ]
    source.write_text("\ufeff" + "\n".join(tab.join(row) for row in rows))
    first, second = read_records(source)
    assert first.image == ImageRef(path=tmp_path / "a.png") and first.short == ("one\ntwo", "T")
    assert first.metadata == {"year": "1990"} and (first.id, second.id) == (
        f"x.{ending}:2",
        f"x.{ending}:4",
    )
    assert second.short == () and second.place is not None and second.place.line == 4


def test_broken_csv_rows_do_not_stop_the_others(tmp_path: Path) -> None:
    source = tmp_path / "x.csv"
    source.write_bytes(
        b'image,caption\na.png,one\nb.png,two,three\nc.png,\xff\nd.png,"x" y\n,no image\ne.png,five\n'
    )
    errors: list[DataError] = []
    assert [r.short for r in read_records(source, on_error=errors.append)] == [("one",), ("five",)]
    assert [str(e.place).removeprefix(str(source)) for e in errors] == [
        ":3:three",
        ":4:caption",
        ":5",
        ":6:image",
    ]
    assert all(e.fix for e in errors)


def image_table() -> pa.Table:
    rows = [
        {"image": {"bytes": PNG, "path": "a.png"}, "text": "one"},
        {"image": {"bytes": None, "path": "b.png"}},
    ]
    return pa.Table.from_pylist(rows)


def check_image_table(source: Path, root: Path) -> None:
    first, second = read_records(source)
    assert first.image == ImageRef(data=PNG) and first.short == ("one",)
    assert second.image == ImageRef(path=root / "b.png") and second.short == ()


def test_parquet_and_arrow(tmp_path: Path) -> None:
    table = image_table()
    pa.parquet.write_table(table, tmp_path / "x.parquet")
    check_image_table(tmp_path / "x.parquet", tmp_path)
    for name, new in (("stream.arrow", pa.ipc.new_stream), ("file.arrow", pa.ipc.new_file)):
        with new(tmp_path / name, table.schema) as writer:
            writer.write_table(table)
        check_image_table(tmp_path / name, tmp_path)


def test_a_saved_hugging_face_dataset(tmp_path: Path) -> None:
    table, folder = image_table(), tmp_path / "saved" / "train"
    folder.mkdir(parents=True)
    with pa.ipc.new_stream(folder / "data-00000-of-00001.arrow", table.schema) as writer:
        writer.write_table(table)
    (folder / "dataset_info.json").write_text("{}")
    (folder / "state.json").write_text(
        json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]})
    )
    check_image_table(folder, folder)
    (folder.parent / "dataset_dict.json").write_text('{"splits": ["train"]}')
    assert f"Name one: {folder}" in str(error_of(folder.parent))


def tar(path: Path, members: dict[str, bytes], *, link: str | None = None) -> Path:
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        if link:
            info = tarfile.TarInfo(link)
            info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
            archive.addfile(info)
    return path


def test_webdataset(tmp_path: Path) -> None:
    members = {
        "0/a.png": PNG,
        "0/a.txt": b"A cat.",
        "0/a.json": b'{"year": 1990, "caption": "A cat."}',
    }
    members |= {
        "b.png": PNG,
        "b.json": json.dumps({**LLAVA, "id": "b", "image": "gone.png"}).encode(),
    }
    tar(tmp_path / "x-000.tar", {k: v for k, v in members.items() if k[0] == "0"}, link="z.png")
    tar(tmp_path / "x-001.tar", {k: v for k, v in members.items() if k[0] == "b"})
    errors: list[DataError] = []
    (record,) = read_records(tmp_path / "x-000.tar", on_error=errors.append)
    assert (record.id, record.short, record.metadata) == ("x-000/0/a", ("A cat.",), {"year": 1990})
    assert record.image == ImageRef(data=PNG)
    assert [e.place for e in errors] == [f"{tmp_path / 'x-000.tar'}:z.png"] and "refused" in errors[
        0
    ].message
    chat = only(tmp_path / "x-001.tar")
    assert chat.id == "b" and turns(chat)[0] == ("user", ["bytes", "What?"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x-000.tar", "x-001.tar"], (
        "nothing is unpacked"
    )


def test_a_truncated_shard_or_table_gives_what_it_holds_and_one_error(tmp_path: Path) -> None:
    shard = tar(tmp_path / "x.tar", {"a.png": PNG, "a.txt": b"one", "b.png": PNG * 100})
    shard.write_bytes(shard.read_bytes()[: 512 * 8])
    errors: list[DataError] = []
    records = list(read_records(shard, on_error=errors.append))
    assert (
        [r.id for r in records] == ["x/a"] and len(errors) == 1 and "truncated" in errors[0].message
    )
    (tmp_path / "x.parquet").write_bytes(b"PAR1 nonsense")
    assert "broken parquet" in str(error_of(tmp_path / "x.parquet"))


# --- what is wrong, where, and what to do ----------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "field", "says"),
    [
        ({**LLAVA, "image": ["a.png", "b.png"]}, "image", "2 images, but 1 <image>"),
        (
            {k: v for k, v in LLAVA.items() if k != "image"},
            "conversations[0].value",
            "more than there are images",
        ),
        (
            {**LLAVA, "conversations": [{"from": "cat", "value": "x"}]},
            "conversations[0].from",
            "'cat'",
        ),
        (
            {**LLAVA, "conversations": LLAVA["conversations"][:1]},
            "conversations",
            "no assistant turn",
        ),
        ({**LLAVA, "video": "a.mp4"}, "video", "not supported"),
        ({**TRL, "images": []}, "messages[0].content[0]", "no image left"),
        ({**TRL, "images": ["a.png", "b.png"]}, "images", "2 images, but places for 1"),
        (
            {"messages": [{"role": "usr", "content": "x"}]},
            "messages[0].role",
            "Did you mean 'user'?",
        ),
        ({**TRL, "images": ["http://x/a.png"]}, "images[0]", "is a URL"),
        ({**SWIFT, "images": []}, "messages[0].content", "more than there are images"),
        ({**SWIFT_QUERY, "history": [["Hi"]]}, "history[0]", "not a pair"),
        ({**SWIFT_QUERY, "response": ""}, "response", "expected text"),
        ({**MMEB, "pos_text": ""}, "pos_text", "neither text nor image"),
        ({**MMEB, "neg_image_path": [""]}, "neg_image_path", "2 texts for 1 images"),
        ({**MMEB, "qry_image_path": ""}, "qry", "more than there are images"),
        (
            {"file": "a.png", "path": "b.png", "text": "x"},
            "image",
            "several image columns: file, path",
        ),
        ({"image": "a.png", "caption": 7}, "caption", "expected text"),
        ({"id": "a", "image": "a.png", "shrt": "x"}, "shrt", "Did you mean 'short'?"),
        ({"image": "a.png", "text": "x", "id": True}, "id", "id is bool"),
    ],
)
def test_errors_name_file_line_field_and_fix(
    row: dict[str, Any], field: str, says: str, tmp_path: Path
) -> None:
    source = lines(tmp_path / "x.jsonl", "", row)
    error = error_of(source)
    assert error.place == f"{source}:2:{field}" and says in str(error)


def test_broken_lines_do_not_stop_the_others(tmp_path: Path) -> None:
    good = {"id": "a", "image": "a.png", "short": "x"}
    source = lines(tmp_path / "x.jsonl", "{broken", {**good, "extra": 1}, "[1]", good, {"id": "b"})
    source.write_bytes(source.read_bytes() + b'{"id": "\xff"}\n')
    errors: list[DataError] = []
    assert [r.id for r in read_records(source, format="records", on_error=errors.append)] == ["a"]
    assert [str(e.place).removeprefix(f"{source}:") for e in errors] == [
        "1",
        "2:extra",
        "3",
        "5",
        "6",
    ]


def test_a_json_list_counts_its_lines(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(
        '[\n{"id": "a", "image": "a.png"},\n{"id": "", "image": "b.png"},\n{"id": oops}]'
    )
    errors: list[DataError] = []
    assert [r.id for r in read_records(tmp_path / "x.json", on_error=errors.append)] == ["a"]
    assert [str(e.place).removeprefix(f"{tmp_path / 'x.json'}:") for e in errors] == ["3:id", "4"]


def test_unknown_things_say_what_is_accepted(tmp_path: Path) -> None:
    source = lines(tmp_path / "x.jsonl", LLAVA)
    with pytest.raises(
        DataError, match=r"no format 'lava'.*Did you mean 'llava'\? Known: .*ms-swift"
    ):
        read_records(source, format="lava")
    unknown = str(error_of(lines(tmp_path / "y.jsonl", {"a": 1, "b": 2})))
    assert "not recognised by its keys: a, b" in unknown and all(
        name in unknown for name in FORMATS
    )
    (tmp_path / "x.xlsx").write_bytes(b"")
    assert ".parquet" in str(error_of(tmp_path / "x.xlsx"))
    assert "no such file" in str(error_of(tmp_path / "gone.jsonl"))
    (tmp_path / "empty").mkdir()
    assert "neither images nor records" in str(error_of(tmp_path / "empty"))
    lines(tmp_path / "empty" / "train.jsonl", LLAVA)
    assert only(tmp_path / "empty").kind == "chat"
    lines(tmp_path / "empty" / "test.jsonl", LLAVA)
    assert "several files of records" in str(error_of(tmp_path / "empty"))


SAMPLES = (
    LLAVA,
    OPENAI,
    TRL,
    TRL_PROMPT,
    SWIFT,
    SWIFT_QUERY,
    MMEB,
    {"image": "a.png", "caption": "x", "long": "y"},
)
junk = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from(["", "x", "<image>", "user", "image", "a.png"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "type", "from", "value", "image_url", "bytes"]),
            inner,
        )
    ),
    max_leaves=5,
)


@settings(max_examples=300, deadline=None)
@given(st.data(), st.sampled_from(SAMPLES), st.sampled_from(sorted(FORMATS)))
def test_whatever_stands_in_a_row_it_is_a_record_or_a_data_error(
    data: Any, row: dict[str, Any], name: str
) -> None:
    keys = st.sampled_from(sorted({key for sample in SAMPLES for key in sample}))
    value = row | data.draw(st.dictionaries(keys, junk, max_size=2))
    try:
        assert isinstance(
            FORMATS[name].parse_row(SourceRow(Place("x", 1), Path(), "x:1", value)), Record
        )
    except DataError as error:
        assert error.place is not None and error.place.startswith("x:1") and error.fix
    for known in FORMATS.values():
        known.matches(value)


def test_an_empty_file_has_no_records(tmp_path: Path) -> None:
    for name in ("x.jsonl", "x.json", "x.csv"):
        (tmp_path / name).write_text("")
        assert list(read_records(tmp_path / name)) == []


def test_reading_is_lazy(tmp_path: Path) -> None:
    good = {"id": "a", "image": "a.png", "short": "x"}
    source = lines(tmp_path / "x.jsonl", *[good] * 100, "{broken")
    assert next(read_records(source)).id == "a"


def test_convert_writes_embedded_images_to_files(tmp_path: Path) -> None:
    pa.parquet.write_table(image_table(), tmp_path / "x.parquet")
    target = tmp_path / "out" / "y.jsonl"
    assert len(list(stream_to_jsonl(read_records(tmp_path / "x.parquet"), target))) == 2
    first, second = read_records(target)
    assert (
        first.image is not None
        and first.image.path is not None
        and first.image.path.read_bytes() == PNG
    )
    assert second.image is not None and second.image.path is not None
    assert second.image.path.resolve() == (tmp_path / "b.png").resolve()
    assert sorted(p.name for p in target.parent.iterdir()) == ["y-images", "y.jsonl"]


def test_splits_with_dots_in_their_names_are_not_shards_and_listings_are_no_records(
    tmp_path: Path,
) -> None:
    row = {"id": "a", "parts": [{"text": "x"}]}
    lines(tmp_path / "coco.train.jsonl", row)
    assert only(tmp_path).id == "a"
    lines(tmp_path / "coco.train.quarantine.jsonl", {"id": "b", "place": "c", "cause": "d"})
    assert only(tmp_path).id == "a"
    lines(tmp_path / "coco.test.jsonl", row)
    assert "several files of records" in str(error_of(tmp_path))
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "1.png").write_bytes(random_image().data or b"")
    lines(tmp_path / "photos" / "vectors.quarantine.jsonl", {"id": "b", "place": "c", "cause": "d"})
    assert only(tmp_path / "photos").id == "1.png"


def test_no_target_is_a_part_of_its_source(tmp_path: Path) -> None:
    mine = lines(tmp_path / "train.jsonl", {"id": "a", "parts": [{"text": "x"}]})
    for source in (mine, tmp_path):
        with pytest.raises(DataError, match="--to"):
            check_output_path(mine, source)
    check_output_path(mine, tmp_path, allow_existing=True)
    check_output_path(tmp_path / "new.jsonl", tmp_path)


def test_names_and_ids_that_no_text_is(tmp_path: Path) -> None:
    """Bytes that are not UTF-8 in a file's name, and half characters that JSON can spell."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in (b"good.png", b"caf\xe9.png"):
        (folder / os.fsdecode(name)).write_bytes(random_image().data or b"")
    errors: list[DataError] = []
    assert [r.id for r in read_records(folder, on_error=errors.append)] == ["good.png"]
    assert "not UTF-8" in str(errors[0]) and str(errors[0]).isascii()
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        '{"id": "a", "image": "\\ud83d.png", "short": "x"}\n'
        '{"id": "\\ud83d", "image": "a.png"}\n'
        '{"image": "b.png", "caption": "y", "id": "\\ud83d"}\n'
        '{"id": "b", "image": "b.png", "metadata": {"from": "\\ud83d", "name": "é"}}\n'
    )
    errors.clear()
    (kept,) = stream_to_jsonl(read_records(rows, on_error=errors.append), tmp_path / "out.jsonl")
    assert len(errors) == 3 and all(str(error).isascii() for error in errors)
    assert only(tmp_path / "out.jsonl").metadata == kept.metadata == {"from": "\ud83d", "name": "é"}


@pytest.mark.parametrize("ending", ["jsonl", "json"])
def test_json_that_no_machine_holds_is_a_broken_row(ending: str, tmp_path: Path) -> None:
    for text in ("9" * 5000, "[" * 100_000):
        path = tmp_path / f"x.{ending}"
        row = '{"id": "a", "metadata": {"n": ' + text + "}}"
        path.write_text(f"[{row}]" if ending == "json" else row)
        errors: list[DataError] = []
        assert list(read_records(path, on_error=errors.append)) == [] and len(errors) == 1


def test_negatives_of_a_pair_without_an_id(tmp_path: Path) -> None:
    wrong = [[{"text": "a buoy"}]]
    record = only(
        lines(tmp_path / "x.jsonl", {"image": "a.png", "short": "a boat", "negative": wrong})
    )
    assert record.negative == (("a buoy",),) and record.metadata == {}


def test_a_table_in_capitals(tmp_path: Path) -> None:
    (tmp_path / "T.CSV").write_text("image,caption\na.png,a boat\n")
    assert only(tmp_path / "T.CSV").short == ("a boat",)
