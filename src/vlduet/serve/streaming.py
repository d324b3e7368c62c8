"""Answers of the model as OpenAI's response body or as its server-sent events."""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import HTTPException, Request

from vlduet.model.generation.continuous import Delta
from vlduet.retrieval.search import Hit
from vlduet.serve.asgi import CLIENT_CLOSED_REQUEST, error_content
from vlduet.serve.resources import format_hits
from vlduet.serve.scheduler import ChatRequest
from vlduet.serve.schemas import chat_usage

# Not our logger: a server's errors belong in the log of the web server.
logger = logging.getLogger("uvicorn.error")


class DeltaQueue:
    """Queue from the worker's thread to the coroutine of one request, which creates it."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue = asyncio.Queue[Delta | Exception]()

    def put(self, output: Delta | Exception) -> None:
        """Append an output; may be called in any thread."""
        self._loop.call_soon_threadsafe(self._queue.put_nowait, output)

    async def get(self) -> Delta:
        """Wait for the next output; return it if it is a delta, and raise it if it is an error."""
        output = await self._queue.get()
        if isinstance(output, Exception):
            raise output
        return output


class CompletionWriter:
    """Formats one answer as OpenAI's response body or as its stream events.

    Args:
        model: name of the model.
        sources: hits that the prompt quotes; None if the chat did not use the index.
        has_usage_event: whether the usage is in an event of its own, as clients can ask for, and
            not in the last event with text: clients add up what they receive.
    """

    def __init__(self, model: str, sources: Sequence[Hit] | None, *, has_usage_event: bool = False):
        answer_id = f"chatcmpl-{uuid.uuid4().hex}"
        self.common = {"id": answer_id, "created": int(time.time()), "model": model}
        self.has_usage_event = has_usage_event
        self.sources = {} if sources is None else {"sources": format_hits(sources)}

    def response(self, deltas: list[Delta]) -> dict[str, Any]:
        """Return the response body for all deltas of the answer, which must be at least one.

        The text is stripped of white space at both ends. Finish reason and usage are those of the
        last delta; `sources` is a field only if the chat used the index.
        """
        last = deltas[-1]
        text = "".join(delta.text for delta in deltas).strip()
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": last.finish_reason}
        choice["logprobs"] = None
        body = {"object": "chat.completion", "choices": [choice], **_usage_field(last)}
        return {**self.common, **body, **self.sources}

    def opening_event(self) -> str:
        """Return the first event of a stream, which contains the role and the sources."""
        return self._event({"role": "assistant", "content": ""}, None, self.sources)

    def delta_event(self, delta: Delta) -> str:
        """Return one delta as a server-sent event, a text ``data: {...}`` with a blank line.

        Only a delta with a finish reason, the last one, has the usage too, unless there is a
        `usage_event`.
        """
        extra = {}
        if delta.finish_reason and not self.has_usage_event:
            extra = _usage_field(delta)
        content = {"content": delta.text} if delta.text else {}
        return self._event(content, delta.finish_reason, extra)

    def usage_event(self, last: Delta) -> str:
        """Return the event with the usage and without choices, which follows the last delta."""
        return self._chunk_event([], _usage_field(last))

    def _event(
        self, delta: dict[str, str], finish_reason: str | None, extra: dict[str, Any]
    ) -> str:
        """Return a chunk with one choice, and the fields of `extra`, as a server-sent event."""
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
        return self._chunk_event([choice], extra)

    def _chunk_event(self, choices: list[dict[str, Any]], extra: dict[str, Any]) -> str:
        """Return a chunk as a server-sent event."""
        chunk = {**self.common, "object": "chat.completion.chunk", "choices": choices, **extra}
        return f"data: {json.dumps(chunk)}\n\n"


async def collect_deltas(
    first: Delta, queue: DeltaQueue, *, chat: ChatRequest, request: Request
) -> list[Delta]:
    """Wait for all deltas of an answer and return them, `first` included.

    The chat is marked as cancelled at the end in every case. Raises HTTPException with status 499
    if the client disconnects, and the error of the chat.
    """
    deltas = [first]
    try:
        while deltas[-1].finish_reason is None:
            if await request.is_disconnected():
                raise HTTPException(CLIENT_CLOSED_REQUEST, "The client disconnected")
            deltas.append(await queue.get())
    finally:
        chat.cancelled = True
    return deltas


async def stream_events(
    writer: CompletionWriter, delta: Delta, queue: DeltaQueue, *, chat: ChatRequest
) -> AsyncIterator[str]:
    """Yield the server-sent events of an answer with first delta `delta`, then ``data: [DONE]``.

    Deltas without text are skipped, except the last one. An error is logged and becomes an event
    without details, because the status has been sent long before. The chat is marked as cancelled
    at the end, also if the client disconnects.
    """
    try:
        yield writer.opening_event()
        while delta.finish_reason is None:
            if delta.text:
                yield writer.delta_event(delta)
            delta = await queue.get()
        yield writer.delta_event(delta)
        if writer.has_usage_event:
            yield writer.usage_event(delta)
    except Exception as error:
        logger.exception("an answer ended with an error", exc_info=error)
        text = "the answer ended with an error; see the server's log"
        yield f"data: {error_content(text, error_type='server_error').decode()}\n\n"
    finally:
        chat.cancelled = True
    yield "data: [DONE]\n\n"


def _usage_field(last: Delta) -> dict[str, Any]:
    """Return the field `usage` of an answer whose last delta is `last`."""
    return {"usage": chat_usage(last.prompt_tokens, last.completion_tokens)}
