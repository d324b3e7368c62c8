"""Contents of requests: a text, or a list of OpenAI's content parts, which become our parts.

Pydantic checks the form by a discriminated union over `type`; `to_parts` checks the values. An
image is a data: URL, or another URL that the caller's function reads. It is not decoded here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from vlduet.data.record_json import JsonValue
from vlduet.data.records import ImageRef, Part, Parts, Place
from vlduet.errors import DataError

MAX_PARTS = 256
MAX_IMAGES = 32
"""Number of content parts, and of images among them, in one input or a whole conversation: a
request that is small to send must not occupy the model's thread for minutes."""
MAX_REQUEST_PARTS = 16_384
"""Number of content parts in all inputs of a request together."""
MAX_TEXT_CHARS = 1 << 20
"""Number of characters in one part, far more than any context length."""
MIN_BASE64_CHARS = 64
"""Length from which a text that begins like an image in base64 is taken for one."""

UrlLoader = Callable[[str, str], ImageRef]
"""Function that returns the image of a URL, other than data:, at a place of a request; may raise
DataError. It runs in a thread of its own, so that it may block."""

DATA_URL = re.compile(r"\s*data:(image/|[^,\s]{0,100};base64,)", re.IGNORECASE)
"""Beginning of a text that is the data: URL of an image."""
BASE64_IMAGE = re.compile(r"(iVBORw0KGgo|/9j/|R0lGOD|UklGR)[A-Za-z0-9+/\r\n]+={0,2}\s*\Z")
"""PNG, JPEG, GIF or WebP in base64, without the beginning of a data: URL."""
PARTS_EXAMPLE = '[{"type": "text", "text": "..."}]'
IMAGE_PART_EXAMPLE = '{"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}}'


class ContentModel(BaseModel):
    """Base of the objects inside a body. Unknown keys are kept for `fields.check_fields`."""

    model_config = ConfigDict(extra="allow", strict=True)


class TextPart(ContentModel):
    """A text."""

    type: Literal["text"]
    text: str = Field(json_schema_extra={"pattern": r"\S"})


class ImageUrl(ContentModel):
    """Address of an image."""

    url: str = Field(
        description="data: URL of an image, as in data:image/png;base64,..., or /v1/images/ID for "
        "one of the index."
    )
    detail: Literal["auto", "low", "high"] | None = Field(None, description="Has no effect.")


def make_discriminator(expected: str, fix: str) -> Discriminator:
    """Return the choice between the branches "text", "list" and "object" of a union.

    Args:
        expected: end of the message about a value of another type, such as "is no text".
        fix: remedy, the next sentence of the message.
    """
    return Discriminator(
        _find_branch,
        custom_error_type="unexpected_type",
        custom_error_message=f"{expected}. {fix}",
    )


def _find_branch(value: Any) -> str | None:
    """Return the branch for a value: "text", "list", "object", or None for other types."""
    if isinstance(value, str):
        return "text"
    if isinstance(value, list):
        return "list"
    return "object" if isinstance(value, dict | BaseModel) else None


class ImagePart(ContentModel):
    """An image."""

    type: Literal["image_url"]
    image_url: Annotated[
        Annotated[str, Tag("text")] | Annotated[ImageUrl, Tag("object")],
        make_discriminator("is not an image's URL", f"Send the part {IMAGE_PART_EXAMPLE}"),
    ]
    hit: dict[str, Any] | None = Field(
        None, description="Hit of an image that an answer contained. Has no effect."
    )

    @property
    def url(self) -> str:
        """URL of the image, which clients send as a text or inside an object."""
        return self.image_url if isinstance(self.image_url, str) else self.image_url.url


ContentPart = Annotated[TextPart | ImagePart, Field(discriminator="type")]
PartsOrNone = Annotated[list[ContentPart], Field(max_length=MAX_PARTS)]
PartList = Annotated[PartsOrNone, Field(min_length=1)]
_discriminator = make_discriminator(
    "is neither text nor a list of parts", f"Send a text, or {PARTS_EXAMPLE}"
)
Content = Annotated[Annotated[str, Tag("text")] | Annotated[PartList, Tag("list")], _discriminator]
"""A text, or a list of content parts."""
OptionalContent = Annotated[
    Annotated[str, Tag("text")] | Annotated[PartsOrNone, Tag("list")], _discriminator
]
"""A text, or a list of content parts, which may be empty."""


def to_parts(
    content: str | list[Any], place: str, load_url: UrlLoader, *, left_out: Collection[int] = ()
) -> Parts:
    """Return a content, the value at `place` of a body, as parts.

    Args:
        content: a text or a list of `ContentPart`.
        place: path of the value for messages.
        load_url: function for images at other URLs than data:.
        left_out: positions of content parts that are left out.

    Raises:
        DataError: a blank or too long text, one that is an image (see `check_text`), more images
            than `MAX_IMAGES`, a broken data: URL, or as `load_url`.
    """
    if isinstance(content, str):
        return (check_text(content, place),)
    kept = [(i, part) for i, part in enumerate(content) if i not in left_out]
    num_images = sum(isinstance(part, ImagePart) for _, part in kept)
    check_size(len(kept), num_images, place)
    return tuple(_to_part(part, f"{place}[{i}]", load_url) for i, part in kept)


def check_size(num_parts: int, num_images: int, place: str) -> None:
    """Raise DataError for more parts than `MAX_PARTS` or more images than `MAX_IMAGES`."""
    if num_parts > MAX_PARTS or num_images > MAX_IMAGES:
        fix = f"Send {MAX_PARTS} at most, and of these {MAX_IMAGES} images"
        raise DataError(f"{num_parts} parts with {num_images} images", place=place, fix=fix)


def check_number_of_parts(contents: Sequence[Any], place: str, *, limit: int) -> None:
    """Raise DataError if lists among the contents have more than `limit` items together.

    It is cheap, and precedes the validation of each part, which takes seconds for a million.
    """
    num_parts = sum(len(content) for content in contents if isinstance(content, list))
    if num_parts > limit:
        raise DataError(f"{num_parts} parts", place=place, fix=f"Send {limit} at most")


def check_text(text: str, place: str) -> str:
    """Return a text unchanged.

    Raises:
        DataError: a text that is blank, longer than `MAX_TEXT_CHARS`, no UTF-8, or an image in
            base64: its letters would be read as words.
    """
    if len(text) > MAX_TEXT_CHARS:
        fix = f"Send {MAX_TEXT_CHARS} at most"
        raise DataError(f"a text of {len(text)} characters", place=place, fix=fix)
    if DATA_URL.match(text) or (len(text) >= MIN_BASE64_CHARS and BASE64_IMAGE.match(text)):
        message = "an image in the place of a text"
        raise DataError(message, place=place, fix=f"Send the part {IMAGE_PART_EXAMPLE}")
    return JsonValue(text, Place(place), Path()).parse_text()


def load_image(url: str, place: str, load_url: UrlLoader) -> ImageRef:
    """Return the image of a data: URL, or through `load_url` of another URL, undecoded.

    Raises:
        DataError: broken base64, or as `load_url`.
    """
    if url[:5].lower() != "data:":
        return load_url(url, place)
    header, comma, body = url.partition(",")
    return JsonValue(header.lower() + comma + body, Place(place), Path()).parse_image()


def _to_part(part: TextPart | ImagePart, place: str, load_url: UrlLoader) -> Part:
    """Return one content part as a text or an image; raises as `to_parts`."""
    if isinstance(part, TextPart):
        return check_text(part.text, f"{place}.text")
    return load_image(part.url, f"{place}.image_url", load_url)
