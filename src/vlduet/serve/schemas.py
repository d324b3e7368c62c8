"""Request and response bodies in OpenAI's format, with two fields of our own.

Images are accepted as data: URLs only. `input_type` tells whether an embedding is for a query or a
document; `retrieval` has a chat answered from the index.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from vlduet.data.record_json import JsonValue
from vlduet.data.records import ImageRef, Message, Part, Parts, Place, extract_images
from vlduet.errors import DataError, suggest_name
from vlduet.model.generation.continuous import SamplingParams
from vlduet.retrieval.search import Hit

IGNORED_FIELDS = {"user", "metadata", "store", "service_tier", "stream_options"}
IGNORED_FIELDS |= {"safety_identifier", "prompt_cache_key"}
"""Fields of OpenAI's API that do not change the answer."""
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
"""Fields of OpenAI's API that are not supported, and the values that request nothing."""
MAX_INPUTS = 2048
"""Number of inputs in one request for embeddings."""
MAX_PARTS = 256
MAX_IMAGES = 32
"""Number of content parts, and of images among them, in one input or a whole conversation: a
request that is small to send must not occupy the model's thread for minutes."""
MAX_TEXT_CHARS = 1 << 20
"""Number of characters in one part, far more than any context length."""
MAX_STOP_STRINGS = 16
"""Number of stop strings; each is searched for after every token."""
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
"""Roles of OpenAI's API, and the roles of our messages."""
StopString = Annotated[str, Field(max_length=256)]


class RequestBody(BaseModel):
    """Body of a request. Unsupported fields are an error: they are never ignored silently."""

    model_config = ConfigDict(extra="allow", strict=True)
    model: str | None = None
    """Name of the model as `/v1/models` lists it; most clients insist on sending one."""

    def check_extra_fields(self) -> None:
        """Raise DataError for unknown fields, and for unsupported ones that request something.

        IGNORED_FIELDS are accepted with any value, the keys of NEUTRAL_VALUES with the values
        there.
        """
        for key, value in (self.model_extra or {}).items():
            if key in IGNORED_FIELDS or value in NEUTRAL_VALUES.get(key, ()):
                continue
            if key in NEUTRAL_VALUES:
                raise DataError(f"{value!a:.40} is not served", place=key, fix="Leave it out")
            fix = suggest_name(key[:40], type(self).model_fields)
            raise DataError("unknown field", place=f"{key:.40}", fix=fix)


class EmbeddingsBody(RequestBody):
    """Body of POST /v1/embeddings."""

    input: str | list[Any]
    """A text; or a list of which each item is a text or a list of content parts."""
    input_type: Literal["query", "document"] = "document"
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None

    def parse_inputs(self) -> list[Part | Parts]:
        """Return the items to embed, each a tuple of parts; a text alone is one item.

        Raises DataError for no input, more than MAX_INPUTS, and malformed ones (see
        `parse_content`).
        """
        if isinstance(self.input, str):
            return [parse_content(self.input, Place("input"))]
        if not 0 < len(self.input) <= MAX_INPUTS:
            fix = f"Send 1 to {MAX_INPUTS}"
            raise DataError(f"{len(self.input)} inputs", place="input", fix=fix)
        return [parse_content(item, Place(f"input[{i}]")) for i, item in enumerate(self.input)]


class RetrievalOptions(BaseModel):
    """Value of `retrieval` in a chat: the last question is answered from the index."""

    model_config = ConfigDict(extra="forbid", strict=True)
    k: int = Field(3, ge=1, le=100)
    """Number of references in the prompt."""
    where: dict[str, Any] | list[str] | None = None


class ChatBody(RequestBody):
    """Body of POST /v1/chat/completions."""

    messages: list[dict[str, Any]]
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(0.0, ge=0, le=2)
    """Sampling temperature; 0, the default of this server, is greedy."""
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    """Seed of the sampling; the same seed in a batch of the same requests gives the same answer."""
    stop: StopString | list[StopString] | None = None
    stream: bool = False
    retrieval: RetrievalOptions | None = None

    def parse_messages(self) -> tuple[Message, ...]:
        """Return the messages of the conversation, of which the last must be the user's.

        Role "developer" becomes "system". Empty system messages are dropped, and empty answers
        become a blank: clients send them, and chat templates require alternating turns. Raises
        DataError for no message, an unknown role, malformed content, an empty one of the user, too
        many parts or images in all messages together, and another last role.
        """
        messages = []
        for i, message in enumerate(self.messages):
            role, content = message.get("role"), message.get("content")
            place = f"messages[{i}]"
            if not isinstance(role, str) or role not in ROLES:
                fix = f"Use one of {', '.join(ROLES)}"
                raise DataError(f"role {role!a:.40}", place=f"{place}.role", fix=fix)
            if content in (None, "", []) and role != "user":
                if role == "assistant":
                    messages.append(Message("assistant", (" ",)))
                continue
            parts = parse_content(content, Place(f"{place}.content"))
            messages.append(Message(ROLES[role], parts))
        all_parts = [part for message in messages for part in message.parts]
        _check_size(len(all_parts), len(extract_images(all_parts)), "messages")
        if not messages or messages[-1].role != "user":
            fix = "End with a question"
            raise DataError("the last turn is not a user's", place="messages", fix=fix)
        return tuple(messages)

    def sampling_params(self) -> SamplingParams:
        """Return how tokens are chosen."""
        return SamplingParams(self.temperature, self.top_p, self.seed)

    def stop_strings(self) -> tuple[str, ...]:
        """Return the strings that end the answer, without empty ones; () if none are given.

        Raises DataError for more than MAX_STOP_STRINGS.
        """
        strings = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(strings) > MAX_STOP_STRINGS:
            fix = f"Send {MAX_STOP_STRINGS} at most"
            raise DataError(f"{len(strings)} strings", place="stop", fix=fix)
        return tuple(string for string in strings if string)


