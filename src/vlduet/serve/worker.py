"""The one thread that owns the model. What waits is embedded in batches, also between the tokens of an answer.

1. ask     requests leave here what they want: items to embed, a conversation, a call such as a search
2. embed   a turn: one call, and in one batch up to `TURN` texts, or the eighth of it in images, of all requests in rotation
3. answer  up to `TALKS` conversations in one batch, token by token; after every image and every token comes 2
4. tell    each request by its future or its callback, in this thread; what fails fails alone

So an embedding waits for a token, not for an answer, and one copy of the weights does both.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from vlduet.data.quarantine import attempted
from vlduet.data.records import Message, Part, Parts, as_parts, images_of
from vlduet.data.sequences import Sequence as Rendered
from vlduet.errors import DataError, ModelError
from vlduet.model import generation
from vlduet.model.dual import DualEncoder
from vlduet.model.duet import DuetModel

Result = TypeVar("Result")

TURN = 32
"""Texts that are embedded before the next token of whoever is answered."""
IMAGE = 8
"""Texts that an image costs: it must be decoded, and goes through the tower."""
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
        request = _Request(items, query)
        if not items:
            request.future.set_result(np.empty((0, self.model.dim), np.float32))
            return request.future
        self._put(self._requests, request, count=len(items))
        return request.future

    def answer(self, talk: Talk) -> None:
        """Have a conversation answered, piece by piece. Raises Busy."""
        self._put(self._talks, talk)

    def call(self, function: Callable[[], Result]) -> Future[Result]:
        """Run something short that uses the model, in the model's thread. Raises Busy."""
        future: Future[Result] = Future()
        self._put(self._calls, (function, future))
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

    def _put(self, queue: deque[Any], work: Any, *, count: int = 1) -> None:
        with self._something:
            items = sum(len(request.items) - request.taken for request in self._requests)
            if self._closed or items + len(self._calls) + len(self._talks) + count > WAITING:
                raise Busy
            queue.append(work)
            self._something.notify()

    # ------------------------------------------------------------------ the thread

    def _run(self) -> None:
        while self._wait():
            self._between()
            if talks := self._next_talks():
                self._answer(talks)
        for request in self._requests:
            request.failed(Busy())
        for _, future in self._calls:
            if future.set_running_or_notify_cancel():
                future.set_exception(Busy())
        for talk in self._talks:
            told(talk, Busy())

    def _wait(self) -> bool:
        """Until there is something to do; False where there never will be."""
        with self._something:
            self._something.wait_for(lambda: self._closed or self._requests or self._calls or self._talks)
            return not self._closed

    def _between(self) -> None:
        """One turn of everything that is short."""
        with self._something:
            calls = [self._calls.popleft()] if self._calls else []
            turn = self._next_items()
        for function, future in calls:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function())
                except Exception as error:  # noqa: BLE001 - it is the asker's, and the thread must live on
                    future.set_exception(error)
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
                sequence = conversation(model, talk, between=self._between)
            except Exception as error:  # noqa: BLE001 - it is this asker's
                told(talk, error)
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
            most = max(row.talk.max_new_tokens for row in rows)
            start = model.start(sequences, most, temperature=talks[0].temperature)
            generation.watched(model.backbone, start, watch)
            unfinished: Exception = Busy()
        except Exception as error:  # noqa: BLE001 - such as memory that is not there: the next ones may fit
            unfinished = error
        for row in rows:
            row.end(unfinished)


def conversation(model: DuetModel, talk: Talk, *, between: Callable[[], None]) -> Rendered:
    """The prompt that a model continues. Nothing of it is cut.

    Args:
        between: called after every image, whose decoding may take a second.

    Raises:
        DataError: it and the longest answer do not fit into the model's window, or a broken image.
    """
    renderer = copy(model.renderer)
    renderer.max_tokens = 1 << 40
    prepared = {}
    for ref in images_of(part for message in talk.messages for part in message.parts):
        prepared[ref] = model.prepare(ref)
        between()
    renderer.prepare = prepared.__getitem__
    sequence = renderer.chat(talk.messages, answer=True)
    window = model.backbone.window
    if window is not None and len(sequence) + talk.max_new_tokens > window:
        what = f"{len(sequence)} tokens and an answer of up to {talk.max_new_tokens}: the model's window is {window}"
        raise DataError(what, place="messages", fix="Send less, or a smaller max_tokens")
    return sequence


def told(talk: Talk, piece: Piece | Exception) -> None:
    """Tell a talk. One that cannot be told is over, and the thread lives on."""
    try:
        talk.tell(piece)
    except Exception:  # noqa: BLE001 - such as a loop that has ended
        talk.cancelled = True


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
        told(self.talk, Piece(text[self.shown : until], reason, self.prompt_tokens, len(ids)))
        self.shown, self.ended = until, reason is not None
        return self.ended

    def end(self, unfinished: Exception) -> None:
        """Tell why, where the answer was broken off."""
        if not self.ended:
            told(self.talk, unfinished)


def held(text: str, stop: Sequence[str]) -> Iterator[int]:
    """Numbers of letters at the end that are not told yet: half a character, a blank that some tokenizers take back before a
    comma, and what may become a stop string, with or without these."""
    settled = text.rstrip(" \N{REPLACEMENT CHARACTER}")
    loose = len(text) - len(settled)
    yield loose
    for each in stop:
        yield from (n for n in range(1, min(len(each), len(text) + 1)) if text.endswith(each[:n]))
        yield from (loose + n for n in range(1, min(len(each), len(settled) + 1)) if settled.endswith(each[:n]))
