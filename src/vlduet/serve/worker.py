"""The one thread that owns the model. What waits is embedded in batches, also between the tokens of an answer.

1. ask     requests leave here what they want: items to embed, a conversation, a call such as a search
2. embed   a turn: up to `TURN` items of all requests, in one batch
3. answer  up to `TALKS` conversations in one batch, token by token; after every token come 2 and the calls
4. tell    each request by its future or its callback, in this thread; what fails fails alone

So an embedding waits for a token, not for an answer, and one copy of the weights does both.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from copy import copy
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from vlduet.data.quarantine import attempted
from vlduet.data.records import Message, Part, Parts
from vlduet.data.sequences import Sequence as Rendered
from vlduet.errors import DataError, ModelError
from vlduet.model import generation
from vlduet.model.dual import DualEncoder
from vlduet.model.duet import DuetModel

Result = TypeVar("Result")

TURN = 32
"""Items that are embedded before the next token of whoever is answered."""
TALKS = 8
"""Conversations that are answered side by side."""
WAITING = 4096
"""Items, conversations and calls that may wait; more are turned away."""


class Busy(Exception):
    """Too much waits already, or the worker has been closed."""


@dataclass(frozen=True, slots=True)
class Piece:
    """What is new of an answer; may be empty."""

    text: str
    reason: str | None = None
    """Of the last piece: `stop` (the model ended, or wrote a stop string) or `length`."""
    prompt_tokens: int = 0
    tokens: int = 0
    """Written so far."""


@dataclass(slots=True, eq=False)
class Talk:
    """A conversation to be answered."""

    messages: tuple[Message, ...]
    tell: Callable[[Piece | Exception], None]
    """Called in the worker's thread with every piece; or with what went wrong, and then no more."""
    max_new_tokens: int
    temperature: float = 0.0
    stop: tuple[str, ...] = ()
    cancelled: bool = False
    """Set by whoever no longer listens; nothing is told then."""


@dataclass(slots=True, eq=False)
class _Request:
    """Items of one request, embedded in turns."""

    items: Sequence[Part | Parts]
    query: bool
    future: Future[np.ndarray]
    found: list[np.ndarray | None] = field(default_factory=list)
    left: int = 0

    def told(self, i: int, vector: np.ndarray) -> None:
        self.found[i] = vector
        self.left -= 1
        if not self.left and not self.future.done():
            self.future.set_result(np.stack([each for each in self.found if each is not None]))

    def failed(self, error: Exception) -> None:
        if not self.future.done():
            self.future.set_exception(error)


