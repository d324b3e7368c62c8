"""Schema of the field `retrieval` of a chat: what is searched for in the index, and when."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from vlduet.errors import DataError
from vlduet.model.generation.interleave import DEFAULT_IMAGES, ImageOptions
from vlduet.retrieval.rag import Scope
from vlduet.serve.content import MAX_IMAGES, MAX_TEXT_CHARS
from vlduet.serve.schemas import Where


class RetrievalFields(BaseModel):
    """Fields of both modes."""

    model_config = ConfigDict(extra="forbid", strict=True)
    where: Where | None = Field(None, description="Filter on metadata.")


class ContextRetrieval(RetrievalFields):
    """Retrieval before the answer: the prompt quotes the best documents."""

    mode: Literal["context"] = "context"
    scope: Scope = Field(
        "last", description="What is searched for: the last message, or the whole dialog."
    )
    k: int = Field(3, ge=1, le=100, description="Number of references in the prompt.")


class InterleavedRetrieval(RetrievalFields):
    """Retrieval during the answer: an image of the index may follow each sentence."""

    mode: Literal["interleave"]
    scope: Literal["dialog"] = Field(
        "dialog", description="The whole dialog up to the sentence is what is searched for."
    )
    threshold: Annotated[float, Field(ge=-1, le=1)] | None = Field(
        None, description="Lowest score of an image; without it the best one follows each sentence."
    )
    max_images: int | None = Field(
        None,
        ge=1,
        le=MAX_IMAGES,
        description="Most images of the answer; 8 if absent, or with a template as many as it has.",
    )
    feed_back: bool = Field(
        False,
        description="Let the model see the images, these and those of its earlier answers.",
    )
    template: Annotated[str, Field(min_length=1, max_length=MAX_TEXT_CHARS)] | None = Field(
        None,
        description="Text of the answer with {image} where an image is to be; nothing is written.",
    )

    def image_options(self) -> ImageOptions:
        """Return which images the answer gets; raise DataError for a template with a threshold."""
        if self.template is None:
            max_images = self.max_images or DEFAULT_IMAGES.max_images
            return ImageOptions(self.threshold, self.where, max_images)
        if self.threshold is not None:
            fix = "Leave it out: every place of a template gets the best image"
            raise DataError("a threshold for a template", place="retrieval.threshold", fix=fix)
        return ImageOptions(None, self.where, self.max_images or MAX_IMAGES)


MODES: dict[str, type[RetrievalFields]] = {
    "context": ContextRetrieval,
    "interleave": InterleavedRetrieval,
}


def _choose_mode(value: Any) -> Any:
    """Return the value of `retrieval` with its mode, by default `context`.

    Raises DataError for a field that only the other mode has.
    """
    if not isinstance(value, dict):
        return value
    value = {"mode": "context"} | value
    schema = MODES.get(value["mode"]) if isinstance(value["mode"], str) else None
    for other_mode, other_schema in MODES.items():
        for name in value:
            if schema and name in other_schema.model_fields and name not in schema.model_fields:
                message = f'mode "{value["mode"]}" has no such field'
                fix = f'Leave it out, or send "mode": "{other_mode}"'
                raise DataError(message, place=f"retrieval.{name}", fix=fix)
    return value


RetrievalOptions = Annotated[
    Annotated[ContextRetrieval | InterleavedRetrieval, Field(discriminator="mode")],
    BeforeValidator(_choose_mode),
]
"""Value of `retrieval` in a chat."""
