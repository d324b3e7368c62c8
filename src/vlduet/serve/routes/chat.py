"""POST /v1/chat/completions: an answer to a conversation, whole or streamed.

With `retrieval`, the prompt quotes documents of the index, or images of it follow the sentences.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, BeforeValidator, Field, Tag

from vlduet.data.records import Message, extract_images
from vlduet.errors import ConfigError, DataError, ImageError, ModelError, RetrievalError
from vlduet.model.duet import DuetModel
from vlduet.model.generation.continuous import Request as BatchEntry
from vlduet.model.generation.continuous import SamplingParams
from vlduet.model.generation.interleave import InterleavedAnswer
from vlduet.retrieval.rag import add_references, check_question, select_query
from vlduet.retrieval.search import Hit
from vlduet.serve.chats import ChatOutput, ChatRequest, ImageCounts, Interleaving
from vlduet.serve.content import (
    MAX_PARTS,
    Content,
    ContentModel,
    ImagePart,
    OptionalContent,
    check_number_of_parts,
    check_size,
    make_discriminator,
    to_parts,
)
from vlduet.serve.index_images import UrlImages
from vlduet.serve.openapi import describe_body
from vlduet.serve.resources import Resources, await_while_connected, json_response
from vlduet.serve.retrieval_options import (
    ContextRetrieval,
    InterleavedRetrieval,
    RetrievalOptions,
)
from vlduet.serve.routes.search import SearchHit
from vlduet.serve.schemas import ChatUsage, RequestBody
from vlduet.serve.streaming import CompletionWriter, DeltaQueue, collect_outputs, stream_events

DEFAULT_MAX_TOKENS = 256
"""Length limit of an answer whose request gives none."""
MAX_MESSAGES = 4096
MAX_STOP_STRINGS = 16
"""Number of stop strings; each is searched for after every token."""
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


@dataclass(frozen=True, slots=True)
class ParsedMessages:
    """Conversation of a body."""

    messages: tuple[Message, ...]
    image_places: list[str]
    """Paths of the images of the messages in the body, in order."""
    num_left_out: int
    """Number of images of earlier answers that are not among the messages."""


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
        None,
        description="Answer from the index: with documents in the prompt (mode context), or with "
        "images between the sentences (mode interleave).",
    )

    def parse_messages(self, url_images: UrlImages) -> ParsedMessages:
        """Return the messages of the conversation, of which the last must be the user's.

        Role "developer" becomes "system". Empty system messages are dropped, and empty answers
        become a blank: clients send them, and chat templates require alternating turns. Images of
        the index in answers are left out unless the model is to see such images (`feed_back`): it
        did not see them when it answered.

        Raises DataError for contents as `to_parts`, too many parts or images in all messages
        together, and another last role.
        """
        messages: list[Message] = []
        image_places: list[str] = []
        num_left_out = 0
        for i, message in enumerate(self.messages):
            role = "system" if isinstance(message, SystemMessage) else message.role
            content, place = message.content or "", f"messages[{i}].content"
            if not content and role != "user":
                if role == "assistant":
                    messages.append(Message("assistant", (" ",)))
                continue
            left_out = self._find_left_out(message, url_images)
            parts = to_parts(content, place, url_images.load, left_out=left_out)
            messages.append(Message(role, parts or (" ",)))
            is_image = [isinstance(part, ImagePart) for part in content]
            kept = [j for j in range(len(content)) if is_image[j] and j not in left_out]
            image_places += [f"{place}[{j}].image_url" for j in kept]
            num_left_out += sum(is_image) - len(kept)
        all_parts = [part for message in messages for part in message.parts]
        check_size(len(all_parts), len(extract_images(all_parts)), "messages")
        if not messages or messages[-1].role != "user":
            fix = "End with a question"
            raise DataError("the last turn is not a user's", place="messages", fix=fix)
        return ParsedMessages(tuple(messages), image_places, num_left_out)

    def _find_left_out(self, message: ChatMessage, url_images: UrlImages) -> set[int]:
        """Return the positions of parts of an earlier answer that are not in the prompt.

        These are images as in `parse_messages`, and blank texts, which may be between two images.
        """
        if not isinstance(message, AssistantMessage) or not isinstance(message.content, list):
            return set()
        options = self.retrieval
        sees_images = isinstance(options, InterleavedRetrieval) and options.feed_back
        left_out = set()
        for i, part in enumerate(message.content):
            if isinstance(part, ImagePart):
                is_own = url_images.find_document_id(part.url) is not None
                if is_own and not sees_images:
                    left_out.add(i)
            elif not part.text.strip():
                left_out.add(i)
        return left_out

    @property
    def has_usage_event(self) -> bool:
        """Whether a stream ends with an event for the usage."""
        return self.stream_options is not None and self.stream_options.include_usage is True

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


class AnswerText(BaseModel):
    """Text of an interleaved answer."""

    type: Literal["text"]
    text: str


class AnswerImageUrl(BaseModel):
    """Address of an image of the index."""

    url: str = Field(description="Path of the image on this server.")


class AnswerImagePart(BaseModel):
    """Image of an interleaved answer, which may be sent back as a part of a message."""

    type: Literal["image_url"]
    image_url: AnswerImageUrl
    hit: SearchHit = Field(description="Its document; the rank is the number of the image.")


class ChatAnswer(BaseModel):
    """Message of the model."""

    role: Literal["assistant"]
    content: str | list[AnswerText | AnswerImagePart] = Field(
        description="A text, or with mode interleave a list of texts and images."
    )


class AnswerImageCounts(BaseModel):
    """Numbers of images of the index in an answer and in its prompt."""

    retrieved: int = Field(description="Images in the answer.")
    fed_back: int = Field(description="Of these, images that the model saw before it went on.")
    left_out: int = Field(description="Images of earlier answers that the model did not see.")


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
        None,
        description="With `retrieval`: the documents that are quoted, or those of the images.",
    )
    images: AnswerImageCounts | None = Field(
        None, description="With mode interleave, or if images of earlier answers are left out."
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
        parsed = await asyncio.to_thread(body.parse_messages, resources.url_images(request))
        queue = DeltaQueue()
        chat = ChatRequest(
            parsed.messages,
            queue.put,
            body.max_new_tokens,
            sampling_params=body.sampling_params(),
            stop_strings=body.stop_strings(),
            image_counts=ImageCounts(left_out=parsed.num_left_out),
        )
        sources = None
        if isinstance(body.retrieval, ContextRetrieval):
            sources = await _find_sources(request, resources, body.retrieval, parsed.messages)
            chat.messages = add_references(parsed.messages, sources)
        chat.interleaving = await _prepare_interleaving(resources, body, parsed.messages)
        writer = CompletionWriter(
            resources.name, chat, sources=sources, has_usage_event=body.has_usage_event
        )
        first = await _start_chat(request, resources, chat, queue, parsed.image_places)
        if body.stream:
            events = stream_events(writer, first, queue)
            headers = {"Cache-Control": "no-cache"}
            return StreamingResponse(events, media_type="text/event-stream", headers=headers)
        outputs = await collect_outputs(first, queue, chat=chat, request=request)
        return await json_response(lambda: writer.response(outputs))

    return router


async def _start_chat(
    request: Request,
    resources: Resources,
    chat: ChatRequest,
    queue: DeltaQueue,
    image_places: Sequence[str],
) -> ChatOutput:
    """Submit a chat that outputs to `queue` and return its first output.

    If the client disconnects, the chat is cancelled. `image_places` are the paths in the body of
    the images in the chat's messages, in order.

    Raises:
        DataError: a conversation that is too long, or a broken image, at its path.
        ServerBusyError: too many requests wait.
        HTTPException: 499 if the client disconnects.
    """
    first = None
    resources.worker.submit_chat(chat)
    try:
        first = await await_while_connected(request, queue.get())
    except ImageError as error:
        images = extract_images(part for message in chat.messages for part in message.parts)
        places = dict(zip((image.name for image in images), image_places, strict=False))
        place = places.get(str(error.place), error.place)
        raise ImageError(error.message, place=place, fix=error.fix) from None
    finally:
        chat.cancelled = first is None
    return first


async def _find_sources(
    request: Request,
    resources: Resources,
    options: ContextRetrieval,
    messages: tuple[Message, ...],
) -> list[Hit]:
    """Return the documents that the prompt quotes.

    Raises DataError for a question without text and for no index; RetrievalError for a filter.
    """
    resources.require_index()
    try:
        check_question(messages)
    except RetrievalError as error:
        raise DataError(error.message, place="messages", fix=error.fix) from None
    query = select_query(messages, options.scope)
    result = await resources.embed(request, [query], ["messages"], is_query=True)
    return await resources.search(query, result.vectors[0], k=options.k, where=options.where)


async def _prepare_interleaving(
    resources: Resources, body: ChatBody, messages: tuple[Message, ...]
) -> Interleaving | None:
    """Return how images of the index enter the answer, None if none do.

    Raises DataError for a model or an index that cannot be used so, or a template without a place;
    RetrievalError for a filter.
    """
    options, model = body.retrieval, resources.worker.model
    if not isinstance(options, InterleavedRetrieval):
        return None
    assert isinstance(model, DuetModel)
    where = options.where
    await resources.query_index(lambda index: index.check_image_search(where))
    entry = BatchEntry(
        body.max_new_tokens,
        sampling_params=body.sampling_params(),
        stop_strings=body.stop_strings(),
    )
    try:
        answer = InterleavedAnswer(
            model,
            messages,
            entry,
            template=options.template or "",
            feed_back=options.feed_back,
            images=options.image_options(),
        )
    except (ConfigError, ModelError) as error:
        place = "retrieval.template" if isinstance(error, ConfigError) else "retrieval.mode"
        raise DataError(error.message, place=place, fix=error.fix) from None
    return Interleaving(answer, resources.read_index)
