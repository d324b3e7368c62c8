"""Formats are detected, sources that cannot be read say what is accepted, records are written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.record_files import (
    CAPTIONS,
    FOREIGN_ROWS,
    LLAVA,
    MMEB,
    OPENAI,
    PNG,
    SWIFT,
    describe_messages,
    read_error,
    read_single,
    read_with_errors,
    read_with_ignored,
    relative_places,
    write_lines,
)
from vlduet.data.formats import (
    FORMATS,
    append_unlisted_images,
    read_jsonl,
    read_records,
)
from vlduet.data.readers.rows import ReadContext, SourceRow
from vlduet.data.records import ImageRef, Place, Record
from vlduet.errors import DataError

PARTS_ROW = {"id": "a", "parts": [{"text": "x"}]}

# --- reading


def test_our_records_are_read_from_lines_and_from_a_list(tmp_path: Path) -> None:
    rows = [
        {"id": "a", "image": "a.png", "short": "x"},
        {"id": "b", "parts": [{"text": "One. Two."}]},
    ]
    source = write_lines(tmp_path / "x.jsonl", *rows)
    records = list(read_records(source))
    assert [record.kind for record in records] == ["pair", "interleaved"]
    assert records[1].parts == ("One.", "Two.")
    assert list(read_jsonl(source)) == records
    (tmp_path / "x.json").write_text(json.dumps(rows, indent=1))
    assert list(read_records(tmp_path / "x.json")) == records


def test_relative_image_paths_start_from_the_root(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "x.jsonl", {"id": "a", "image": "a.png"})
    (record,) = read_records(source, root=tmp_path / "images")
    assert record.image == ImageRef(path=tmp_path / "images" / "a.png")


def test_a_misspelt_key_of_ours_is_an_error(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "x.jsonl", "", {"id": "a", "image": "a.png", "shrt": "x"})
    error = read_error(source)
    assert error.place == f"{source}:2:shrt" and "Did you mean 'short'?" in str(error)


def test_an_unknown_format_suggests_known_ones(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "x.jsonl", LLAVA)
    expected = r"no format 'lava'.*Did you mean 'llava'\? Known: .*ms-swift"
    with pytest.raises(DataError, match=expected):
        read_records(source, format="lava")


def test_unrecognised_keys_list_all_formats(tmp_path: Path) -> None:
    message = str(read_error(write_lines(tmp_path / "y.jsonl", {"a": 1, "b": 2})))
    assert "not recognised by its keys: a, b" in message
    assert all(name in message for name in FORMATS)


def test_an_unreadable_source_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "x.pdf").write_bytes(b"")
    assert ".parquet" in str(read_error(tmp_path / "x.pdf"))
    (tmp_path / "x.xlsx").write_bytes(b"")
    assert "x.csv" in str(read_error(tmp_path / "x.xlsx"))
    assert "no such file" in str(read_error(tmp_path / "gone.jsonl"))
    (tmp_path / "empty").mkdir()
    assert "neither images nor records" in str(read_error(tmp_path / "empty"))


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.csv"])
def test_an_empty_file_has_no_records(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("")
    assert list(read_records(tmp_path / name)) == []


# --- the format of a row


def test_rows_of_several_formats_are_each_read_by_their_keys(tmp_path: Path) -> None:
    rows = [OPENAI, LLAVA, PARTS_ROW, CAPTIONS, {"query": "a cat", "image": "a.png"}, MMEB]
    source = write_lines(tmp_path / "x.jsonl", *rows)
    kinds = [record.kind for record in read_records(source)]
    assert kinds == ["chat", "chat", "interleaved", "pair", "retrieval", "retrieval"]


@pytest.mark.parametrize("num_rows", [3, 200])
def test_first_rows_without_the_deciding_keys_do_not_hide_the_others(
    num_rows: int, tmp_path: Path
) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}]
    rows = [{"messages": turns, "images": None}] * num_rows
    source = write_lines(tmp_path / "x.jsonl", *rows, SWIFT)
    record = list(read_records(source))[-1]
    assert describe_messages(record)[0] == ("user", ["a.png", "What?"])


def test_a_row_without_the_keys_of_its_format_is_an_error(tmp_path: Path) -> None:
    rows = [{"note": "x"}, {"image": "b.png"}, LLAVA, {"note": "x"}, {"image": None}, {}]
    source = write_lines(tmp_path / "x.jsonl", *rows)
    records, errors = read_with_errors(source)
    assert [record.kind for record in records] == ["chat"], "an image alone is no chat"
    assert relative_places(source, errors) == [f"{i}:messages" for i in (1, 2, 4, 5, 6)]


def test_a_table_of_null_queries_has_no_pairs_without_captions(tmp_path: Path) -> None:
    rows = [{"query": "a", "image": "a.png"}, {"query": None, "image": "b.png"}]
    source = write_lines(tmp_path / "x.jsonl", *rows)
    (record,), (error,) = read_with_errors(source)
    assert record.query == ("a",) and error.place == f"{source}:2:query"


def test_a_key_that_rare_rows_have_counts_for_all_rows(tmp_path: Path) -> None:
    rows = [{"image": "a.png", "caption_en": "x"}, {"image": "a.png", "caption_de": "y"}]
    records, ignored = read_with_ignored(write_lines(tmp_path / "x.jsonl", *rows))
    assert [record.short for record in records] == [(), ()] and len(ignored) == 2
    records, _ = read_with_ignored(tmp_path / "x.jsonl", columns={"caption": "caption_de"})
    assert [record.short for record in records] == [(), ("y",)]


def test_columns_of_the_user_give_chats_their_keys(tmp_path: Path) -> None:
    row = {"dialog": SWIFT["messages"], "foto": "a.png", "image": "b.png", "nr": "7"}
    source = write_lines(tmp_path / "x.jsonl", row)
    columns = {"messages": "dialog", "image": "foto", "id": "nr"}
    (record,), ignored = read_with_ignored(source, columns=columns)
    assert record.id == "7" and describe_messages(record)[0] == ("user", ["a.png", "What?"])
    assert ignored == ["1 row with a column `image` that is not read"]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"captoin": "text"}, "no role 'captoin'.*Did you mean 'caption'"),
        ({"caption": "text"}, "no column 'text'; the columns are foto, titel"),
        ({"caption": "titel,text", "image": "foto"}, "no column 'text'"),
    ],
)
def test_unknown_roles_and_columns_are_errors(
    columns: dict[str, str], message: str, tmp_path: Path
) -> None:
    source = write_lines(tmp_path / "x.jsonl", {"foto": "a.png", "titel": "x"})
    with pytest.raises(DataError, match=message):
        read_records(source, columns=columns)


def test_the_error_of_an_unknown_table_says_what_it_has_and_lacks(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("url,caption\nhttp://a/b.png,x\n")
    message = str(read_error(tmp_path / "x.csv"))
    assert "by its keys: url, caption; no column of images" in message
    assert "--columns image=NAME" in message and "img2dataset" in message
    (tmp_path / "x.csv").write_text("query,note\na,x\n")
    assert "a query (query), but no right candidate" in str(read_error(tmp_path / "x.csv"))


JUNK_KEYS = ["role", "content", "type", "from", "value", "image_url", "bytes"]
JUNK_TEXTS = ["", "x", "<image>", "user", "image", "a.png"]
junk_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.sampled_from(JUNK_TEXTS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(JUNK_KEYS), inner),
    max_leaves=5,
)


@settings(max_examples=300, deadline=None)
@given(st.data(), st.sampled_from(FOREIGN_ROWS), st.sampled_from(sorted(FORMATS)))
def test_any_row_is_a_record_or_a_data_error(data: Any, row: dict[str, Any], name: str) -> None:
    keys = st.sampled_from(sorted(set().union(*FOREIGN_ROWS)))
    value = row | data.draw(st.dictionaries(keys, junk_values, max_size=2))
    source_row = SourceRow(Place("x", 1), ReadContext(Path()), "x:1", value)
    try:
        record = FORMATS[name].parse_row(source_row)
        assert isinstance(record, Record)
    except DataError as error:
        assert error.place is not None and error.place.startswith("x:1") and error.fix
    for schema in FORMATS.values():
        assert schema.matches(source_row) in (True, False)


# --- folders of records


def test_a_single_file_of_records_in_a_folder_is_read(tmp_path: Path) -> None:
    write_lines(tmp_path / "coco.train.jsonl", PARTS_ROW)
    assert read_single(tmp_path).id == "a"
    # A quarantine lists what a command left out: it holds no records.
    write_lines(tmp_path / "coco.train.quarantine.jsonl", {"id": "b", "place": "c", "cause": "d"})
    assert read_single(tmp_path).id == "a"


@pytest.mark.parametrize("names", [("train", "test"), ("coco.train", "coco.test")])
def test_splits_in_one_folder_are_not_read_as_shards(
    tmp_path: Path, names: tuple[str, str]
) -> None:
    for name in names:
        write_lines(tmp_path / f"{name}.jsonl", PARTS_ROW)
    assert "several files of records" in str(read_error(tmp_path))


def test_numbered_shards_are_read_as_one_source(tmp_path: Path) -> None:
    for i in range(3):
        row = {**PARTS_ROW, "id": str(i)}
        write_lines(tmp_path / f"train-0000{i}-of-00003.jsonl", row)
    assert [record.id for record in read_records(tmp_path)] == ["0", "1", "2"]


def test_a_quarantine_file_among_images_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(PNG)
    write_lines(tmp_path / "vectors.quarantine.jsonl", {"id": "b", "place": "c", "cause": "d"})
    assert read_single(tmp_path).id == "1.png"


def test_images_that_no_record_refers_to_are_appended(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(PNG)
    listed = Record("first", image=ImageRef(path=tmp_path / "a.png"))
    errors: list[DataError] = []
    records = append_unlisted_images([listed], tmp_path, on_error=errors.append)
    assert [record.id for record in records] == ["first", "b.png"] and errors == []
