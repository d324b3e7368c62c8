"""Conversations: those that wait, the one that is being prepared, and the answers under way. All of one thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, field

from vlduet.data.records import Message, images_of
from vlduet.data.sequences import Sequence
from vlduet.errors import DataError
from vlduet.model.decoding import Continuation, Decoder, Piece, Sampling
from vlduet.model.duet import DuetModel

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
        self._guest: tuple[Talk, Iterator[Sequence | None]] | None = None
        self._talks: dict[Continuation, Talk] = {}
        self._decoder: Decoder
        """Of the answers of these talks; a new one where there are none."""

    @property
    def busy(self) -> bool:
        """Whether there is something to `advance`."""
        return bool(self.waiting or self._guest or self._talks)

    def advance(self) -> None:
        """Prepare an image of the conversation that waits longest, or have it join; and write a token of every answer."""
        try:
            self._welcome()
            self._write()
        except Exception as error:  # noqa: BLE001 - such as memory that is not there: the next ones may fit
            for talk in self._talks.values():
                talk.told(error)
            self._talks = {}

    def close(self, error: Exception) -> None:
        """Tell everybody that it is over."""
        for talk in (*self._talks.values(), *([self._guest[0]] if self._guest else ()), *self.waiting):
            talk.told(error)

    def _welcome(self) -> None:
        ready: list[tuple[Talk, Sequence]] = []
        while len(self._talks) + len(ready) < TALKS and (guest := self._next_guest()):
            talk, prompt = guest
            try:
                sequence = next(prompt)
            except Exception as error:  # noqa: BLE001 - it is this asker's
                talk.told(error)
                self._guest = None
                continue
            if sequence is None:
                break
            ready.append((talk, sequence))
            self._guest = None
        if not ready:
            return
        if not self._talks:
            self._decoder = Decoder(self.model.backbone, self.model.renderer.eos_ids)
        answers = [Continuation(talk.max_new_tokens, sampling=talk.sampling, stop=talk.stop) for talk, _ in ready]
        try:
            self._decoder.join(self.model.start([sequence for _, sequence in ready]), answers)
        except Exception as error:  # noqa: BLE001 - those under way have the memory that these ones lack
            for talk, _ in ready:
                talk.told(error)
            return
        self._talks |= {answer: talk for answer, (talk, _) in zip(answers, ready, strict=True)}

    def _next_guest(self) -> tuple[Talk, Iterator[Sequence | None]] | None:
        """Whose prompt is being made, or the next one's, if somebody still listens."""
        if self._guest and self._guest[0].cancelled:
            self._guest = None
        with suppress(IndexError):
            while self._guest is None:
                talk = self.waiting.popleft()
                if not talk.cancelled:
                    self._guest = talk, conversation(self.model, talk)
        return self._guest

    def _write(self) -> None:
        for answer, talk in self._talks.items():
            answer.over = talk.cancelled
        if self._talks:
            for answer, piece in self._decoder.step():
                self._talks[answer].told(piece)
            self._talks = {answer: self._talks[answer] for answer in self._decoder.rows}


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