def split_question(message: Message) -> tuple[str, ImageRef | None]:
    """Return the text of a message, its parts joined by line ends, and its image or None.

    The text is empty if there is none. Raises DataError for several images.
    """
    images = extract_images(message.parts)
    if len(images) > 1:
        fix = "Ask about one image at a time"
        raise DataError(f"{len(images)} images", place="retrieval", fix=fix)
    text = "\n".join(part for part in message.parts if isinstance(part, str))
    return text, images[0] if images else None


class SearchBody(RequestBody):
    """Body of POST /v1/search."""

    query: str | list[Any]
    """A text, or a list of content parts."""
    k: int = Field(10, ge=1, le=1000)
    where: dict[str, Any] | list[str] | None = None

    def parse_query(self) -> Parts:
        """Return the parts of the query. Raises DataError as `parse_content` does."""
        return parse_content(self.query, Place("query"))


def parse_content(content: Any, place: Place) -> Parts:
    """Return a text or a list of OpenAI's content parts, the value at `place` of a body, as parts.

    Images are references to their bytes and are not decoded. Raises DataError for any other value,
    an empty list, a malformed part, a blank or too long text, too many parts or images, and an
    image that is not a data: URL: a path would name a file of the server.
    """
    if isinstance(content, str):
        return (_parse_text(content, place),)
    if not isinstance(content, list) or not content:
        fix = 'Send [{"type": "text", "text": ...}]'
        raise DataError("neither text nor a list of parts", place=place, fix=fix)
    num_images = sum(isinstance(part, dict) and "image_url" in part for part in content)
    _check_size(len(content), num_images, place)
    return tuple(_parse_part(part, Place(f"{place}[{i}]")) for i, part in enumerate(content))


def _check_size(num_parts: int, num_images: int, place: object) -> None:
    """Raise DataError for more parts than `MAX_PARTS` or more images than `MAX_IMAGES`."""
    if num_parts > MAX_PARTS or num_images > MAX_IMAGES:
        fix = f"Send {MAX_PARTS} at most, and of these {MAX_IMAGES} images"
        raise DataError(f"{num_parts} parts with {num_images} images", place=place, fix=fix)


def _parse_text(value: Any, place: Place) -> str:
    """Return `value` unchanged if it is a text, not blank, of at most MAX_TEXT_CHARS characters.

    Raises DataError if not, and for a text that has no UTF-8 encoding.
    """
    if isinstance(value, str) and len(value) > MAX_TEXT_CHARS:
        fix = f"Send {MAX_TEXT_CHARS} at most"
        raise DataError(f"a text of {len(value)} characters", place=place, fix=fix)
    return JsonValue(value, place, Path()).parse_text()


def _parse_part(part: Any, place: Place) -> Part:
    """Return one content part as a text or as a reference to an image, which is not decoded.

    Raises DataError for a part of another type, for a text as `_parse_text`, and for an image whose
    URL is not a valid data: URL.
    """
    part_type = part.get("type") if isinstance(part, dict) else None
    if part_type == "text":
        return _parse_text(part.get("text"), Place(f"{place}.text"))
    if part_type != "image_url":
        raise DataError("not a part", place=place, fix="Send parts of type text or image_url")
    url = part.get("image_url")
    if isinstance(url, dict):
        url = url.get("url")
    url_place = Place(f"{place}.image_url")
    if not isinstance(url, str) or not url.startswith("data:"):
        fix = "Send data:image/png;base64,..."
        raise DataError("an image that is not a data: URL", place=url_place, fix=fix)
    return JsonValue(url, url_place, Path()).parse_image()


# ------------------------------------------------------------------ responses


def embeddings_response(vectors: np.ndarray, *, model: str, as_base64: bool) -> dict[str, Any]:
    """Return embeddings float32[N, D] as the response body of /v1/embeddings, without usage.

    `as_base64` encodes each as base64 of little-endian float32 instead of a list of numbers.
    """
    data = []
    for i, vector in enumerate(vectors):
        embedding = vector.tolist()
        if as_base64:
            embedding = base64.b64encode(vector.astype("<f4").tobytes()).decode()
        data.append({"object": "embedding", "index": i, "embedding": embedding})
    return {"object": "list", "model": model, "data": data}


def hits_response(hits: Sequence[Hit]) -> list[dict[str, Any]]:
    """Return hits as JSON objects of rank, score, id, text and metadata, in order.

    Images are left out: paths of the server's files stay private. NaN and infinities in metadata,
    which Python's JSON can spell and JSON cannot, become null.
    """
    rows = []
    for hit in hits:
        metadata = json.dumps(dict(hit.metadata))
        row = {"rank": hit.rank, "score": hit.score, "id": hit.id, "text": hit.text}
        row["metadata"] = json.loads(metadata, parse_constant=lambda _: None)
        rows.append(row)
    return rows


def usage_response(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Return the numbers of tokens of a chat, and their sum, as OpenAI's `usage`."""
    counts = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
    return counts | {"total_tokens": prompt_tokens + completion_tokens}


def error_response(
    message: str, *, error_type: str = "invalid_request_error", place: object | None = None
) -> dict[str, Any]:
    """Return the body of an error in OpenAI's format; `place` names the field at fault."""
    param = None if place is None else str(place)
    return {"error": {"message": message, "type": error_type, "param": param, "code": None}}
