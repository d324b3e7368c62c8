"""Schemas that several endpoints share: base of bodies, truncation, filters, usage and errors."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, Tag

from vlduet.errors import DataError
from vlduet.serve.content import make_discriminator

MAX_INPUTS = 2048
"""Number of inputs, documents or labels in one request."""

Where = Annotated[
    Annotated[dict[str, Any], Tag("object")] | Annotated[list[str], Tag("list")],
    make_discriminator("is no filter", 'Send {"key": value}, or ["key=value"]'),
]
"""A filter on metadata, as an object or as a list of conditions (docs/retrieve.md)."""


class RequestBody(BaseModel):
    """Body of a request. What happens with unknown fields: `fields.check_fields`."""

    model_config = ConfigDict(extra="allow", strict=True)
    model: str | None = Field(None, description="Name of the model; only the one that is served.")


class EmbeddingOptions(RequestBody):
    """Body of a request that embeds texts, with the fields that allow texts to be cut."""

    truncate: bool | Literal["NONE", "END"] | None = Field(
        None,
        description="Cut texts that are longer than the model's limit, instead of refusing them. "
        "The response says how many were cut.",
    )
    truncate_prompt_tokens: int | None = Field(
        None, ge=-1, description="The same in vLLM's form: -1, or the model's limit."
    )

    def allows_truncation(self, limit: int) -> bool:
        """Return whether texts may be cut to the model's limit, a number of tokens.

        Raises:
            DataError: a number of tokens that is not the limit.
        """
        if self.truncate_prompt_tokens not in (None, -1, limit):
            message = f"{self.truncate_prompt_tokens}: texts are cut to the model's limit only"
            fix = f"Send -1 or {limit}"
            raise DataError(message, place="truncate_prompt_tokens", fix=fix)
        return self.truncate_prompt_tokens is not None or self.truncate in (True, "END")


class EmbeddingUsage(BaseModel):
    """Number of tokens that were embedded, twice, as OpenAI's clients read it."""

    prompt_tokens: int
    total_tokens: int


class ChatUsage(EmbeddingUsage):
    """Number of tokens of a chat."""

    completion_tokens: int


class ErrorDetails(BaseModel):
    """Reason of an error."""

    message: str
    type: str
    param: Annotated[str | None, Field(description="Path of the field at fault.")]
    code: str | None


class ErrorBody(BaseModel):
    """Body of every response with an error, in OpenAI's format."""

    error: ErrorDetails


def embedding_usage(num_tokens: int) -> dict[str, int]:
    """Return a number of embedded tokens as OpenAI's `usage`."""
    return {"prompt_tokens": num_tokens, "total_tokens": num_tokens}


def chat_usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Return the numbers of tokens of a chat, and their sum, as OpenAI's `usage`."""
    counts = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
    return counts | {"total_tokens": prompt_tokens + completion_tokens}
