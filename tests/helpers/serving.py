"""A running server with a client, chats with recorded outputs, and a worker that is held."""

from __future__ import annotations

import http.client
import json
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from vlduet.data.records import Message, Part
from vlduet.model.generation.continuous import Delta
from vlduet.serve.app import Service
from vlduet.serve.chats import ChatOutput, ChatRequest
from vlduet.serve.server import AccessRules, build_server
from vlduet.serve.streaming import is_last
from vlduet.serve.worker import Worker


def user_message(*parts: Part) -> tuple[Message, ...]:
    """Return a conversation of one user message."""
    return (Message("user", parts),)


def becomes_true(condition: Callable[[], object]) -> bool:
    """Return whether `condition()` is true within half a minute."""
    deadline = time.monotonic() + 30
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return bool(condition())


class OutputRecorder:
    """Queue of everything that is delivered to one chat."""

    def __init__(self) -> None:
        self.outputs: queue.Queue[ChatOutput | Exception] = queue.Queue()

    def read_all(self) -> list[ChatOutput | Exception]:
        """Wait for the end of the chat and return its outputs; an error is the last one."""
        outputs = []
        is_finished = False
        while not is_finished:
            output = self.outputs.get(timeout=60)
            outputs.append(output)
            is_finished = isinstance(output, Exception) or is_last(output)
        return outputs

    def read_deltas(self) -> list[Delta]:
        """Wait for the end of the chat and return its deltas; raise its error."""
        deltas = []
        for output in self.read_all():
            if isinstance(output, Exception):
                raise output
            if isinstance(output, Delta):
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


class RunningServer:
    """A server in a thread, and a client for it; closes the worker at the end."""

    def __init__(self, service: Service, api_keys: list[str] | None = None):
        self.service = service
        listening_socket = socket.create_server(("127.0.0.1", 0))
        self.port = listening_socket.getsockname()[1]
        rules = AccessRules(allowed_hosts=["127.0.0.1"], api_keys=api_keys)
        self.uvicorn = build_server(service.build_app(), rules=rules)
        self.thread = threading.Thread(
            target=self.uvicorn.run, kwargs={"sockets": [listening_socket]}, daemon=True
        )
        self.thread.start()

    def __enter__(self) -> RunningServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.uvicorn.should_exit = True
        self.thread.join(30)
        self.service.worker.close()

    def send(
        self, path: str, body: object = None, *, headers: dict[str, str] | None = None
    ) -> http.client.HTTPResponse:
        """Send a GET request, or a POST request with a body, and return the response."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        all_headers = {"Content-Type": "application/json"} | (headers or {})
        connection.request("GET" if body is None else "POST", path, data, all_headers)
        return connection.getresponse()

    def request(
        self, path: str, body: object = None, *, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, Any]]:
        """Send a request and return the status and the JSON body of the response."""
        response = self.send(path, body, headers=headers)
        return response.status, json.loads(response.read())
