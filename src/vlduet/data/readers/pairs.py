"""Record formats of tables: captioned images, queries with candidates, and rows of MMEB."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from vlduet.data.image_formats import IMAGE_SUFFIXES
from vlduet.data.readers.columns import (
    RELEVANCE_COLUMNS,
    ColumnPlan,
    Group,
    is_description,
    is_image_column,
    plan_columns,
)
from vlduet.data.readers.rows import (
    IMAGE_COLUMN,
    SourceRow,
    collect_metadata,
    find_image_columns,
    holds_bytes,
    interleave_images,
    normalize_column,
    parse_id,
    parse_images,
)
from vlduet.data.record_json import JsonValue
from vlduet.data.records import ImageRef, Parts, Record
from vlduet.errors import DataError

EMPTY_VALUES: tuple[Any, ...] = (None, "", [], {})
"""Values of a cell that holds nothing."""
MAX_CACHED_PLANS = 1000
"""Number of different sets of keys in a source whose plans are kept."""

MMEB_TAG = "<|image_1|>"
MMEB_SIDES = {
    "qry": ("qry", "qry_image_path"),
    "pos": ("pos_text", "pos_image_path"),
    "neg": ("neg_text", "neg_image_path"),
    "qry (eval)": ("qry_text", "qry_img_path"),
    "tgt (eval)": ("tgt_text", "tgt_img_path"),
}
"""Text column and image column of each side of a row."""
MMEB_KEYS = tuple(key for columns in MMEB_SIDES.values() for key in columns)
MMEB_INSTRUCTIONS = ("qry_inst", "pos_inst", "neg_inst", "tgt_inst")
"""Columns of instructions, which are metadata and counted as not read."""


def plan_row(row: SourceRow) -> ColumnPlan:
    """Return the roles of the columns of the table that a row is from."""
    plans = row.context.plans
    key = (row.keys, *row.metadata_types)
    if key not in plans:
        if len(plans) >= MAX_CACHED_PLANS:
            plans.clear()
        plans[key] = plan_columns(
            row.column_names, row.context.columns, typed_columns=row.metadata_types.keys()
        )
    plan: ColumnPlan = plans[key]
    return plan


def has_captions(row: SourceRow) -> bool:
    """Return whether a row fills a column of captions."""
    return any(name in row.value for name in plan_row(row).captions)


def is_caption_row(row: SourceRow) -> bool:
    """Return whether a row has an image, and a caption unless the table has no query either."""
    plan = plan_row(row)
    return bool(_find_images(row, plan)) and (has_captions(row) or not plan.query)


def is_retrieval_row(row: SourceRow) -> bool:
    """Return whether a row has a query, and the table a column of candidates or images."""
    plan = plan_row(row)
    return any(name in row.value for name in plan.query) and bool(plan.positive or plan.image)


def parse_captions(row: SourceRow) -> Record:
    """Return a pair of an image column and all caption columns; other columns become metadata.

    `plan_columns` says which these are. The image may be a list of one. Repeated short captions are
    dropped, and there may be none. Right candidates are short captions too, and wrong ones hard
    negatives.

    Raises:
        DataError: none or several image columns or images, several long captions, an image among
            the right candidates, or a wrong value or id.
    """
    plan = plan_row(row)
    image_column = _require_image(row, plan)
    images = parse_images(row.get_field(image_column))
    if len(images) > 1:
        fix = "Write a row per image, or use interleaved records"
        raise row.get_field(image_column).make_error(f"{len(images)} images in a pair", fix=fix)
    short: list[str] = []
    for name in (*plan.short, *_flatten(plan.positive)):
        field = row.get_field(name)
        if name not in plan.short and is_image(field.value):
            message = "a right candidate that is an image, and no query"
            raise field.make_error(message, fix="Name the column of the query (columns: query=...)")
        short += _parse_texts(field)
    long = [text for name in plan.long for text in _parse_texts(row.get_field(name))]
    if len(long) > 1:
        fix = "Keep one of " + ", ".join(plan.long)
        raise row.get_field("long").make_error("several long captions", fix=fix)
    used = {image_column, *plan.captions}
    unread = set(plan.unread)
    if not plan.captions:
        unread |= {name for name, value in row.value.items() if is_description(name, value)}
    return Record(
        parse_id(row, plan.id or "id"),
        image=images[0],
        short=tuple(dict.fromkeys(short)),
        long=long[0] if long else None,
        negative=_parse_candidates(row, plan.negative),
        metadata=_collect_metadata(row, plan, used=used, unread=unread),
        place=row.place,
    )


def parse_retrieval(row: SourceRow) -> Record:
    """Return a retrieval record of a query and its candidates; other columns become metadata.

    `plan_columns` says which columns these are. Without a column of right candidates, the image, or
    each of a list of images, is a right one. A cell is an image if it holds one, if the column is
    named as one (``query_image``), or if its text is a data: URL or a file name of an image; else
    it is a text.

    Raises:
        DataError: the query or the right candidate is missing, the image might be either, or a
            value or the id is wrong.
    """
    plan = plan_row(row)
    used = {*plan.query, *_flatten(plan.positive)}
    query = tuple(part for name in plan.query for part in _parse_item(row.get_field(name), name))
    positive = list(_parse_candidates(row, plan.positive))
    images = _find_images(row, plan)
    if positive and images and plan.is_ambiguous:
        message = f"{images[0]} may be a part of the query or a right candidate"
        fix = (
            f"Name the role (columns: query='{images[0]}, {plan.query[0]}', or "
            f"positive='{images[0]}')"
        )
        raise row.get_field(images[0]).make_error(message, fix=fix)
    if not plan.positive or "image" in row.context.columns:
        column = _require_image(row, plan)
        positive += [(image,) for image in parse_images(row.get_field(column))]
        used.add(column)
    for role, columns, items in (
        ("query", plan.query, query),
        ("positive", _flatten(plan.positive), positive),
    ):
        if not items:
            fix = f"Fill {' or '.join(columns)}" if columns else f"Name it (columns: {role}=...)"
            raise row.get_field(role).make_error(f"no {role}", fix=fix)
    return Record(
        parse_id(row, plan.id or "id"),
        query=query,
        positive=tuple(positive),
        negative=_parse_candidates(row, plan.negative),
        metadata=_collect_metadata(
            row, plan, used=used, unread={*plan.unread, *plan.short, *plan.long}
        ),
        place=row.place,
    )


def is_image(value: Any) -> bool:
    """Return whether a cell holds an image: its bytes, a data: URL, or the name of an image file.

    A name with white space is a text.
    """
    if isinstance(value, dict):
        return bool(value) and value.keys() <= {"bytes", "path"}
    if isinstance(value, str):
        ending = re.search(r"^\S+(\.\w+)$", value.strip())
        is_file = ending is not None and ending[1].lower() in IMAGE_SUFFIXES
        return is_file or value.startswith("data:image/")
    return isinstance(value, bytes | ImageRef)


def _flatten(groups: Iterable[Group]) -> Group:
    """Return the columns of all groups in their order."""
    return tuple(name for group in groups for name in group)


def _find_images(row: SourceRow, plan: ColumnPlan) -> list[str]:
    """Return the image columns that a row fills: those of the plan, else others that it has."""
    columns = [name for name in plan.image if row.value.get(name) not in EMPTY_VALUES]
    if columns or "image" in row.context.columns:
        return columns
    return find_image_columns(
        name for name, value in row.value.items() if value not in EMPTY_VALUES
    )


def _require_image(row: SourceRow, plan: ColumnPlan) -> str:
    """Return the image column that a row fills. Raise DataError if there is none, or several."""
    columns = _find_images(row, plan)
    if len(columns) == 1:
        return columns[0]
    message = f"several image columns: {', '.join(columns)}"
    fix = f"Name one (columns: image={columns[0]})" if columns else None
    if not columns:
        names = ", ".join(row.column_names)
        message = f"no image; the columns are {names}"
        fix = f"Fill {' or '.join(plan.image)}" if plan.image else "Name it (columns: image=...)"
    raise row.get_field(IMAGE_COLUMN).make_error(message, fix=fix)


def _parse_texts(field: JsonValue) -> list[str]:
    """Return a text or a list of texts as a list; [] for None or an empty list.

    An item of a list may be an object with the text under ``raw``, as in Karpathy's splits.

    Raises:
        DataError: a text is blank, no string or not UTF-8.
    """
    if field.value is None or field.value == []:
        return []
    if not isinstance(field.value, list):
        return [field.parse_text()]
    items = field.parse_items("texts")
    return [
        (item.get_field("raw") if isinstance(item.value, dict) else item).parse_text()
        for item in items
    ]


def _parse_candidates(row: SourceRow, groups: Iterable[Group]) -> tuple[Parts, ...]:
    """Return the candidates of columns; () without columns, and empty cells are left out.

    A column alone holds a candidate or a list of them; columns of one group hold its parts.

    Raises:
        DataError: a cell is neither text nor image, or parts of one candidate are lists.
    """
    candidates: list[Parts] = []
    for group in groups:
        fields = [(row.get_field(name), name) for name in group]
        fields = [(field, name) for field, name in fields if field.value not in EMPTY_VALUES]
        lists = [field for field, _ in fields if isinstance(field.value, list)]
        if not lists:
            parts = tuple(part for field, name in fields for part in _parse_item(field, name))
            candidates += [parts] if parts else []
        elif len(fields) > 1:
            fix = f"Write one candidate per row into {' and '.join(group)}"
            raise lists[0].make_error("a list for a part of one candidate", fix=fix)
        elif all(isinstance(item, list) for item in lists[0].value):
            candidates += lists[0].parse_candidates()
        else:
            candidates += [
                _parse_item(item, group[0]) for item in lists[0].parse_items("candidates")
            ]
    return tuple(candidates)


def _parse_item(field: JsonValue, column: str) -> Parts:
    """Return the parts of a cell: an image, a text, an object of them, or a list of parts.

    An empty cell has no parts.

    Raises:
        DataError: the value is none of these.
    """
    value = field.value
    if value in EMPTY_VALUES:
        return ()
    if isinstance(value, list):
        return field.parse_parts()
    if isinstance(value, dict) and value and value.keys() <= {"text", "image"}:
        return tuple(part for key in value for part in _parse_item(field.get_field(key), key))
    if is_image(value) or is_image_column(column):
        return (field.parse_image(),)
    return (field.parse_text(),)


def _collect_metadata(
    row: SourceRow, plan: ColumnPlan, *, used: Iterable[str], unread: Iterable[str]
) -> dict[str, Any]:
    """Return the columns of a row that have no role as metadata, and count those to look at.

    Args:
        used: columns that are read; ids and wrong candidates of the plan are added.
        unread: columns that are perhaps to be learned. They are counted if they hold a text.
    """
    ignored = row.context.ignored
    parsed = {*used, *_flatten(plan.negative), *((plan.id,) if plan.id else ())}
    for name, value in row.value.items():
        if name in parsed:
            continue
        if name == "id":  # the user has named another column
            ignored.add("column", name)
        elif name in unread and isinstance(value, str | list) and not holds_bytes(value):
            ignored.add("text", name)
        elif plan.query and normalize_column(name) in RELEVANCE_COLUMNS:
            ignored.add("column", name)
    return collect_metadata(row, parsed)


def parse_mmeb(row: SourceRow) -> Record:
    """Return a retrieval record of a row of MMEB.

    A training row has ``qry``, ``pos_text`` and ``neg_text``, each with an image path and
    ``<|image_1|>`` tags. Of an evaluation row (``qry_text``, ``tgt_text``), the first target is
    the positive, the others are negatives. Other columns become metadata.

    Raises:
        DataError: the query or the positive is empty, there are several queries, texts and images
            do not match, or a value or the id is wrong.
    """
    if "tgt_text" in row.value or "tgt_img_path" in row.value:
        query = _parse_side(row, "qry (eval)")
        targets = _parse_side(row, "tgt (eval)")
        positive, negative = targets[:1], targets[1:]
    else:
        query = _parse_side(row, "qry")
        positive, negative = _parse_side(row, "pos"), _parse_side(row, "neg")
    for key, candidates in (("qry", query), ("pos_text", positive)):
        if not candidates:
            message = f"{key} has neither text nor image"
            raise row.get_field(key).make_error(message, fix="Fill one of the two")
    for key in MMEB_INSTRUCTIONS:
        if row.value.get(key) not in EMPTY_VALUES:
            row.context.ignored.add("column", key)
    if len(query) > 1:
        key = "qry" if "qry" in row.value else "qry_text"
        fix = "Write one row per query"
        raise row.get_field(key).make_error(f"{len(query)} queries in one row", fix=fix)
    return Record(
        parse_id(row),
        query=query[0],
        positive=tuple(positive),
        negative=tuple(negative),
        metadata=collect_metadata(row, MMEB_KEYS),
        place=row.place,
    )


def _parse_side(row: SourceRow, side: str) -> list[Parts]:
    """Return the items of one key of `MMEB_SIDES` without empty ones; [] if there are none.

    The text column and the image column hold one value each, or lists of equal length; either may
    be missing. An image replaces the tag in its text, or precedes a text without a tag.

    Raises:
        DataError: lists of different lengths, a text that is no string, an image that is wrong, or
            more tags than images.
    """
    text_column, image_column = MMEB_SIDES[side]
    texts = _to_list(row.value.get(text_column))
    images = _to_list(row.value.get(image_column))
    if texts and images and len(texts) != len(images):
        message = f"{len(texts)} texts for {len(images)} images"
        fix = "Write lists of equal length, '' for nothing"
        raise row.get_field(image_column).make_error(message, fix=fix)
    count = max(len(texts), len(images))
    items = []
    for i in range(count):
        index = "" if count == 1 else f"[{i}]"
        text = (texts[i] if texts else "") or ""
        image = images[i] if images else ""
        place = row.place.with_field(text_column + index)
        refs = []
        if image not in ("", None, {}):
            image_place = row.place.with_field(image_column + index)
            refs = [JsonValue(image, image_place, row.root).parse_image()]
        if not isinstance(text, str):
            message = f"expected text, got {type(text).__name__}"
            raise DataError(message, place=place, fix="Write a string")
        if refs and MMEB_TAG not in text:
            text = f"{MMEB_TAG}\n{text}"
        if text.strip():
            items.append(tuple(interleave_images(text, MMEB_TAG, refs, place=place)))
    return [item for item in items if item]


def _to_list(value: Any) -> list[Any]:
    """Return a list unchanged, None as [], and any other value in a list of one."""
    if value is None:
        return []
    return value if isinstance(value, list) else [value]
