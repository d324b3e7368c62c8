"""Chats with recorded outputs, and a worker that is held until all requests of a test wait."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from vlduet.data.records import Message, Part
from vlduet.model.generation.continuous import Delta
from vlduet.serve.scheduler import ChatRequest
from vlduet.serve.worker import Worker


def user_message(*parts: Part) -> tuple[Message, ...]:
    """Return a conversation of one user message."""
    return (Message("user", parts),)


class OutputRecorder:
    """Queue of everything that is delivered to one chat."""

    def __init__(self) -> None:
        self.outputs: queue.Queue[Delta | Exception] = queue.Queue()

    def read_all(self) -> list[Delta | Exception]:
        """Wait for the end of the chat and return its outputs; an error is the last one."""
        outputs = []
        is_finished = False
        while not is_finished:
            output = self.outputs.get(timeout=60)
            outputs.append(output)
            is_finished = not isinstance(output, Delta) or output.finish_reason is not None
        return outputs

    def read_deltas(self) -> list[Delta]:
        """Wait for the end of the chat and return its deltas; raise its error."""
        deltas = []
        for output in self.read_all():
            if isinstance(output, Exception):
                raise output
            deltas.append(output)
        return deltas

    def read_text(self) -> str:
        """Wait for the end of the chat and return its text."""
        return "".join(delta.text for delta in self.read_deltas())


def submit_chat(
    worker: Worker, messages: tuple[Message, ...], max_new_tokens: int = 12, **options: object
) -> OutputRecorder:
    """Submit a chat and return the recorder of its outputs."""
    recorder = OutputRecorder()
    request = ChatRequest(
        messages,
        recorder.outputs.put,
        max_new_tokens,
        **options,  # type: ignore[arg-type]
    )
    worker.submit_chat(request)
    return recorder


@contextmanager
def hold_worker(worker: Worker) -> Iterator[None]:
    """Keep the worker busy during the context, so that all requests made in it wait together."""
    release = threading.Event()
    call = worker.submit_call(release.wait)
    try:
        yield
    finally:
        release.set()
    assert call.result(60)