class Worker:
    """Owns a model from now on: nobody else may use it."""

    def __init__(self, model: DuetModel | DualEncoder):
        self.model = model
        self._items: deque[tuple[_Request, int]] = deque()
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._talks: deque[Talk] = deque()
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
        future: Future[np.ndarray] = Future()
        request = _Request(items, query, future, [None] * len(items), len(items))
        self._put(self._items, [(request, i) for i in range(len(items))])
        return future

    def answer(self, talk: Talk) -> None:
        """Have a conversation answered, piece by piece. Raises Busy."""
        self._put(self._talks, [talk])

    def call(self, function: Callable[[], Result]) -> Future[Result]:
        """Run something short that uses the model, in the model's thread. Raises Busy."""
        future: Future[Result] = Future()
        self._put(self._calls, [(function, future)])
        return future

    @property
    def answers(self) -> bool:
        """Whether the model can generate."""
        return isinstance(self.model, DuetModel)

    def close(self) -> None:
        """Turn away what waits, and end; answers under way end with their next token."""
        with self._something:
            self._closed = True
            self._something.notify()
        self._thread.join()

    def _put(self, queue: deque[Any], work: list[Any]) -> None:
        with self._something:
            waiting = len(self._items) + len(self._calls) + len(self._talks)
            if self._closed or waiting + len(work) > WAITING:
                raise Busy
            queue.extend(work)
            self._something.notify()

    # ------------------------------------------------------------------ the thread

    def _run(self) -> None:
        while self._wait():
            self._between()
            if talks := self._next_talks():
                self._answer(talks)
        for request, _ in self._items:
            request.failed(Busy())
        for _, future in self._calls:
            future.set_exception(Busy())
        for talk in self._talks:
            talk.tell(Busy())

    def _wait(self) -> bool:
        """Until there is something to do; False where there never will be."""
        with self._something:
            self._something.wait_for(lambda: self._closed or self._items or self._calls or self._talks)
            return not self._closed

    def _between(self) -> None:
        """One turn of everything that is short."""
        with self._something:
            calls = [self._calls.popleft() for _ in range(len(self._calls))]
            turn = [self._items.popleft() for _ in range(min(TURN, len(self._items)))]
        for function, future in calls:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function())
                except Exception as error:  # noqa: BLE001 - it is the asker's, and the thread must live on
                    future.set_exception(error)
        for query in (False, True):
            if mine := [(request, i) for request, i in turn if request.query is query and not request.future.done()]:
                self._embed(mine, query=query)

    def _embed(self, turn: list[tuple[_Request, int]], *, query: bool) -> None:
        encode = self.model.encode_query if query else self.model.encode_document

        def vectors(some: list[tuple[_Request, int]]) -> np.ndarray:
            found = encode([request.items[i] for request, i in some])
            if not np.isfinite(found).all():
                raise ModelError("the model gave a vector that is not finite", fix="Its weights are broken")
            return found

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

    def _next_talks(self) -> list[Talk]:
        """Those that wait longest, as far as they sample alike."""
        with self._something:
            self._talks = deque(talk for talk in self._talks if not talk.cancelled)
            talks = [talk for talk in self._talks if talk.temperature == self._talks[0].temperature][:TALKS]
            self._talks = deque(talk for talk in self._talks if talk not in talks)
        return talks

    def _answer(self, talks: list[Talk]) -> None:
        model = self.model
        assert isinstance(model, DuetModel)
        rows, sequences = [], []
        for talk in talks:
            try:
                sequence = conversation(model, talk)
            except Exception as error:  # noqa: BLE001 - it is this asker's
                talk.tell(error)
                continue
            rows.append(_Row(talk, model, len(sequence)))
            sequences.append(sequence)
        if not rows:
            return

        def watch(new: Tensor) -> Tensor:
            over = [row.over(ids) or self._closed for row, ids in zip(rows, new.tolist(), strict=True)]
            self._between()
            return torch.tensor(over, device=new.device)

        try:
            most = max(talk.max_new_tokens for talk in talks)
            start = model.start(sequences, most, temperature=talks[0].temperature)
            generation.watched(model.backbone, start, watch)
            unfinished: Exception = Busy()
        except Exception as error:  # noqa: BLE001 - such as memory that is not there: the next ones may fit
            unfinished = error
        for row in rows:
            row.end(unfinished)


def conversation(model: DuetModel, talk: Talk) -> Rendered:
    """The prompt that a model continues. Nothing of it is cut.

    Raises:
        DataError: it and the longest answer do not fit into the model's window, or a broken image.
    """
    renderer = copy(model.renderer)
    renderer.max_tokens = 1 << 40
    sequence = renderer.chat(talk.messages, answer=True)
    window = model.backbone.window
    if window is not None and len(sequence) + talk.max_new_tokens > window:
        what = f"{len(sequence)} tokens and an answer of up to {talk.max_new_tokens}: the model's window is {window}"
        raise DataError(what, place="messages", fix="Send less, or a smaller max_tokens")
    return sequence


class _Row:
    """One answer under way."""

    def __init__(self, talk: Talk, model: DuetModel, prompt_tokens: int):
        self.talk, self.prompt_tokens = talk, prompt_tokens
        self.tokenizer, self.eos_ids = model.backbone.tokenizer, model.renderer.eos_ids
        self.shown = 0
        self.ended = False

    def over(self, ids: list[int]) -> bool:
        """Tell what is new; whether that was the end."""
        self.ended = self.ended or self.talk.cancelled
        if self.ended:
            return True
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        stops = [at for at in map(text.find, self.talk.stop) if at >= 0]
        if stops or ids[-1] in self.eos_ids:
            reason, until = "stop", min(stops, default=len(text))
        elif len(ids) >= self.talk.max_new_tokens:
            reason, until = "length", len(text)
        else:
            reason, until = None, max(self.shown, len(text) - max(held(text, self.talk.stop), default=0))
        self.talk.tell(Piece(text[self.shown : until], reason, self.prompt_tokens, len(ids)))
        self.shown, self.ended = until, reason is not None
        return self.ended

    def end(self, unfinished: Exception) -> None:
        """Tell why, where the answer was broken off."""
        if not self.ended:
            self.talk.tell(unfinished)


def held(text: str, stop: Sequence[str]) -> Iterator[int]:
    """Numbers of letters at the end that are not told yet: half a character, a blank that some tokenizers take back before a
    comma, or what may become a stop string."""
    yield len(text) - len(text.rstrip(" \N{REPLACEMENT CHARACTER}"))
    for each in stop:
        yield from (n for n in range(1, min(len(each), len(text) + 1)) if text.endswith(each[:n]))
