"""Contents to embed: texts, images and mixtures, in each of the forms that clients send.

"a text"                                  a text
"data:image/png;base64,..."               an image
[{"type": "text", ...}, ...]              one content of several parts, as in OpenAI's chats
{"text": "..."}, {"image": "data:..."}    the objects of Cohere and Jina
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, Tag

from vlduet.data.records import Parts
from vlduet.errors import DataError
from vlduet.serve.content import (
    DATA_URL,
    MAX_REQUEST_PARTS,
    PARTS_EXAMPLE,
    ContentModel,
    PartList,
    UrlLoader,
    check_number_of_parts,
    check_text,
    load_image,
    make_discriminator,
    to_parts,
)
from vlduet.serve.schemas import MAX_INPUTS

TOKEN_IDS_REMEDY = (
    "Send the texts: the ids are another tokenizer's (LangChain: OpenAIEmbeddings("
    "check_embedding_ctx_length=False))"
)
NESTING_REMEDY = f'Send one list of parts for each vector: "input": [{PARTS_EXAMPLE}, ...]'


class EmbeddableObject(ContentModel):
    """Content in the form of Cohere and Jina: a text, an image, or both."""

    text: str | None = None
    image: str | None = Field(None, description="data: URL of an image.")


Embeddable = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[PartList, Tag("list")]
    | Annotated[EmbeddableObject, Tag("object")],
    make_discriminator("is neither text nor a list of parts", f"Send a text, or {PARTS_EXAMPLE}"),
]
"""A content to embed: a text, a list of content parts, or an object with a text or an image."""


def check_inputs(values: Any) -> Any:
    """Return the value of `input` unchanged.

    Raises:
        DataError: token ids, a content part that is not inside a list of parts, or too many parts.
            Pydantic, which calls this first, passes it on.
    """
    if isinstance(values, list):
        check_number_of_parts(values, "input", limit=MAX_REQUEST_PARTS)
        for i, item in enumerate(values):
            _check_item(item, i)
    return values


Inputs = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[
        Annotated[list[Embeddable], Field(min_length=1, max_length=MAX_INPUTS)], Tag("list")
    ],
    make_discriminator("is neither text nor a list", 'Send ["...", ...]'),
    BeforeValidator(check_inputs),
]
"""One text, or a list of contents to embed."""
INPUTS_DESCRIPTION = (
    "A text, or a list of which each item is a text, a list of content parts, or an object with "
    "text or image. A text that is a data: URL of an image is the image."
)


def parse_inputs(values: str | list[Any], load_url: UrlLoader) -> tuple[list[Parts], list[str]]:
    """Return the contents of `Inputs` and the path of each; a text alone is one content.

    Raises DataError for a content that cannot be embedded (see `parse_embeddable`).
    """
    if isinstance(values, str):
        return [parse_embeddable(values, "input", load_url)], ["input"]
    places = [f"input[{i}]" for i in range(len(values))]
    items = [
        parse_embeddable(item, place, load_url) for item, place in zip(values, places, strict=True)
    ]
    return items, places


def parse_embeddable(value: Any, place: str, load_url: UrlLoader) -> Parts:
    """Return an `Embeddable`, the value at `place` of a body, as parts.

    A text that is the data: URL of an image is the image. An object with both has the image first.

    Raises:
        DataError: an object with neither text nor image, and as `content.to_parts`.
    """
    if isinstance(value, str) and DATA_URL.match(value):
        return (load_image(value.strip(), place, load_url),)
    if not isinstance(value, EmbeddableObject):
        return to_parts(value, place, load_url)
    if value.text is None and value.image is None:
        fix = 'Send {"text": "..."} or {"image": "data:image/png;base64,..."}'
        raise DataError("neither text nor image", place=place, fix=fix)
    parts: Parts = ()
    if value.image is not None:
        parts += (load_image(value.image, f"{place}.image", load_url),)
    if value.text is not None:
        parts += (check_text(value.text, f"{place}.text"),)
    return parts


def _check_item(item: Any, position: int) -> None:
    """Raise DataError for token ids, and for a content part that is not inside a list."""
    first = item[0] if isinstance(item, list) and item else item
    if isinstance(first, int) and not isinstance(first, bool):
        place = f"input[{position}]" if isinstance(item, list) else "input"
        raise DataError("token ids", place=place, fix=TOKEN_IDS_REMEDY)
    if isinstance(item, dict) and "type" in item:
        message = "a content part that is not in a list of parts"
        raise DataError(message, place=f"input[{position}]", fix=NESTING_REMEDY)
