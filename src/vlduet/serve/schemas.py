"""What comes in and what goes out: OpenAI's forms, with images as data: URLs only, and two fields of ours.

`input_type` says which side of a search an embedding is for, and `retrieval` has a chat answered from the index.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from vlduet.data.records import (
    ImageRef,
    Message,
    Part,
    Parts,
    Place,
    extract_images,
    parse_image,
    parse_text,
)
from vlduet.errors import DataError, suggest_name
from vlduet.model.generation.continuous import SamplingParams
from vlduet.retrieval.search import Hit

IGNORED_FIELDS = {
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "stream_options",
}
"""Fields of OpenAI's that change no answer."""
NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logprobs": (False,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "top_logprobs": (0,),
    "modalities": (["text"],),
    "functions": ([],),
    "function_call": ("none", "auto"),
}
"""Fields of OpenAI's that are not here, and the values that ask for nothing."""
MAX_INPUTS = 2048
MAX_PARTS, MAX_IMAGES = 256, 32
"""Of one input, or of a whole conversation: what is small to send must not take the model's thread for minutes."""
MAX_TEXT_CHARS = 1 << 20
"""Letters of one part: far beyond any window."""
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


class RequestBody(BaseModel):
    """A request. What it asks for and does not get is an error, never silence."""

    model_config = ConfigDict(extra="allow", strict=True)
    model: str | None = None
    """The name under `/v1/models`, which most clients insist on sending."""

    def check_extra_fields(self) -> None:
        """Raises DataError for a field that is not known, or not served."""
        for key, value in (self.model_extra or {}).items():
            if key in IGNORED_FIELDS or value in NEUTRAL_VALUES.get(key, ()):
                continue
            if key in NEUTRAL_VALUES:
                raise DataError(f"{value!a:.40} is not served", place=key, fix="Leave it out")
            raise DataError(
                "unknown field",
                place=f"{key:.40}",
                fix=suggest_name(key[:40], type(self).model_fields),
            )


class EmbeddingsBody(RequestBody):
    """POST /v1/embeddings."""

    input: str | list[Any]
    """A text; or a list of texts and of lists of content parts."""
    input_type: Literal["query", "document"] = "document"
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None

    def parse_inputs(self) -> list[Part | Parts]:
        """What is to be embedded. Raises DataError."""
        given = self.input if isinstance(self.input, list) else [self.input]
        if not 0 < len(given) <= MAX_INPUTS:
            raise DataError(f"{len(given)} inputs", place="input", fix=f"Send 1 to {MAX_INPUTS}")
        places = (
            Place(f"input[{i}]" if isinstance(self.input, list) else "input")
            for i in range(len(given))
        )
        return [parse_content(content, place) for content, place in zip(given, places, strict=True)]


class RetrievalOptions(BaseModel):
    """Have the question answered from the index."""

    model_config = ConfigDict(extra="forbid", strict=True)
    k: int = Field(3, ge=1, le=100)
    """References put in the prompt."""
    where: dict[str, Any] | list[str] | None = None


