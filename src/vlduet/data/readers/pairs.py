"""Record formats with columns: captioned images, and MMEB's queries with candidates."""

from __future__ import annotations

from typing import Any

from vlduet.data.readers.rows import (
    IMAGE_COLUMN,
    IMAGE_COLUMNS,
    SourceRow,
    collect_metadata,
    find_image_columns,
    interleave_images,
    parse_id,
)
from vlduet.data.record_json import JsonValue
from vlduet.data.records import Parts, Record
from vlduet.errors import DataError

SHORT_COLUMNS = ("short", "short_caption", "caption", "captions", "text", "title", "alt_text")
LONG_COLUMNS = ("long", "long_caption", "description", "detailed_caption")

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


def parse_captions(row: SourceRow) -> Record:
    """Return a pair of an image column and all caption columns; other columns become metadata.

    Names of columns count in any case. Repeated short captions are dropped, and there may be none.
    A list under ``negative`` holds hard negatives in the form of our own records.

    Raises:
        DataError: none or several image columns (``image`` precedes others), several long
            captions, or a wrong value or id.
    """
    columns = find_image_columns(row.value)
    if len(columns) != 1:
        message = "no image"
        fix = f"Fill one of {', '.join(IMAGE_COLUMNS)}"
        if columns:
            message = f"several image columns: {', '.join(columns)}"
            fix = f"Name one column '{IMAGE_COLUMN}'"
        raise row.get_field(IMAGE_COLUMN).make_error(message, fix=fix)
    image = row.get_field(columns[0]).parse_image()
    short: list[str] = []
    long: list[str] = []
    used = set(columns)
    for key in row.value:
        if key.lower() in SHORT_COLUMNS:
            short += _parse_texts(row.get_field(key))
            used.add(key)
        elif key.lower() in LONG_COLUMNS:
            long += _parse_texts(row.get_field(key))
            used.add(key)
    negative: tuple[Parts, ...] = ()
    if isinstance(row.value.get("negative"), list):  # a record of ours without an id
        negative = row.get_field("negative").parse_candidates()
        used.add("negative")
    if len(long) > 1:
        fix = f"Keep one of {', '.join(LONG_COLUMNS)}"
        raise row.get_field("long").make_error("several long captions", fix=fix)
    return Record(
        parse_id(row),
        image=image,
        short=tuple(dict.fromkeys(short)),
        long=long[0] if long else None,
        negative=negative,
        metadata=collect_metadata(row, used),
        place=row.place,
    )


def _parse_texts(field: JsonValue) -> list[str]:
    """Return a text or a list of texts as a list; [] for None or an empty list.

    Raises:
        DataError: a text is blank, no string or not UTF-8.
    """
    if field.value is None or field.value == []:
        return []
    if isinstance(field.value, list):
        return [item.parse_text() for item in field.parse_items("texts")]
    return [field.parse_text()]


def parse_mmeb(row: SourceRow) -> Record:
    """Return a retrieval record of a row of MMEB.

    A training row has ``qry``, ``pos_text`` and ``neg_text``, each with an image path and
    ``<|image_1|>`` tags. Of an evaluation row (``qry_text``, ``tgt_text``), the first target is
    the positive, the others are negatives. Of several queries, all but the first are ignored.
    Other columns become metadata.

    Raises:
        DataError: the query or the positive is empty, texts and images do not match, or a value or
            the id is wrong.
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
