"""Conversations: those that wait, those whose prompts are made, and those that are answered. All of one thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass, field

from vlduet.data.batches import FORWARD, by_length
from vlduet.data.records import Message, images_of
from vlduet.data.sequences import Sequence
from vlduet.errors import DataError
from vlduet.model.decoding import Continuation, Decoder, Piece, Sampling, Told
from vlduet.model.duet import DuetModel
from vlduet.model.generation import Start

TALKS = 8
"""Conversations that are answered side by side."""


@dataclass(slots=True, eq=False)
class Talk:
    """A conversation to be answered."""

    messages: tuple[Message, ...]
    tell: Callable[[Piece | Exception], None]
    """Called with every piece; or with what went wrong, and then no more."""
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    cancelled: bool = False
    """Set by whoever no longer listens; nothing is told then."""

    def told(self, piece: Piece | Exception) -> None:
        """Tell it. Who cannot be told listens no longer."""
        try:
            if not self.cancelled:
                self.tell(piece)
        except Exception:  # noqa: BLE001 - such as a loop that has ended
            self.cancelled = True


class Talks:
    """Answers conversations, all of them a token at a time.

    Args:
        waiting: taken from the left; other threads may append.
    """

    def __init__(self, model: DuetModel, waiting: deque[Talk]):
        self.model, self.waiting = model, waiting
        self._guests: deque[tuple[Talk, Iterator[Sequence | None]]] = deque()
        """Whose prompts are being made."""
        self._talks: dict[Continuation, Talk] = {}
        self._decoder: Decoder | None = None
        """Of the answers of these talks."""

    @property
    def busy(self) -> bool:
        """Whether there is something to `advance`."""
        return bool(self.waiting or self._guests or self._talks)

    def advance(self) -> None:
        """Write a token of every answer; then prepare an image for those that wait, and let those join that are ready."""
        try:
            self._write()
            self._welcome()
        except Exception as error:  # noqa: BLE001 - such as memory that is not there: the next ones may fit
            talks, self._talks, self._decoder = self._talks, {}, None  # first of all what they held is let go
            for talk in talks.values():
                talk.told(error)

    def close(self, error: Exception) -> None:
        """Tell everybody that it is over."""
        for talk in (*self._talks.values(), *(talk for talk, _ in self._guests), *self.waiting):
            talk.told(error)

    def _write(self) -> None:
        for row, talk in self._talks.items():
            row.over = talk.cancelled
        if self._decoder is not None:
            self._tell(self._decoder.step())

    def _tell(self, told: Told) -> None:
        for row, piece in told:
            self._talks[row].told(piece)
        self._talks = {row: talk for row, talk in self._talks.items() if not row.over}
        if not self._talks:
            self._decoder = None

    def _welcome(self) -> None:
        ready = list(self._ready())
        for chosen in by_length([len(sequence) for _, sequence in ready], FORWARD):
            talks = [ready[i][0] for i in chosen]
            try:
                self._join(talks, self.model.start([ready[i][1] for i in chosen]))
            except Exception as error:  # noqa: BLE001 - those under way have the memory that these lack
                for talk in talks:
                    talk.told(error)

    def _join(self, talks: list[Talk], start: Start) -> None:
        decoder = self._decoder or Decoder(self.model.backbone, start.eos_ids)
        rows = [Continuation(talk.max_new_tokens, sampling=talk.sampling, stop=talk.stop) for talk in talks]
        told = decoder.join(start, rows)
        self._decoder = decoder
        self._talks |= zip(rows, talks, strict=True)
        self._tell(told)

    def _ready(self) -> Iterator[tuple[Talk, Sequence]]:
        """Conversations whose prompts are made. One image is prepared, of all guests in rotation, which takes their turn."""
        while len(self._talks) + len(self._guests) < TALKS and self.waiting:
            talk = self.waiting.popleft()
            self._guests.append((talk, conversation(self.model, talk)))
        self._guests = deque((talk, prompt) for talk, prompt in self._guests if not talk.cancelled)
        while self._guests:
            talk, prompt = self._guests.popleft()
            try:
                sequence = next(prompt)
            except Exception as error:  # noqa: BLE001 - it is this asker's
                talk.told(error)
                continue
            if sequence is None:
                self._guests.append((talk, prompt))
                return
            yield talk, sequence


def conversation(model: DuetModel, talk: Talk) -> Iterator[Sequence | None]:
    """The prompt that a model continues, of which nothing is cut. Before it comes None for every image, whose decoding may
    take a second.

    Raises:
        DataError: it and the longest answer do not fit into the model's window, or a broken image.
    """
    renderer = copy(model.renderer)
    renderer.max_tokens = 1 << 40
    prepared = {}
    for ref in images_of(part for message in talk.messages for part in message.parts):
        prepared[ref] = model.prepare(ref)
        yield None
    renderer.prepare = prepared.__getitem__
    sequence = renderer.chat(talk.messages, answer=True)
    window = model.backbone.window
    if window is not None and len(sequence) + talk.max_new_tokens > window:
        what = f"{len(sequence)} tokens and an answer of up to {talk.max_new_tokens}: the model's window is {window}"
        raise DataError(what, place="messages", fix="Send less, or a smaller max_tokens")
    yield sequence
