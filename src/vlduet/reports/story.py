"""The page of `vlduet interleave`: a text with the images that were retrieved while it was written.

As in the figures of the paper, text stands on blue and a retrieved image on pink. Below are the
documents of the images with their metadata, those that name an author or a licence first.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlduet.data.images import encode_thumbnail_data_url, load_image
from vlduet.data.records import ImageRef, Parts, extract_images
from vlduet.errors import ImageError
from vlduet.reports.pages import write_page

IMAGE_SIDE = 800
"""Longer side of an embedded image in pixels, at most: about 100 KB for a photo."""
MAX_TITLE_CHARS = 140
"""Number of characters of the prompt that the heading quotes."""
MAX_METADATA_CHARS = 400
"""Number of characters that are shown of one value of a document's metadata."""
CREDIT_KEYS = (
    "title",
    "author",
    "artist",
    "creator",
    "attribution",
    "credit",
    "copyright",
    "licence",
    "license",
    "source",
    "url",
)
"""Keys of metadata that say whose an image is; they are shown first, in this order."""


@dataclass(frozen=True, slots=True)
class StoryImage:
    """An image of a story, and the document of the index that it belongs to."""

    id: str
    """Id of the document."""
    score: float
    """Cosine of the document and everything before its place."""
    image: ImageRef
    text: str = ""
    """Text of the document, shown as the caption; may be empty."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """JSON values."""


@dataclass(frozen=True, slots=True)
class Story:
    """Content of the page."""

    prompt: Parts
    """Texts and images that the model was given."""
    content: tuple[str | StoryImage, ...]
    """Texts and images in reading order; every text becomes a block of its own."""
    is_generated: bool
    """Whether the model wrote the text; False for the text of a template."""
    facts: Mapping[str, str]
    """Name -> value of what the story depends on, such as the model."""
    command: str
    """Command line that made the story."""


@dataclass(frozen=True, slots=True)
class _Figure:
    """An image as the template shows it; `url` or `error` is empty."""

    url: str
    """Encoded image, a ``data:`` URL."""
    error: str
    """Reason why the image cannot be read."""
    number: int = 0
    """Position among the retrieved images, from 1; 0 for an image of the prompt."""
    source: StoryImage | None = None
    """Document of a retrieved image; None for an image of the prompt."""
    metadata: tuple[tuple[str, str], ...] = ()
    """Metadata of the document as (key, value), in the order shown."""


def write_story(path: Path, story: Story) -> None:
    """Write the page of a story, replacing an older file only once the new one is complete.

    Images are scaled down to `IMAGE_SIDE` and encoded anew, without metadata of their files. One
    that cannot be read is replaced by its error message. Missing folders are created.

    Raises:
        LockError: another process is writing this file.
    """
    blocks: list[str | _Figure] = []
    figures: list[_Figure] = []
    for part in story.content:
        if isinstance(part, StoryImage):
            figures.append(_draw_image(part, len(figures) + 1))
            blocks.append(figures[-1])
        elif text := part.strip():
            blocks.append(text)
    words = " ".join(part for part in story.prompt if isinstance(part, str)).split()
    content = {
        "title": _cut(" ".join(words), MAX_TITLE_CHARS),
        "story": story,
        "prompt_images": [_encode(image) for image in extract_images(story.prompt)],
        "blocks": blocks,
        "figures": figures,
    }
    write_page(path, "story.html", content)


def _draw_image(image: StoryImage, number: int) -> _Figure:
    """Return a retrieved image with its number and the metadata of its document."""
    figure = _encode(image.image)
    values = [(key, _format_value(value)) for key, value in image.metadata.items()]
    ranks = {key: rank for rank, key in enumerate(CREDIT_KEYS)}
    values.sort(key=lambda item: ranks.get(item[0].lower(), len(ranks)))
    return _Figure(figure.url, figure.error, number, image, tuple(values))


def _encode(image: ImageRef) -> _Figure:
    try:
        return _Figure(encode_thumbnail_data_url(load_image(image), IMAGE_SIDE), "")
    except ImageError as error:
        return _Figure("", str(error))


def _format_value(value: Any) -> str:
    """Return a value of metadata as text; a list of texts is joined by commas, others are JSON."""
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        value = ", ".join(value)
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return _cut(text, MAX_METADATA_CHARS)


def _cut(text: str, max_chars: int) -> str:
    return text if len(text) <= max_chars else text[: max_chars - 1].rstrip() + "…"
