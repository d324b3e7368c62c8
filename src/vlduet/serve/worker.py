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

from vlduet.data.quarantine import attempted
from vlduet.data.records import Part, Parts, as_parts, images_of
from vlduet.errors import DataError, ModelError
from vlduet.model.dual import DualEncoder
from vlduet.model.duet import DuetModel
from vlduet.serve.talks import Talk, Talks

Result = TypeVar("Result")

TURN = 32
"""Texts that are embedded before the next token of whoever is answered."""
IMAGE = 8
"""Texts that an image costs: it must be decoded, and goes through the tower."""
WAITING = 4096
"""Items, conversations and calls that may wait; more are turned away."""


class Busy(Exception):
    """Too much waits already, or the worker has been closed."""


@dataclass(slots=True, eq=False)
class _Request:
    """Items of one request, embedded in turns."""

    items: Sequence[Part | Parts]
    query: bool
    future: Future[np.ndarray] = field(default_factory=Future)
    found: dict[int, np.ndarray] = field(default_factory=dict)
    taken: int = 0
    """Items that have had their turn."""

    def told(self, i: int, vector: np.ndarray) -> None:
        if not np.isfinite(vector).all():
            what = f"the model gave a vector that is not finite for input[{i}]"
            self.failed(ModelError(what, fix="Its weights or its precision are broken"))
            return
        self.found[i] = vector
        if len(self.found) == len(self.items):
            whole = np.stack([self.found[n] for n in range(len(self.items))])
            with suppress(InvalidStateError):  # whoever asked is gone, or has been told of an error
                self.future.set_result(whole)

    def failed(self, error: Exception) -> None:
        with suppress(InvalidStateError):
            self.future.set_exception(error)


class Worker:
    """Owns a model from now on: nobody else may use it."""

    def __init__(self, model: DuetModel | DualEncoder):
        self.model = model
        self._requests: deque[_Request] = deque()
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._waiting: deque[Talk] = deque()
        self._talks = Talks(model, self._waiting) if isinstance(model, DuetModel) else None
        self._something = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------ for other threads

    def embed(self, items: Sequence[Part | Parts], *, query: bool) -> Future[np.ndarray]:
        """float32[N, D] unit vectors, in the order of the items.

        Raises:
            Busy: too much waits. The future: DataError for an item that cannot be embedded, with its number.
        """
        request = _Request(items, query)
        if not items:
            request.future.set_result(np.empty((0, self.model.dim), np.float32))
            return request.future
        self._put(self._requests, request, count=len(items))
        return request.future

    def answer(self, talk: Talk) -> None:
        """Have a conversation answered, piece by piece; it is told in the worker's thread. Raises Busy."""
        assert self.answers
        self._put(self._waiting, talk)

    def call(self, function: Callable[[], Result]) -> Future[Result]:
        """Run something short that uses the model, in the model's thread. Raises Busy."""
        future: Future[Result] = Future()
        self._put(self._calls, (function, future))
        return future

    @property
    def answers(self) -> bool:
        """Whether the model can generate."""
        return self._talks is not None

    def close(self) -> None:
        """Turn away what waits, and end; answers under way end with their next token."""
        with self._something:
            self._closed = True
            self._something.notify()
        self._thread.join()

    def _put(self, queue: deque[Any], work: Any, *, count: int = 1) -> None:
        with self._something:
            items = sum(len(request.items) - request.taken for request in self._requests)
            if self._closed or items + len(self._calls) + len(self._waiting) + count > WAITING:
                raise Busy
            queue.append(work)
            self._something.notify()

    # ------------------------------------------------------------------ the thread

    def _run(self) -> None:
        while self._wait():
            self._call()
            self._embed_turn()
            if self._talks is not None:
                self._talks.advance()
        for request in self._requests:
            request.failed(Busy())
        for _, future in self._calls:
            if future.set_running_or_notify_cancel():
                future.set_exception(Busy())
        if self._talks is not None:
            self._talks.close(Busy())

    def _wait(self) -> bool:
        """Until there is something to do; False where there never will be."""
        with self._something:
            self._something.wait_for(lambda: self._closed or self._busy())
            return not self._closed

    def _busy(self) -> bool:
        return bool(self._requests or self._calls or (self._talks is not None and self._talks.busy))

    def _call(self) -> None:
        with self._something:
            if not self._calls:
                return
            function, future = self._calls.popleft()
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(function())
            except Exception as error:  # noqa: BLE001 - it is the asker's, and the thread must live on
                future.set_exception(error)

    def _embed_turn(self) -> None:
        with self._something:
            turn = self._next_items()
        for query in (False, True):
            if mine := [(request, i) for request, i in turn if request.query is query]:
                self._embed(mine, query=query)

    def _next_items(self) -> list[tuple[_Request, int]]:
        """A turn's worth, one of every request in rotation: a long list does not keep a short one waiting."""
        turn: list[tuple[_Request, int]] = []
        cost = 0
        while self._requests and cost < TURN:
            request = self._requests.popleft()
            if request.future.done():  # of an error, or nobody waits for it any more
                continue
            turn.append((request, request.taken))
            cost += max(1, IMAGE * len(images_of(as_parts(request.items[request.taken]))))
            request.taken += 1
            if request.taken < len(request.items):
                self._requests.append(request)
        return turn

    def _embed(self, turn: list[tuple[_Request, int]], *, query: bool) -> None:
        encode = self.model.encode_query if query else self.model.encode_document

        def vectors(some: list[tuple[_Request, int]]) -> np.ndarray:
            return encode([request.items[i] for request, i in some])

        def broken(one: tuple[_Request, int], error: DataError) -> None:
            place = f"input[{one[1]}]"
            one[0].failed(type(error)(error.message, place=place, fix=error.fix))

        try:
            found = attempted(vectors, turn, on_error=broken)
        except Exception as error:  # noqa: BLE001 - such as memory that is not there: the next turn may fit
            for request, _ in turn:
                request.failed(error)
            return
        for (request, i), vector in zip(turn, found, strict=True):
            if vector is not None:
                request.told(i, vector)
