"""Captioned images in columns, and MMEB's queries with positives and negatives."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from vlduet.data.readers.rows import (
    SourceRow,
    collect_metadata,
    interleave_images,
    parse_id,
    parse_image,
    parse_text,
)
from vlduet.data.records import ImageRef, Parts, Place, Record, parse_candidates
from vlduet.errors import DataError

IMAGE_COLUMN = "image"
ALTERNATIVE_IMAGE_COLUMNS = (
    "image_path",
    "image_file",
    "img",
    "img_path",
    "file_name",
    "filename",
    "filepath",
    "file",
    "path",
)
ENCODED_IMAGE_COLUMNS = ("jpg", "jpeg", "png", "webp")
IMAGE_COLUMNS = (IMAGE_COLUMN, *ALTERNATIVE_IMAGE_COLUMNS, *ENCODED_IMAGE_COLUMNS)
"""`image` where it is there, else the only one of the others."""
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
MMEB_KEYS = tuple(key for side in MMEB_SIDES.values() for key in side)


def find_image_columns(keys: Iterable[str]) -> list[str]:
    """The columns that may hold the image; `image` goes before all."""
    found = [key for key in keys if key.lower() in IMAGE_COLUMNS]
    first = [key for key in found if key.lower() == IMAGE_COLUMN]
    return first or found


def parse_captions(row: SourceRow) -> Record:
    """An image column, and any columns of short and long captions; all others become metadata."""
    columns = find_image_columns(row.value)
    if len(columns) != 1:
        what = f"several image columns: {', '.join(columns)}" if columns else "no image"
        fix = (
            f"Name one column '{IMAGE_COLUMN}'"
            if columns
            else f"Fill one of {', '.join(IMAGE_COLUMNS)}"
        )
        raise DataError(what, place=row.place.with_field(IMAGE_COLUMN), fix=fix)
    image = parse_image(row.value[columns[0]], row.place.with_field(columns[0]), row.root)
    shorts, longs, used = list[str](), list[str](), set(columns)
    for key, value in row.value.items():
        names = key.lower()
        if names in SHORT_COLUMNS or names in LONG_COLUMNS:
            used.add(key)
            (shorts if names in SHORT_COLUMNS else longs).extend(
                _texts(value, row.place.with_field(key))
            )
    negative: tuple[Parts, ...] = ()
    if isinstance(row.value.get("negative"), list):  # ours, of a record without an id
        negative = parse_candidates(row.value, "negative", row.place, root=row.root)
        used.add("negative")
    shorts = list(dict.fromkeys(shorts))
    if len(longs) > 1:
        fix = f"Keep one of {', '.join(LONG_COLUMNS)}"
        raise DataError("several long captions", place=row.place.with_field("long"), fix=fix)
    return Record(
        parse_id(row),
        image=image,
        short=tuple(shorts),
        long=longs[0] if longs else None,
        negative=negative,
        metadata=collect_metadata(row, used),
        place=row.place,
    )


def _texts(value: Any, place: Place) -> list[str]:
    if value is None or value == []:
        return []
    if isinstance(value, list):
        return [parse_text(item, place.with_field(f"[{i}]")) for i, item in enumerate(value)]
    return [parse_text(value, place)]


def parse_mmeb(row: SourceRow) -> Record:
    """``qry, qry_image_path, pos_text, pos_image_path, neg_text, neg_image_path``, with ``<|image_1|>`` tags.

    Of an evaluation file (``qry_text, qry_img_path, tgt_text, tgt_img_path``), the first target is the positive.
    """
    if "tgt_text" in row.value or "tgt_img_path" in row.value:
        query, targets = _sides(row, "qry (eval)"), _sides(row, "tgt (eval)")
        positive, negative = targets[:1], targets[1:]
    else:
        query, positive, negative = _sides(row, "qry"), _sides(row, "pos"), _sides(row, "neg")
    for key, found in (("qry", query), ("pos_text", positive)):
        if not found:
            raise DataError(
                f"{key} has neither text nor image",
                place=row.place.with_field(key),
                fix="Fill one of the two",
            )
    return Record(
        parse_id(row),
        query=query[0],
        positive=tuple(positive),
        negative=tuple(negative),
        metadata=collect_metadata(row, MMEB_KEYS),
        place=row.place,
    )


def _sides(row: SourceRow, side: str) -> list[Parts]:
    """The items of one side: text and image columns hold one value, or lists of equal length."""
    text_key, image_key = MMEB_SIDES[side]
    texts, images = (_as_list(row.value.get(key)) for key in (text_key, image_key))
    count = max(len(texts), len(images))
    if texts and images and len(texts) != len(images):
        what = f"{len(texts)} texts for {len(images)} images"
        raise DataError(
            what,
            place=row.place.with_field(image_key),
            fix="Write lists of equal length, '' for nothing",
        )
    items = []
    for i in range(count):
        text = texts[i] if texts else ""
        image = images[i] if images else ""
        place = row.place.with_field(text_key if count == 1 else f"{text_key}[{i}]")
        at_image = row.place.with_field(image_key if count == 1 else f"{image_key}[{i}]")
        refs: list[ImageRef] = (
            [parse_image(image, at_image, row.root)] if image not in ("", None, {}) else []
        )
        if text and not isinstance(text, str):
            raise DataError(
                f"expected text, got {type(text).__name__}", place=place, fix="Write a string"
            )
        if refs and MMEB_TAG not in (text or ""):
            text = f"{MMEB_TAG}\n{text or ''}"
        if (text or "").strip():
            items.append(tuple(interleave_images(text, MMEB_TAG, refs, place=place)))
    return [item for item in items if item]


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]