class ChatBody(RequestBody):
    """POST /v1/chat/completions."""

    messages: list[dict[str, Any]]
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(0.0, ge=0, le=2)
    """0, the default here, is greedy."""
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    """With it, and the same company, the same answer."""
    stop: (
        Annotated[str, Field(max_length=256)] | list[Annotated[str, Field(max_length=256)]] | None
    ) = None
    stream: bool = False
    retrieval: RetrievalOptions | None = None

    def parse_messages(self) -> tuple[Message, ...]:
        """The turns, the last one the user's. Raises DataError."""
        turns = []
        for i, message in enumerate(self.messages):
            role, content, place = message.get("role"), message.get("content"), f"messages[{i}]"
            if not isinstance(role, str) or role not in ROLES:
                fix = f"Use one of {', '.join(ROLES)}"
                raise DataError(f"role {role!a:.40}", place=f"{place}.role", fix=fix)
            if content in (None, "", []) and role != "user":
                # Clients send instructions that nobody wrote, and empty answers back; templates want turns to alternate.
                turns += [Message("assistant", (" ",))] if role == "assistant" else []
                continue
            turns.append(Message(ROLES[role], parse_content(content, Place(f"{place}.content"))))
        parts = [part for turn in turns for part in turn.parts]
        _check_size(len(parts), len(extract_images(parts)), "messages")
        if not turns or turns[-1].role != "user":
            raise DataError(
                "the last turn is not a user's", place="messages", fix="End with a question"
            )
        return tuple(turns)

    def sampling_options(self) -> SamplingParams:
        """How tokens are chosen."""
        return SamplingParams(self.temperature, self.top_p, self.seed)

    def stop_strings(self) -> tuple[str, ...]:
        """Strings that end an answer. Raises DataError for more than sixteen: each is looked for after every token."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(given) > 16:
            raise DataError(f"{len(given)} strings", place="stop", fix="Send 16 at most")
        return tuple(each for each in given if each)


def split_question(turn: Message) -> tuple[str, ImageRef | None]:
    """A turn as a query of the index. Raises DataError for more than one image."""
    images = extract_images(turn.parts)
    if len(images) > 1:
        raise DataError(
            f"{len(images)} images", place="retrieval", fix="Ask about one image at a time"
        )
    return "\n".join(part for part in turn.parts if isinstance(part, str)), images[
        0
    ] if images else None


class SearchBody(RequestBody):
    """POST /v1/search."""

    query: str | list[Any]
    """A text, or content parts."""
    k: int = Field(10, ge=1, le=1000)
    where: dict[str, Any] | list[str] | None = None

    def parse_query(self) -> Parts:
        """Raises DataError."""
        return parse_content(self.query, Place("query"))


def parse_content(content: Any, place: Place) -> Parts:
    """A text or OpenAI's content parts. A path is refused: it would be one of the server's own files.

    Raises:
        DataError: at `place`.
    """
    if isinstance(content, str):
        return (_text(content, place),)
    if not isinstance(content, list) or not content:
        raise DataError(
            "neither text nor a list of parts",
            place=place,
            fix='Send [{"type": "text", "text": ...}]',
        )
    _check_size(
        len(content), sum(isinstance(part, dict) and "image_url" in part for part in content), place
    )
    return tuple(_part(part, Place(f"{place}[{i}]")) for i, part in enumerate(content))


def _check_size(parts: int, images: int, place: object) -> None:
    if parts > MAX_PARTS or images > MAX_IMAGES:
        fix = f"Send {MAX_PARTS} at most, and of these {MAX_IMAGES} images"
        raise DataError(f"{parts} parts with {images} images", place=place, fix=fix)


def _text(value: Any, place: Place) -> str:
    if isinstance(value, str) and len(value) > MAX_TEXT_CHARS:
        raise DataError(
            f"a text of {len(value)} letters", place=place, fix=f"Send {MAX_TEXT_CHARS} at most"
        )
    return parse_text(value, place)


def _part(part: Any, place: Place) -> Part:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
        return _text(part.get("text"), Place(f"{place}.text"))
    if kind != "image_url":
        raise DataError("not a part", place=place, fix="Send parts of type text or image_url")
    url = part.get("image_url")
    url = url.get("url") if isinstance(url, dict) else url
    if not isinstance(url, str) or not url.startswith("data:"):
        raise DataError(
            "an image that is no data: URL",
            place=f"{place}.image_url",
            fix="Send data:image/png;base64,...",
        )
    return parse_image(url, Place(f"{place}.image_url"), Path())


# ------------------------------------------------------------------ out


def embeddings_response(vectors: np.ndarray, *, model: str, as_base64: bool) -> dict[str, Any]:
    """float32[N, D] as OpenAI's list: numbers, or the base64 of little-endian float32."""

    def form(vector: np.ndarray) -> str | list[float]:
        return (
            base64.b64encode(vector.astype("<f4").tobytes()).decode()
            if as_base64
            else vector.tolist()
        )

    data = [
        {"object": "embedding", "index": i, "embedding": form(vector)}
        for i, vector in enumerate(vectors)
    ]
    return {"object": "list", "model": model, "data": data}


def hits_response(found: Sequence[Hit]) -> list[dict[str, Any]]:
    """What was found. Paths of the server's files stay with it."""
    return [
        {
            "rank": hit.rank,
            "score": hit.score,
            "id": hit.id,
            "text": hit.text,
            "metadata": _plain(hit.metadata),
        }
        for hit in found
    ]


def _plain(metadata: Mapping[str, Any]) -> Any:
    """Without NaN and infinities, which Python's JSON can spell and JSON cannot."""
    return json.loads(json.dumps(dict(metadata)), parse_constant=lambda _: None)


def usage_response(prompt: int, written: int) -> dict[str, int]:
    """Tokens of a chat."""
    return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}


def error_response(
    message: str, *, error_type: str = "invalid_request_error", place: object | None = None
) -> Mapping[str, Any]:
    """OpenAI's error."""
    return {
        "error": {
            "message": message,
            "type": error_type,
            "param": None if place is None else str(place),
            "code": None,
        }
    }
