"""Rows of a JSON file that is one object: a record, a list under a key, or captions of COCO.

{"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}     COCO
{"images": [{"filename", "filepath", "sentences": [{"raw"}], "split"}]}         Karpathy
{"data": [{...}, {...}], ...}                                                   a list of rows
{"a.png": "a caption", "b.png": ["two", "captions"]}                            captions by file
{"image": "a.png", ...}                                                         one record
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlduet.data.image_formats import IMAGE_SUFFIXES
from vlduet.data.readers.rows import ReadContext, SourceRow
from vlduet.data.records import Place
from vlduet.errors import DataError

LIST_KEYS = ("data", "rows", "records", "items", "examples", "samples", "annotations", "images")
"""Keys of an object that may hold its rows."""
SPLIT_KEYS = ("train", "val", "validation", "test")
"""Keys of an object that may hold the rows of a split; several are an error."""
RECORD_KEYS = ("image", "parts", "messages", "conversations", "query", "qry", "prompt", "response")
"""Keys of an object that is a record, whatever lists it holds."""
DESCRIPTION_KEYS = (
    *("info", "licenses", "license", "version", "dataset", "name", "description", "features"),
    *("num_rows", "count", "categories", "type", "split", "date", "author"),
)
"""Keys of an object that describe its rows, and are not counted as unread."""


def iter_object_rows(
    value: dict[str, Any], source: Path, context: ReadContext
) -> Iterator[SourceRow]:
    """Yield the rows of a file that is one object; the forms are those of the module's docstring.

    The default id of an item is ``FILE NAME:POSITION``, counted from 1. Keys beside a list of rows
    are counted as not read, except for `DESCRIPTION_KEYS`. An object that holds no list of rows is
    a row itself.

    Raises:
        DataError: before the first row, if the object holds several lists of rows, or images of
            several splits.
    """
    lists = {key: items for key, items in value.items() if _is_row_list(items)}
    if _is_coco(value):
        rows = list(_join_annotations(value, source, context))
        _count_keys(value, ("images", "annotations"), context)
        key = "images"
    elif _is_caption_map(value):
        rows = [_to_caption_row(name, captions) for name, captions in value.items()]
        key = None
    elif value.keys() & {*RECORD_KEYS} or not lists.keys() & {*LIST_KEYS, *SPLIT_KEYS}:
        yield SourceRow(Place(str(source), 1), context, f"{source.name}:1", value)
        return
    elif len(lists) > 1:
        message = f"one object with several lists of rows: {', '.join(lists)}"
        raise DataError(message, place=source, fix="Write each list into a file of its own")
    else:
        key = next(iter(lists))
        rows = [_to_sentence_row(row) for row in lists[key]]
        _check_splits(rows, source)
        _count_keys(value, (key,), context)
    for number, row in enumerate(rows, 1):
        place = Place(str(source), None, f"{key}[{number - 1}]" if key else str(row["image"]))
        yield SourceRow(place, context, f"{source.name}:{number}", row)


def _is_row_list(items: Any) -> bool:
    """Return whether a value is a list of objects that is not empty."""
    return isinstance(items, list) and items != [] and all(isinstance(i, dict) for i in items)


def _count_keys(value: dict[str, Any], used: tuple[str, ...], context: ReadContext) -> None:
    """Count the keys of an object that hold something and are neither `used` nor descriptions."""
    for key, item in value.items():
        if key not in used and key not in DESCRIPTION_KEYS and item not in (None, "", [], {}):
            context.ignored.add("key", key)


def _is_coco(value: dict[str, Any]) -> bool:
    """Return whether an object is of COCO's form: images with ids, and annotations of them."""
    images = value.get("images")
    annotations = value.get("annotations")
    return (
        isinstance(images, list)
        and isinstance(annotations, list)
        and all(isinstance(item, dict) and "id" in item for item in images)
        and all(isinstance(item, dict) and "image_id" in item for item in annotations)
    )


def _join_annotations(
    value: dict[str, Any], source: Path, context: ReadContext
) -> Iterator[dict[str, Any]]:
    """Yield a row per image of COCO's form, with its captions in the order of the annotations.

    Images without captions have none. Annotations without a caption, such as boxes, and those of
    images that are not listed are counted as not read.

    Raises:
        DataError: two images have the same id.
    """
    captions: dict[Any, list[Any]] = {image["id"]: [] for image in value["images"]}
    if len(captions) < len(value["images"]):
        message = "two images with the same id"
        raise DataError(message, place=source, fix="Give every image an id of its own")
    for annotation in value["annotations"]:
        if not annotation.get("caption"):
            context.ignored.add("annotation", "they have no caption")
        elif annotation["image_id"] not in captions:
            context.ignored.add("annotation", "their image is not listed")
        else:
            captions[annotation["image_id"]].append(annotation["caption"])
    for image in value["images"]:
        yield {**image, "captions": captions[image["id"]]}


def _is_caption_map(value: dict[str, Any]) -> bool:
    """Return whether an object has a key for every image file, with captions or columns."""
    return bool(value) and all(
        Path(key).suffix.lower() in IMAGE_SUFFIXES and isinstance(item, str | list | dict)
        for key, item in value.items()
    )


def _to_caption_row(name: str, captions: Any) -> dict[str, Any]:
    """Return the row of an image file: its captions, or the columns of an object."""
    columns = captions if isinstance(captions, dict) else {"captions": captions}
    return {**columns, "image": name}


def _to_sentence_row(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of Karpathy's form with the path under ``image``; other rows unchanged."""
    if not ({"filename", "sentences"} <= row.keys() and isinstance(row["sentences"], list)):
        return row
    folder = row.get("filepath") or ""
    columns = {key: item for key, item in row.items() if key not in ("filename", "filepath")}
    return {"image": f"{folder}/{row['filename']}" if folder else row["filename"], **columns}


def _check_splits(rows: list[dict[str, Any]], source: Path) -> None:
    """Raise DataError if rows of Karpathy's form are of several splits.

    ``restval`` belongs to ``train``.
    """
    splits = Counter(str(row["split"]) for row in rows if "split" in row and "sentences" in row)
    if len({"train" if split == "restval" else split for split in splits}) > 1:
        counts = ", ".join(f"{split} ({count:,})" for split, count in splits.items())
        fix = (
            "Write a file per split, such as with: jq '.images |= map(select(.split == \"test\"))'"
        )
        raise DataError(f"several splits in one file: {counts}", place=source, fix=fix)
