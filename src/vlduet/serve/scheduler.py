"""Scheduler of chats: waiting ones, ones whose prompt is being prepared, and running ones.

All methods run in one thread, the worker's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
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

MAX_CONCURRENT_CHATS = 8
"""Number of chats that are prepared or answered at the same time."""
UNLIMITED_TOKENS = 1 << 40


@dataclass(slots=True, eq=False)
class ChatRequest:
    """A conversation to answer."""

    messages: tuple[Message, ...]
    on_output: Callable[[Delta | Exception], None]
    """Function called in the worker's thread with every delta, or with an error, the last call."""
    max_new_tokens: int
    sampling_params: SamplingParams = field(default_factory=SamplingParams)
    stop_strings: tuple[str, ...] = ()
    cancelled: bool = False
    """Set by any thread when nobody waits for the answer; `on_output` is not called afterwards."""

    def deliver(self, output: Delta | Exception) -> None:
        """Call `on_output` unless the request is cancelled.

        An exception of the call is swallowed and sets `cancelled`.
        """
        try:
            if not self.cancelled:
                self.on_output(output)
        except Exception:  # noqa: BLE001 - such as an event loop that has been closed
            self.cancelled = True


class ChatScheduler:
    """Answers chats concurrently: every step generates one token for each running chat.

    Args:
        model: model that generates.
        waiting_requests: queue that is consumed from the left; other threads may append to it.
    """

    def __init__(self, model: DuetModel, waiting_requests: deque[ChatRequest]):
        self.model, self.waiting_requests = model, waiting_requests
        # Requests whose prompts are being prepared, with the iterator that does it.
        self._prefilling: deque[tuple[ChatRequest, Iterator[Sequence | None]]] = deque()
        # Running requests by their entry in the batcher, which is None while there are none.
        self._running: dict[Request, ChatRequest] = {}
        self.num_generated_tokens = 0
        self._batcher: ContinuousBatcher | None = None

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to do."""
        return bool(self.waiting_requests or self._prefilling or self._running)

    @property
    def num_running(self) -> int:
        """Number of chats that are answered or whose prompt is being prepared."""
        return len(self._running) + len(self._prefilling)

    def step(self) -> None:
        """Generate one token for each running chat, then prepare one image of the waiting chats.

        Outputs go to the chats' `on_output`. Chats whose prompts are complete start to run. Raises
        nothing: an error of one chat is delivered to it, and one of the generation, such as a lack
        of memory, to all running chats, which end.
        """
        try:
            self._generate_tokens()
            self._admit_waiting_requests()
        except Exception as error:  # noqa: BLE001 - delivered to the chats that it ends
            requests = list(self._running.values())
            self._running, self._batcher = {}, None  # releases their memory before anything else
            for request in requests:
                request.deliver(error)

    def fail_all(self, error: Exception) -> None:
        """Deliver `error` to every running and waiting chat; the scheduler is not usable after."""
        preparing = [request for request, _ in self._prefilling]
        for request in (*self._running.values(), *preparing, *self.waiting_requests):
            request.deliver(error)

    def _generate_tokens(self) -> None:
        """Drop cancelled chats; generate and deliver one token for each other running chat.

        Does nothing while no chat runs. Raises the error of the forward pass.
        """
        for entry, request in self._running.items():
            entry.is_finished = request.cancelled
        if self._batcher is not None:
            self._deliver_outputs(self._batcher.step())

    def _deliver_outputs(self, outputs: StepOutputs) -> None:
        """Deliver the outputs of a step, and forget the chats that are finished.

        The batcher is released when no chat runs any more.
        """
        for entry, output in outputs:
            self.num_generated_tokens += 1
            self._running[entry].deliver(output)
        self._running = {e: request for e, request in self._running.items() if not e.is_finished}
        if not self._running:
            self._batcher = None

    def _admit_waiting_requests(self) -> None:
        """Start the chats whose prompts are complete, prompts of similar length in one forward.

        Prepares one image at most for the others. An error is delivered to the chats of that
        forward only, which end.
        """
        prepared = list(self._prepare_prompts())
        lengths = [len(sequence) for _, sequence in prepared]
        for group in group_by_length(lengths, FORWARD_MAX_TOKENS):
            requests = [prepared[i][0] for i in group]
            try:
                self._start_decoding(requests, [prepared[i][1] for i in group])
            except Exception as error:  # noqa: BLE001 - such as memory that running chats use
                for request in requests:
                    request.deliver(error)

    def _start_decoding(self, requests: list[ChatRequest], sequences: list[Sequence]) -> None:
        """Read the prompts, add the requests to the running ones, and deliver their first tokens.

        A batcher is created if no chat runs. Raises the error of the forward pass; the chats that
        run already are then unaffected.
        """
        prefill_inputs = self.model.prefill_inputs(sequences)
        batcher = self._batcher
        if batcher is None:
            batcher = ContinuousBatcher(self.model.backbone, prefill_inputs.eos_token_ids)
        entries = [
            Request(
                r.max_new_tokens, sampling_params=r.sampling_params, stop_strings=r.stop_strings
            )
            for r in requests
        ]
        outputs = batcher.add_requests(prefill_inputs, entries)
        self._batcher = batcher
        self._running |= zip(entries, requests, strict=True)
        self._deliver_outputs(outputs)

    def _prepare_prompts(self) -> Iterator[tuple[ChatRequest, Sequence]]:
        """Yield the chats whose prompts are complete, with their prompts, and forget them here.

        Waiting chats are taken from the queue while fewer than MAX_CONCURRENT_CHATS are in work.
        Then chats take turns until one image was prepared, so that running chats wait for one image
        at most. Cancelled chats are dropped; an error is delivered to its own chat, which is
        dropped too.
        """
        num_chats = len(self._running) + len(self._prefilling)
        while num_chats < MAX_CONCURRENT_CHATS and self.waiting_requests:
            request = self.waiting_requests.popleft()
            self._prefilling.append((request, prepare_chat_sequence(self.model, request)))
            num_chats += 1
        self._prefilling = deque(pair for pair in self._prefilling if not pair[0].cancelled)
        while self._prefilling:
            request, preparation = self._prefilling.popleft()
            try:
                sequence = next(preparation)
            except Exception as error:  # noqa: BLE001 - it concerns this request only
                request.deliver(error)
                continue
            if sequence is None:
                self._prefilling.append((request, preparation))
                return
            yield request, sequence


def prepare_chat_sequence(model: DuetModel, request: ChatRequest) -> Iterator[Sequence | None]:
    """Prepare the prompt of a chat: yield None after each of its images, then the prompt, once.

    The caller can so do other work between two images, whose decoding may take a second each. The
    prompt is not truncated and ends where the answer begins.

    Raises:
        DataError: the prompt and the longest answer exceed the context length, or a broken image.
    """
    prepared_images = {}
    for image in extract_images(part for message in request.messages for part in message.parts):
        prepared_images[image] = model.prepare_image(image)
        yield None
    renderer = model.renderer.with_options(
        max_tokens=UNLIMITED_TOKENS, prepare_image=prepared_images.__getitem__
    )
    sequence = renderer.render_chat(request.messages, add_generation_prompt=True)
    context_length = model.backbone.context_length
    if context_length is not None and len(sequence) + request.max_new_tokens > context_length:
        lengths = f"{len(sequence)} tokens and an answer of up to {request.max_new_tokens}"
        message = f"{lengths}: the model's window is {context_length}"
        raise DataError(message, place="messages", fix="Send less, or a smaller max_tokens")
    yield sequence
