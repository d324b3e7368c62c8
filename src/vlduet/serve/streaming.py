"""Answers of the model as OpenAI's response body or as its server-sent events."""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, replace
from typing import Any

from fastapi import HTTPException, Request

from vlduet.model.generation.continuous import Delta
from vlduet.retrieval.search import Hit
from vlduet.serve.asgi import CLIENT_CLOSED_REQUEST, error_content
from vlduet.serve.chats import AnswerImage, ChatOutput, ChatRequest
from vlduet.serve.resources import format_hits
from vlduet.serve.schemas import chat_usage

# Not our logger: a server's errors belong in the log of the web server.
logger = logging.getLogger("uvicorn.error")


class DeltaQueue:
    """Queue from the worker's thread to the coroutine of one request, which creates it."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue = asyncio.Queue[ChatOutput | Exception]()

    def put(self, output: ChatOutput | Exception) -> None:
        """Append an output; may be called in any thread."""
        self._loop.call_soon_threadsafe(self._queue.put_nowait, output)

    async def get(self) -> ChatOutput:
        """Wait for the next output and return it; raise it if it is an error."""
        output = await self._queue.get()
        if isinstance(output, Exception):
            raise output
        return output


class CompletionWriter:
    """Formats one answer as OpenAI's response body or as its stream events.

    Args:
        model: name of the model.
        chat: the request, whose counts of images are complete with the last delta.
        sources: hits that the prompt quotes; None if it quotes none.
        has_usage_event: whether the usage is in an event of its own, as clients can ask for, and
            not in the last event with text: clients add up what they receive.
    """

    def __init__(
        self,
        model: str,
        chat: ChatRequest,
        *,
        sources: Sequence[Hit] | None = None,
        has_usage_event: bool = False,
    ):
        answer_id = f"chatcmpl-{uuid.uuid4().hex}"
        self.common = {"id": answer_id, "created": int(time.time()), "model": model}
        self.has_usage_event = has_usage_event
        self.chat = chat
        self.quoted = {} if sources is None else {"sources": format_hits(sources)}
        self._shown: list[dict[str, Any]] = []  # hits of the images that were formatted

    def response(self, outputs: Sequence[ChatOutput]) -> dict[str, Any]:
        """Return the response body for all outputs of the answer, of which the last is a delta.

        The text is stripped of white space at both ends. The content of an interleaved answer is a
        list of parts. Finish reason and usage are those of the last delta; `sources` and `images`
        are fields only if the chat used the index.
        """
        last = outputs[-1]
        assert isinstance(last, Delta)
        content: str | list[dict[str, Any]]
        if self.chat.interleaving is None:
            content = "".join(o.text for o in outputs if isinstance(o, Delta)).strip()
        else:
            content = self._collect_parts(outputs)
        message = {"role": "assistant", "content": content}
        choice = {"index": 0, "message": message, "finish_reason": last.finish_reason}
        choice["logprobs"] = None
        body = {"object": "chat.completion", "choices": [choice], **_usage_field(last)}
        return {**self.common, **body, **self.quoted, **self._retrieval_fields()}

    def opening_event(self) -> str:
        """Return the first event of a stream, which contains the role and the quoted sources."""
        return self._event({"role": "assistant", "content": ""}, None, self.quoted)

    def output_event(self, output: ChatOutput) -> str:
        """Return one output as a server-sent event, a text ``data: {...}`` with a blank line.

        An image is in `parts` of the delta, whose `content` is an empty text: clients that know
        texts only add nothing. A delta with a finish reason, the last one, has the images of an
        interleaved answer as `sources`, and the usage, unless there is a `usage_event`.
        """
        if isinstance(output, AnswerImage):
            return self._event({"content": "", "parts": [self._format_image(output)]}, None, {})
        extra = {}
        if output.finish_reason:
            extra = self._retrieval_fields()
            extra |= {} if self.has_usage_event else _usage_field(output)
        content = {"content": output.text} if output.text else {}
        return self._event(content, output.finish_reason, extra)

    def usage_event(self, last: Delta) -> str:
        """Return the event with the usage and without choices, which follows the last delta."""
        return self._chunk_event([], _usage_field(last))

    def _collect_parts(self, outputs: Sequence[ChatOutput]) -> list[dict[str, Any]]:
        """Return an interleaved answer as content parts; texts between two images are one part."""
        parts: list[dict[str, Any]] = []
        for output in outputs:
            if isinstance(output, AnswerImage):
                parts.append(self._format_image(output))
            elif parts and "text" in parts[-1]:
                parts[-1]["text"] += output.text
            elif output.text:
                parts.append({"type": "text", "text": output.text})
        if parts and "text" in parts[0]:
            parts[0]["text"] = parts[0]["text"].lstrip()
        if parts and "text" in parts[-1]:
            parts[-1]["text"] = parts[-1]["text"].rstrip()
        return [part for part in parts if part.get("text") != ""]

    def _format_image(self, image: AnswerImage) -> dict[str, Any]:
        """Return an image as a content part, and add its hit to the sources.

        The hit's rank is the number of the image in the answer.
        """
        (hit,) = format_hits([replace(image.hit, rank=len(self._shown) + 1)])
        self._shown.append(hit)
        return {"type": "image_url", "image_url": {"url": hit["image"]}, "hit": hit}

    def _retrieval_fields(self) -> dict[str, Any]:
        """Return the fields `sources` and `images` at the end of an answer; {} without images."""
        counts = self.chat.image_counts
        fields: dict[str, Any] = {}
        if self.chat.interleaving is not None:
            fields = {"sources": self._shown}
        if fields or counts.left_out:
            fields["images"] = asdict(counts)
        return fields

    def _event(
        self, delta: dict[str, Any], finish_reason: str | None, extra: dict[str, Any]
    ) -> str:
        """Return a chunk with one choice, and the fields of `extra`, as a server-sent event."""
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
        return self._chunk_event([choice], extra)

    def _chunk_event(self, choices: list[dict[str, Any]], extra: dict[str, Any]) -> str:
        """Return a chunk as a server-sent event."""
        chunk = {**self.common, "object": "chat.completion.chunk", "choices": choices, **extra}
        return f"data: {json.dumps(chunk)}\n\n"


async def collect_outputs(
    first: ChatOutput, queue: DeltaQueue, *, chat: ChatRequest, request: Request
) -> list[ChatOutput]:
    """Wait for all outputs of an answer and return them, `first` included.

    The chat is marked as cancelled at the end in every case. Raises HTTPException with status 499
    if the client disconnects, and the error of the chat.
    """
    outputs = [first]
    try:
        while not is_last(outputs[-1]):
            if await request.is_disconnected():
                raise HTTPException(CLIENT_CLOSED_REQUEST, "The client disconnected")
            outputs.append(await queue.get())
    finally:
        chat.cancelled = True
    return outputs


async def stream_events(
    writer: CompletionWriter, output: ChatOutput, queue: DeltaQueue
) -> AsyncIterator[str]:
    """Yield the server-sent events of an answer with first output `output`, then ``data: [DONE]``.

    Deltas without text are skipped, except the last one. An error is logged and becomes an event
    without details, because the status has been sent long before. The chat is marked as cancelled
    at the end, also if the client disconnects.
    """
    try:
        yield writer.opening_event()
        while not is_last(output):
            if isinstance(output, AnswerImage) or output.text:
                yield writer.output_event(output)
            output = await queue.get()
        yield writer.output_event(output)
        if writer.has_usage_event and isinstance(output, Delta):
            yield writer.usage_event(output)
    except Exception as error:
        logger.exception("an answer ended with an error", exc_info=error)
        text = "the answer ended with an error; see the server's log"
        yield f"data: {error_content(text, error_type='server_error').decode()}\n\n"
    finally:
        writer.chat.cancelled = True
    yield "data: [DONE]\n\n"


def is_last(output: ChatOutput) -> bool:
    """Return whether an output ends its answer."""
    return isinstance(output, Delta) and output.finish_reason is not None


def _usage_field(last: Delta) -> dict[str, Any]:
    """Return the field `usage` of an answer whose last delta is `last`."""
    return {"usage": chat_usage(last.prompt_tokens, last.completion_tokens)}
