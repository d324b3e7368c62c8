"""The one thread that owns the model. Who comes while others are answered joins them; nobody waits for an answer to end.

Requests leave here what they want: items to embed, a conversation, a call such as a search. The thread goes round:

1. call     one call
2. embed    in one batch up to `TURN` texts, or the eighth of it in images, of all requests in rotation
3. answer   an image of the conversation that comes next, then a token of every answer under way

Each request is told by its future or its callback, in this thread, and what fails fails alone. So an embedding waits for a
token, not for an answer, and one copy of the weights does both.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from vlduet.data.quarantine import bisect_failures
from vlduet.data.records import Part, Parts, as_parts, extract_images
from vlduet.encoders.dual import DualEncoder
from vlduet.errors import DataError, ModelError
from vlduet.model.duet import DuetModel
from vlduet.serve.scheduler import ChatRequest, ChatScheduler

Result = TypeVar("Result")

TEXTS_PER_EMBEDDING_TURN = 32
"""Texts that are embedded before the next token of whoever is answered."""
IMAGE_COST_IN_TEXTS = 8
"""Texts that an image costs: it must be decoded, and goes through the tower."""
MAX_WAITING = 4096
"""Items, conversations and calls that may wait; more are turned away."""


class ServerBusyError(Exception):
    """Too much waits already, or the worker has been closed."""


@dataclass(slots=True, eq=False)
class _EmbeddingJob:
    """Items of one request, embedded in turns."""

    items: Sequence[Part | Parts]
    is_query: bool
    future: Future[np.ndarray] = field(default_factory=Future)
    vectors: dict[int, np.ndarray] = field(default_factory=dict)
    num_started: int = 0
    """Items that have had their turn."""

    def add_vector(self, i: int, vector: np.ndarray) -> None:
        if not np.isfinite(vector).all():
            what = f"the model gave a vector that is not finite for input[{i}]"
            self.fail(ModelError(what, fix="Its weights or its precision are broken"))
            return
        self.vectors[i] = vector
        if len(self.vectors) == len(self.items):
            whole = np.stack([self.vectors[n] for n in range(len(self.items))])
            with suppress(InvalidStateError):  # whoever asked is gone, or has been told of an error
                self.future.set_result(whole)

    def fail(self, error: Exception) -> None:
        with suppress(InvalidStateError):
            self.future.set_exception(error)


class Worker:
    """Owns a model from now on: nobody else may use it."""

    def __init__(self, model: DuetModel | DualEncoder):
        self.model = model
        self._embedding_jobs: deque[_EmbeddingJob] = deque()
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._waiting_chats: deque[ChatRequest] = deque()
        self._scheduler = (
            ChatScheduler(model, self._waiting_chats) if isinstance(model, DuetModel) else None
        )
        self._work_available = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------ for other threads

    def submit_embedding(
        self, items: Sequence[Part | Parts], *, is_query: bool
    ) -> Future[np.ndarray]:
        """float32[N, D] unit vectors, in the order of the items.

        Raises:
            Busy: too much waits. The future: DataError for an item that cannot be embedded, with its number.
        """
        request = _EmbeddingJob(items, is_query)
        if not items:
            request.future.set_result(np.empty((0, self.model.dim), np.float32))
            return request.future
        self._enqueue(self._embedding_jobs, request, count=len(items))
        return request.future

    def submit_chat(self, talk: ChatRequest) -> None:
        """Have a conversation answered, piece by piece; it is told in the worker's thread. Raises Busy."""
        assert self.can_generate
        self._enqueue(self._waiting_chats, talk)

    def submit_call(self, function: Callable[[], Result]) -> Future[Result]:
        """Run something short that uses the model, in the model's thread. Raises Busy."""
        future: Future[Result] = Future()
        self._enqueue(self._calls, (function, future))
        return future

    @property
    def can_generate(self) -> bool:
        """Whether the model can generate."""
        return self._scheduler is not None

    def close(self) -> None:
        """Turn away what waits, and end; answers under way end with their next token."""
        with self._work_available:
            self._closed = True
            self._work_available.notify()
        self._thread.join()

    def _enqueue(self, queue: deque[Any], work: Any, *, count: int = 1) -> None:
        with self._work_available:
            items = sum(
                len(request.items) - request.num_started for request in self._embedding_jobs
            )
            if (
                self._closed
                or items + len(self._calls) + len(self._waiting_chats) + count > MAX_WAITING
            ):
                raise ServerBusyError
            queue.append(work)
            self._work_available.notify()

    # ------------------------------------------------------------------ the thread

    def _run(self) -> None:
        while self._wait_for_work():
            self._run_next_call()
            self._run_embedding_turn()
            if self._scheduler is not None:
                self._scheduler.step()
        for request in self._embedding_jobs:
            request.fail(ServerBusyError())
        for _, future in self._calls:
            if future.set_running_or_notify_cancel():
                future.set_exception(ServerBusyError())
        if self._scheduler is not None:
            self._scheduler.fail_all(ServerBusyError())

    def _wait_for_work(self) -> bool:
        """Until there is something to do; False where there never will be."""
        with self._work_available:
            self._work_available.wait_for(lambda: self._closed or self._has_work())
            return not self._closed

    def _has_work(self) -> bool:
        return bool(
            self._embedding_jobs
            or self._calls
            or (self._scheduler is not None and self._scheduler.has_work)
        )

    def _run_next_call(self) -> None:
        with self._work_available:
            if not self._calls:
                return
            function, future = self._calls.popleft()
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(function())
            except Exception as error:  # noqa: BLE001 - it is the asker's, and the thread must live on
                future.set_exception(error)

    def _run_embedding_turn(self) -> None:
        with self._work_available:
            turn = self._select_items()
        for query in (False, True):
            if mine := [(request, i) for request, i in turn if request.is_query is query]:
                self._embed_items(mine, query=query)

    def _select_items(self) -> list[tuple[_EmbeddingJob, int]]:
        """A turn's worth, one of every request in rotation: a long list does not keep a short one waiting."""
        turn: list[tuple[_EmbeddingJob, int]] = []
        cost = 0
        while self._embedding_jobs and cost < TEXTS_PER_EMBEDDING_TURN:
            request = self._embedding_jobs.popleft()
            if request.future.done():  # of an error, or nobody waits for it any more
                continue
            turn.append((request, request.num_started))
            cost += max(
                1,
                IMAGE_COST_IN_TEXTS
                * len(extract_images(as_parts(request.items[request.num_started]))),
            )
            request.num_started += 1
            if request.num_started < len(request.items):
                self._embedding_jobs.append(request)
        return turn

    def _embed_items(self, turn: list[tuple[_EmbeddingJob, int]], *, query: bool) -> None:
        encode = self.model.encode_query if query else self.model.encode_document

        def vectors(some: list[tuple[_EmbeddingJob, int]]) -> np.ndarray:
            return encode([request.items[i] for request, i in some])

        def broken(one: tuple[_EmbeddingJob, int], error: DataError) -> None:
            place = f"input[{one[1]}]"
            one[0].fail(type(error)(error.message, place=place, fix=error.fix))

        try:
            found = bisect_failures(vectors, turn, on_error=broken)
        except Exception as error:  # noqa: BLE001 - such as memory that is not there: the next turn may fit
            for request, _ in turn:
                request.fail(error)
            return
        for (request, i), vector in zip(turn, found, strict=True):
            if vector is not None:
                request.add_vector(i, vector)
