"""The page of `vlduet data show`: one record, and what a model sees of it."""

from __future__ import annotations

from pathlib import Path

from vlduet.data import images
from vlduet.data.records import ImageRef, iter_labelled_parts
from vlduet.errors import ImageError
from vlduet.inspect.tokens import RecordInspection
from vlduet.reports.pages import write_page

THUMBNAIL = 320


def write(path: Path, inspection: RecordInspection) -> None:
    """A page that needs no other file: the slices with their images, the metadata, and the sequences, if there are any."""
    record = inspection.record
    parts = [_part(role, part) for role, part in iter_labelled_parts(record)]
    parts += [{"role": key, "text": str(value)} for key, value in record.metadata.items()]
    write_page(path, "record.html", {"record": record, "parts": parts, "sequences": inspection.sequences})


def _part(role: str, part: str | ImageRef) -> dict[str, str]:
    if isinstance(part, str):
        return {"role": role, "text": part}
    try:
        image = images.load_image(part)
    except ImageError as error:
        return {"role": role, "error": str(error)}
    text = f"{part.name}, {image.width} x {image.height}"
    return {"role": role, "text": text, "image": images.encode_thumbnail_data_url(image, THUMBNAIL)}
