"""Conversations: those that wait, those whose prompts are made, and those that are answered. All of one thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass, field

from vlduet.data.batches import FORWARD_MAX_TOKENS, group_by_length
from vlduet.data.records import Message, extract_images
from vlduet.data.sequences import Sequence
from vlduet.errors import DataError
from vlduet.model.duet import DuetModel
from vlduet.model.generation.continuous import (
    ContinuousBatcher,
    Delta,
    Request,
    SamplingParams,
    StepOutputs,
)
from vlduet.model.generation.inputs import PrefillInputs

MAX_CONCURRENT_CHATS = 8
"""Conversations that are answered side by side."""


@dataclass(slots=True, eq=False)
class ChatRequest:
    """A conversation to be answered."""

    messages: tuple[Message, ...]
    on_output: Callable[[Delta | Exception], None]
    """Called with every piece; or with what went wrong, and then no more."""
    max_new_tokens: int
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop: tuple[str, ...] = ()
    cancelled: bool = False
    """Set by whoever no longer listens; nothing is told then."""

    def deliver(self, piece: Delta | Exception) -> None:
        """Tell it. Who cannot be told listens no longer."""
        try:
            if not self.cancelled:
                self.on_output(piece)
        except Exception:  # noqa: BLE001 - such as a loop that has ended
            self.cancelled = True


class ChatScheduler:
    """Answers conversations, all of them a token at a time.

    Args:
        waiting: taken from the left; other threads may append.
    """

    def __init__(self, model: DuetModel, waiting: deque[ChatRequest]):
        self.model, self.waiting_requests = model, waiting
        self._prefilling: deque[tuple[ChatRequest, Iterator[Sequence | None]]] = deque()
        """Whose prompts are being made."""
        self._running: dict[Request, ChatRequest] = {}
        self._batcher: ContinuousBatcher | None = None
        """Of the answers of these talks."""

    @property
    def has_work(self) -> bool:
        """Whether there is something to `advance`."""
        return bool(self.waiting_requests or self._prefilling or self._running)

    def step(self) -> None:
        """Write a token of every answer; then prepare an image for those that wait, and let those join that are ready."""
        try:
            self._generate_tokens()
            self._admit_waiting_requests()
        except Exception as error:  # noqa: BLE001 - such as memory that is not there: the next ones may fit
            talks, self._running, self._batcher = (
                self._running,
                {},
                None,
            )  # first of all what they held is let go
            for talk in talks.values():
                talk.deliver(error)

    def fail_all(self, error: Exception) -> None:
        """Tell everybody that it is over."""
        for talk in (
            *self._running.values(),
            *(talk for talk, _ in self._prefilling),
            *self.waiting_requests,
        ):
            talk.deliver(error)

    def _generate_tokens(self) -> None:
        for row, talk in self._running.items():
            row.is_finished = talk.cancelled
        if self._batcher is not None:
            self._deliver_outputs(self._batcher.step())

    def _deliver_outputs(self, told: StepOutputs) -> None:
        for row, piece in told:
            self._running[row].deliver(piece)
        self._running = {row: talk for row, talk in self._running.items() if not row.is_finished}
        if not self._running:
            self._batcher = None

    def _admit_waiting_requests(self) -> None:
        ready = list(self._prepare_prompts())
        for chosen in group_by_length([len(sequence) for _, sequence in ready], FORWARD_MAX_TOKENS):
            talks = [ready[i][0] for i in chosen]
            try:
                self._start_decoding(
                    talks, self.model.prefill_inputs([ready[i][1] for i in chosen])
                )
            except Exception as error:  # noqa: BLE001 - those under way have the memory that these lack
                for talk in talks:
                    talk.deliver(error)

    def _start_decoding(self, talks: list[ChatRequest], start: PrefillInputs) -> None:
        decoder = self._batcher or ContinuousBatcher(self.model.backbone, start.eos_token_ids)
        rows = [
            Request(talk.max_new_tokens, sampling_params=talk.sampling, stop_strings=talk.stop)
            for talk in talks
        ]
        told = decoder.add_requests(start, rows)
        self._batcher = decoder
        self._running |= zip(rows, talks, strict=True)
        self._deliver_outputs(told)

    def _prepare_prompts(self) -> Iterator[tuple[ChatRequest, Sequence]]:
        """Conversations whose prompts are made. One image is prepared, of all guests in rotation, which takes their turn."""
        while (
            len(self._running) + len(self._prefilling) < MAX_CONCURRENT_CHATS
            and self.waiting_requests
        ):
            talk = self.waiting_requests.popleft()
            self._prefilling.append((talk, prepare_prompt(self.model, talk)))
        self._prefilling = deque(
            (talk, prompt) for talk, prompt in self._prefilling if not talk.cancelled
        )
        while self._prefilling:
            talk, prompt = self._prefilling.popleft()
            try:
                sequence = next(prompt)
            except Exception as error:  # noqa: BLE001 - it is this asker's
                talk.deliver(error)
                continue
            if sequence is None:
                self._prefilling.append((talk, prompt))
                return
            yield talk, sequence


def prepare_prompt(model: DuetModel, talk: ChatRequest) -> Iterator[Sequence | None]:
    """The prompt that a model continues, of which nothing is cut. Before it comes None for every image, whose decoding may
    take a second.

    Raises:
        DataError: it and the longest answer do not fit into the model's window, or a broken image.
    """
    renderer = copy(model.renderer)
    renderer.max_tokens = 1 << 40
    prepared = {}
    for ref in extract_images(part for message in talk.messages for part in message.parts):
        prepared[ref] = model.prepare_image(ref)
        yield None
    renderer.prepare_image = prepared.__getitem__
    sequence = renderer.render_chat(talk.messages, add_generation_prompt=True)
    window = model.backbone.context_length
    if window is not None and len(sequence) + talk.max_new_tokens > window:
        what = f"{len(sequence)} tokens and an answer of up to {talk.max_new_tokens}: the model's window is {window}"
        raise DataError(what, place="messages", fix="Send less, or a smaller max_tokens")
    yield sequence
