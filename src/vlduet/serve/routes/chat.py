"""POST /v1/chat/completions: an answer to a conversation, whole or streamed, or from the index."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Tag

from vlduet.data.records import ImageRef, Message, extract_images
from vlduet.errors import DataError, ImageError
from vlduet.model.generation.continuous import SamplingParams
from vlduet.retrieval.rag import build_messages
from vlduet.retrieval.search import Hit
from vlduet.serve.content import (
    MAX_PARTS,
    Content,
    ContentModel,
    ImagePart,
    OptionalContent,
    UrlLoader,
    check_number_of_parts,
    check_size,
    make_discriminator,
    to_parts,
)
from vlduet.serve.openapi import describe_body
from vlduet.serve.resources import Resources, await_while_connected, json_response
from vlduet.serve.routes.search import SearchHit
from vlduet.serve.scheduler import ChatRequest
from vlduet.serve.schemas import ChatUsage, RequestBody, Where
from vlduet.serve.streaming import CompletionWriter, DeltaQueue, collect_deltas, stream_events

DEFAULT_MAX_TOKENS = 256
"""Length limit of an answer whose request gives none."""
MAX_MESSAGES = 4096
MAX_STOP_STRINGS = 16
"""Number of stop strings; each is searched for after every token."""
EMPTY_CONTENTS: tuple[object, ...] = (None, "", [])
StopString = Annotated[str, Field(max_length=256)]
StopStrings = Annotated[
    Annotated[StopString, Tag("text")]
    | Annotated[Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS)], Tag("list")],
    make_discriminator("is neither text nor a list", 'Send ["...", ...]'),
]


class SystemMessage(ContentModel):
    """Instruction for the whole conversation; an empty one is left out."""

    role: Literal["system", "developer"]
    content: OptionalContent | None = None


class UserMessage(ContentModel):
    """Question of the user."""

    role: Literal["user"]
    content: Content


class AssistantMessage(ContentModel):
    """Earlier answer of the model, which may be empty."""

    role: Literal["assistant"]
    content: OptionalContent | None = None


ChatMessage = Annotated[SystemMessage | UserMessage | AssistantMessage, Field(discriminator="role")]


class RetrievalOptions(BaseModel):
    """Value of `retrieval` in a chat: the last question is answered from the index."""

    model_config = ConfigDict(extra="forbid", strict=True)
    k: int = Field(3, ge=1, le=100, description="Number of references in the prompt.")
    where: Where | None = None


class StreamOptions(ContentModel):
    """Value of `stream_options`."""

    include_usage: bool | None = Field(
        None, description="Send the usage in a last event of its own, without choices."
    )


def _check_messages(values: Any) -> Any:
    """Return the value of `messages` unchanged; raise DataError for too many parts."""
    if isinstance(values, list):
        contents = [value.get("content") for value in values if isinstance(value, dict)]
        check_number_of_parts(contents, "messages", limit=MAX_PARTS)
    return values


class ChatBody(RequestBody):
    """Body of POST /v1/chat/completions."""

    messages: Annotated[
        list[ChatMessage],
        Field(min_length=1, max_length=MAX_MESSAGES),
        BeforeValidator(_check_messages),
    ] = Field(description="The conversation; the last message is the user's.")
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(
        None, description="0, the default of this server, takes the likeliest token."
    )
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = Field(
        None, description="Number of likeliest tokens to sample from; 0 and -1 are no limit."
    )
    min_p: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="Lowest probability of a token, as a share of the likeliest one's."
    )
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = Field(
        None,
        description="Seed of the sampling; the same seed in a batch of the same requests gives the "
        "same answer.",
    )
    stop: StopStrings | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    retrieval: RetrievalOptions | None = Field(
        None, description="Answer the last question from the index."
    )

    def parse_messages(self, load_url: UrlLoader | None) -> tuple[Message, ...]:
        """Return the messages of the conversation, of which the last must be the user's.

        Role "developer" becomes "system". Empty system messages are dropped, and empty answers
        become a blank: clients send them, and chat templates require alternating turns. Raises
        DataError for contents as `to_parts`, too many parts or images in all messages together,
        and another last role.
        """
        messages = []
        for i, message in enumerate(self.messages):
            role = "system" if isinstance(message, SystemMessage) else message.role
            if message.content in EMPTY_CONTENTS and role != "user":
                if role == "assistant":
                    messages.append(Message("assistant", (" ",)))
                continue
            parts = to_parts(message.content or "", f"messages[{i}].content", load_url)
            messages.append(Message(role, parts))
        all_parts = [part for message in messages for part in message.parts]
        check_size(len(all_parts), len(extract_images(all_parts)), "messages")
        if not messages or messages[-1].role != "user":
            fix = "End with a question"
            raise DataError("the last turn is not a user's", place="messages", fix=fix)
        return tuple(messages)

    def image_places(self) -> list[str]:
        """Return the paths of all images in the order of the conversation."""
        return [
            f"messages[{i}].content[{j}].image_url"
            for i, message in enumerate(self.messages)
            for j, part in enumerate(message.content or ())
            if isinstance(part, ImagePart)
        ]

    @property
    def max_new_tokens(self) -> int:
        """Length limit of the answer."""
        return self.max_completion_tokens or self.max_tokens or DEFAULT_MAX_TOKENS

    def sampling_params(self) -> SamplingParams:
        """Return how tokens are chosen."""
        return SamplingParams(
            temperature=self.temperature or 0.0,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=self.seed,
            top_k=max(self.top_k or 0, 0),
            min_p=self.min_p or 0.0,
            repetition_penalty=self.repetition_penalty,
        )

    def stop_strings(self) -> tuple[str, ...]:
        """Return the strings that end the answer, without empty ones; () if none are given."""
        strings = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(string for string in strings if string)


class ChatAnswer(BaseModel):
    """Message of the model."""

    role: Literal["assistant"]
    content: str


class ChatChoice(BaseModel):
    """The one answer of a response."""

    index: int
    message: ChatAnswer
    finish_reason: Literal["stop", "length"]
    logprobs: None


class ChatResponse(BaseModel):
    """Response of POST /v1/chat/completions without `stream`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: ChatUsage
    sources: list[SearchHit] | None = Field(
        None, description="Documents that the prompt quotes, if the request has `retrieval`."
    )


