"""Columns of tables get their roles by their names, or from the user; none is lost."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlduet.data.formats import FORMATS
from vlduet.data.readers.columns import (
    ANSWER_COLUMNS,
    COLUMN_ROLES,
    FALLBACK_SHORT_COLUMNS,
    LONG_COLUMNS,
    NEGATIVE_COLUMNS,
    QUERY_COLUMNS,
    QUERY_NEGATIVE_COLUMNS,
    QUERY_POSITIVE_COLUMNS,
    QUESTION_COLUMN,
    SHORT_COLUMNS,
    ColumnPlan,
    plan_columns,
)
from vlduet.data.readers.rows import IMAGE_COLUMNS, IgnoredData, ReadContext, SourceRow
from vlduet.data.records import ImageRef, Place, Record, iter_labelled_parts
from vlduet.errors import DataError


def plan(names: str, **columns: str) -> ColumnPlan:
    """Return the plan of columns that are separated by commas."""
    return plan_columns(tuple(names.split(",")), columns)


@pytest.mark.parametrize(
    ("names", "short", "long", "unread"),
    [
        ("filename,Caption,Alt text", ["Caption", "Alt text"], [], []),
        ("img,Product Name,price", ["Product Name"], [], []),
        ("img,caption,product_name", ["caption"], [], []),
        ("img,caption_0,caption_1,caption2", ["caption_0", "caption_1", "caption2"], [], []),
        ("img,caption_en,caption_de", [], [], ["caption_en", "caption_de"]),
        ("img,caption_en,description_en", ["caption_en"], ["description_en"], []),
        ("img,caption,text_fr", ["caption"], [], ["text_fr"]),
        ("img,blip_caption", ["blip_caption"], [], []),
        ("img,blip_caption,llava_caption", [], [], ["blip_caption", "llava_caption"]),
        ("image_name,comment_number,comment", ["comment"], [], []),
        ("img,caption_id,caption_length,n", [], [], []),
        ("image,question,answer", [], [], ["question", "answer"]),
    ],
)
def test_captions_are_read_where_their_columns_are_unambiguous(
    names: str, short: list[str], long: list[str], unread: list[str]
) -> None:
    result = plan(names)
    assert (list(result.short), list(result.long), list(result.unread)) == (short, long, unread)


def test_queries_and_numbered_candidates_are_read() -> None:
    result = plan("query_text,query_image,positive,negative_0,negative_1,negative_1_image")
    assert result.query == ("query_image", "query_text") and result.positive == (("positive",),)
    assert result.negative == (("negative_0",), ("negative_1_image", "negative_1"))
    assert plan("image,question").query == ("question",)
    assert plan("image,question,answer").query == (), "a quiz, perhaps"
    assert plan("image,pos,neg,caption").positive == (), "part of speech, perhaps"


def test_a_column_of_numbers_is_no_candidate() -> None:
    names = ("image", "caption", "positive", "negative")
    result = plan_columns(names, {}, typed_columns={"positive"})
    assert result.positive == () and result.negative == (("negative",),)


def test_a_role_of_the_user_replaces_what_is_guessed() -> None:
    names = "SKU,foto,image,text_en,text_de,caption,query"
    result = plan(names, image="foto", caption="text_en", id="SKU")
    assert (result.id, result.image, result.short) == ("SKU", ("foto",), ("text_en",))
    assert result.query == () and result.unread == ()
    assert plan(names, caption="text_en, text_de").short == ("text_en", "text_de")
    assert plan(names, query="image,query", positive="foto").query == ("image", "query")
    assert plan_columns(("a, b", "c"), {"caption": "a, b"}).short == ("a, b",)


def test_a_known_name_has_at_most_the_documented_role() -> None:
    names = {*SHORT_COLUMNS, *LONG_COLUMNS, *FALLBACK_SHORT_COLUMNS}
    names |= {*QUERY_COLUMNS, *QUERY_POSITIVE_COLUMNS, *NEGATIVE_COLUMNS, *IMAGE_COLUMNS}
    groups = [SHORT_COLUMNS, LONG_COLUMNS, FALLBACK_SHORT_COLUMNS, QUERY_COLUMNS]
    groups += [QUERY_POSITIVE_COLUMNS, NEGATIVE_COLUMNS, IMAGE_COLUMNS]
    assert len(names) == sum(map(len, groups)), "a name of two roles"


# --- nothing is lost

NAMES = [
    *("id", "image", "file_name", "image_path", "query", "anchor", "positive", "negative"),
    *("negative_0", "negative_1_image", "caption", "caption_en", "caption_de", "Title", "text_2"),
    *("description", "long", "comment", "product name", "question", "answer", "label", "metadata"),
    *("price", "notes", "url", "vector", "x_file_name", "passage"),
]


def make_cell(name: str, kind: str) -> Any:
    """Return a value that occurs nowhere else in the row."""
    if kind == "image":
        return ImageRef(path=Path(f"{name}.png"))
    if kind == "number":
        return 1000 + NAMES.index(name)
    if kind == "list":
        return [f"first {name}", f"second {name}"]
    return f"{name}.jpg" if kind == "file" else f"some words in {name}"


def contents_of(record: Record) -> set[str]:
    """Return the id, all texts and all names of images of a record."""
    parts = [part for _, part in iter_labelled_parts(record)]
    names = {Path(part.name).name if isinstance(part, ImageRef) else part for part in parts}
    return names | {record.id}


def is_in_record(value: Any, record: Record) -> bool:
    """Return whether a cell was read into a record, its items one by one."""
    if isinstance(value, list):
        return all(is_in_record(item, record) for item in value)
    text = Path(value.name).name if isinstance(value, ImageRef) else str(value)
    return text in contents_of(record)


KINDS = st.sampled_from(["text", "text", "file", "image", "number", "list"])
TABLES = st.dictionaries(st.sampled_from(NAMES), KINDS, min_size=1, max_size=7)
COLUMNS = st.dictionaries(
    st.sampled_from(sorted(COLUMN_ROLES.keys() - {"messages"})), st.sampled_from(NAMES), max_size=2
)


@settings(max_examples=300, deadline=None)
@given(TABLES, COLUMNS | st.just({}), st.sampled_from(["captions", "retrieval"]))
def test_every_column_is_read_or_metadata_or_counted_or_an_error(
    table: dict[str, str], columns: dict[str, str], name: str
) -> None:
    value = {column: make_cell(column, kind) for column, kind in table.items()}
    context = ReadContext(Path(), columns, IgnoredData())
    try:
        row = SourceRow(Place("x", 1), context, "x:1", value)
        record = FORMATS[name].parse_row(row)
    except DataError as error:
        assert error.fix and error.place is not None
        return
    messages = " ".join(context.ignored.messages())
    for column, cell in value.items():
        places = [is_in_record(cell, record), column in record.metadata, f"`{column}`" in messages]
        assert any(places), f"{column} is lost"


@settings(max_examples=100, deadline=None)
@given(TABLES, st.randoms())
def test_the_order_of_columns_does_not_decide_their_roles(
    table: dict[str, str], random: Any
) -> None:
    names = list(table)
    shuffled = random.sample(names, len(names))
    first, second = plan_columns(names, {}), plan_columns(shuffled, {})
    for role in ("id", "image", "short", "long", "query", "positive", "negative", "unread"):
        groups = [getattr(result, role) or () for result in (first, second)]
        assert sorted(map(sorted, groups[0])) == sorted(map(sorted, groups[1])), role


# --- documentation


def test_the_documentation_lists_every_column() -> None:
    text = (Path(__file__).parents[4] / "docs" / "data-format.md").read_text(encoding="utf-8")
    table = re.search(
        r"^\| role in `columns` \|.*\n\|---\|---\|\n((?:\|.*\n)+)", text, re.MULTILINE
    )
    assert table is not None
    documented = {}
    for line in table[1].splitlines():
        roles, names = line.strip("|").split(" | ")
        for role in re.findall("`([^`]+)`", roles):
            documented[role] = set(re.findall("`([a-z_]+)`", names))
    short = {*SHORT_COLUMNS, *FALLBACK_SHORT_COLUMNS}
    assert documented == {
        "id": {"id"},
        "image": {*IMAGE_COLUMNS},
        "caption": short,
        "short": short,
        "long": {*LONG_COLUMNS},
        "query": {*QUERY_COLUMNS, QUESTION_COLUMN, *ANSWER_COLUMNS},
        "positive": {*QUERY_POSITIVE_COLUMNS},
        "negative": {*QUERY_NEGATIVE_COLUMNS},
        "messages": set(),
    }
    assert documented.keys() == COLUMN_ROLES.keys()