def make_router(resources: Resources) -> APIRouter:
    """Return the route of this file."""
    router = APIRouter()

    @router.post(
        "/v1/chat/completions",
        response_model=ChatResponse,
        openapi_extra=describe_body(ChatBody),
        responses={200: {"content": {"text/event-stream": {}}}},
        tags=["Chat"],
    )
    async def create_chat_completion(request: Request) -> Response:
        """Answer a conversation, as a whole or with `stream` as server-sent events."""
        body = await resources.read_body(request, ChatBody)
        if not resources.worker.can_generate:
            message = "this model embeds and does not generate"
            raise DataError(message, place="model", fix="Serve a generative one")
        messages = await asyncio.to_thread(body.parse_messages, resources.load_url)
        sources: Sequence[Hit] | None = None
        if body.retrieval is not None:
            sources, prompt = await _quote_sources(request, resources, body.retrieval, messages[-1])
            messages = (*messages[:-1], *prompt)
        return await _answer(request, resources, body, messages=messages, sources=sources)

    return router


async def _answer(
    request: Request,
    resources: Resources,
    body: ChatBody,
    *,
    messages: tuple[Message, ...],
    sources: Sequence[Hit] | None,
) -> Response:
    """Return the answer to a conversation; if the client disconnects, the chat is cancelled.

    An error before the first token is raised: DataError for a conversation that is too long, and
    ServerBusyError. A later one is raised too, or in a stream becomes an event.
    """
    queue = DeltaQueue()
    chat = ChatRequest(
        messages,
        queue.put,
        body.max_new_tokens,
        sampling_params=body.sampling_params(),
        stop_strings=body.stop_strings(),
    )
    images = extract_images(part for message in messages for part in message.parts)
    first = None
    resources.worker.submit_chat(chat)
    try:
        first = await await_while_connected(request, queue.get())
    except ImageError as error:
        places = dict(zip((image.name for image in images), body.image_places(), strict=False))
        place = places.get(str(error.place), error.place)
        raise ImageError(error.message, place=place, fix=error.fix) from None
    finally:
        chat.cancelled = first is None
    options = body.stream_options
    has_usage_event = options is not None and options.include_usage is True
    writer = CompletionWriter(resources.name, sources, has_usage_event=has_usage_event)
    if body.stream:
        events = stream_events(writer, first, queue, chat=chat)
        headers = {"Cache-Control": "no-cache"}
        return StreamingResponse(events, media_type="text/event-stream", headers=headers)
    deltas = await collect_deltas(first, queue, chat=chat, request=request)
    return await json_response(lambda: writer.response(deltas))


async def _quote_sources(
    request: Request, resources: Resources, options: RetrievalOptions, message: Message
) -> tuple[list[Hit], tuple[Message, ...]]:
    """Search with the last message; return the hits and the message with the hits quoted.

    Raises DataError for several images, no text, and no index; RetrievalError for a filter.
    """
    resources.require_index()
    question, image = split_question(message)
    query = (question,) if image is None else (image, question)
    result = await resources.embed(request, [query], ["messages"], is_query=True)
    hits = await resources.search(query, result.vectors[0], k=options.k, where=options.where)
    return hits, build_messages(question, hits, image=image)


def split_question(message: Message) -> tuple[str, ImageRef | None]:
    """Return the text of a message, its parts joined by line ends, and its image or None.

    Raises DataError for several images, and for a message without text.
    """
    images = extract_images(message.parts)
    if len(images) > 1:
        fix = "Ask about one image at a time"
        raise DataError(f"{len(images)} images", place="retrieval", fix=fix)
    text = "\n".join(part for part in message.parts if isinstance(part, str))
    if not text:
        fix = "Add a question to the image"
        raise DataError("a question without text", place="retrieval", fix=fix)
    return text, images[0] if images else None
