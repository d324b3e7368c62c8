"""Scheduler of chats: waiting ones, ones whose prompt is being prepared, and running ones.

waiting -> preparing (decoded and tokenised, in other threads) -> prefilling (images pass the
vision tower, one per step) -> running

An answer with images of the index pauses between two tokens (`interleaved_chats`):

running -> paused (searched, in other threads) -> reading (an image that is fed back passes the
vision tower like those of prompts) -> running
"""

from __future__ import annotations

import threading
from collections import deque

from vlduet.data.batches import FORWARD_MAX_TOKENS, group_by_length
from vlduet.data.records import extract_images
from vlduet.data.sequences import PreparedImage, Sequence
from vlduet.errors import DataError
from vlduet.model.conversation import UNLIMITED_TOKENS
from vlduet.model.duet import DuetModel
from vlduet.model.embedding import find_visible_chars
from vlduet.model.generation.continuous import ContinuousBatcher, Delta, Request, StepOutputs
from vlduet.model.generation.slices import SliceEnd
from vlduet.serve.chats import AnswerImage, ChatRequest
from vlduet.serve.interleaved_chats import ImageSearches, PausedChat

MAX_CONCURRENT_CHATS = 8
"""Number of chats that are prepared or answered at the same time."""


class ChatScheduler:
    """Answers chats concurrently: every step generates one token for each running chat.

    The threads that prepare prompts call `take_waiting`, `prepare` and `add_prepared`, the model's
    thread the other methods. Both hold the worker's lock, except for `prepare` and `step`.

    Args:
        model: model that generates.
        waiting_requests: queue that is consumed from the left; other threads may append to it.
        render_lock: lock to hold while the model's renderer is used.
    """

    def __init__(
        self, model: DuetModel, waiting_requests: deque[ChatRequest], render_lock: threading.Lock
    ):
        self.model, self.waiting_requests = model, waiting_requests
        self._render_lock = render_lock
        # Requests whose prompts other threads are preparing.
        self._preparing: set[ChatRequest] = set()
        # Prompts that are prepared, or the error of their preparation.
        self._prepared: deque[tuple[ChatRequest, Sequence | Exception]] = deque()
        # Requests with their prompts, and those of their images that must pass the vision tower.
        self._prefilling: deque[tuple[ChatRequest, Sequence, list[PreparedImage]]] = deque()
        # Running requests by their entry in the batcher, which is None while there are none. Those
        # that pause are among them.
        self._running: dict[Request, ChatRequest] = {}
        self.searches = ImageSearches(model, render_lock)
        self._paused: set[Request] = set()
        # Chats that read what follows a pause once their images have passed the vision tower.
        self._reading: deque[PausedChat] = deque()
        self.num_generated_tokens = 0
        self.num_retrieved_images = 0
        self._batcher: ContinuousBatcher | None = None

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to do."""
        has_search = self.searches.has_finished or self._reading
        has_running = len(self._running) > len(self._paused)
        return bool(self._prepared or self._prefilling or has_search or has_running)

    @property
    def num_running(self) -> int:
        """Number of chats that are answered or whose prompt is being prepared."""
        num_prepared = len(self._preparing) + len(self._prepared) + len(self._prefilling)
        return len(self._running) + num_prepared

    def has_waiting(self, *, texts_only: bool = False) -> bool:
        """Return whether `take_waiting` has a chat to take, which may have been cancelled."""
        return self._find_waiting(texts_only) is not None

    def take_waiting(self, *, texts_only: bool = False) -> ChatRequest | None:
        """Return the next chat to prepare while fewer than MAX_CONCURRENT_CHATS are in work.

        With `texts_only`, chats with images are passed over.
        """
        while (request := self._find_waiting(texts_only)) is not None:
            self.waiting_requests.remove(request)
            if not request.cancelled:
                self._preparing.add(request)
                return request
        return None

    def drop_cancelled(self) -> None:
        """Forget the waiting chats that were cancelled, with their images."""
        if any(request.cancelled for request in self.waiting_requests):
            kept = [request for request in self.waiting_requests if not request.cancelled]
            self.waiting_requests.clear()
            self.waiting_requests.extend(kept)

    def _find_waiting(self, texts_only: bool) -> ChatRequest | None:
        """Return the chat that waits longest, with `texts_only` of those without images."""
        if self.num_running >= MAX_CONCURRENT_CHATS:
            return None
        suitable = (r for r in self.waiting_requests if not (texts_only and r.has_images))
        return next(suitable, None)

    def prepare(self, request: ChatRequest) -> Sequence | Exception | None:
        """Return the prompt of a chat, or the error of its preparation; None if it is cancelled."""
        try:
            return prepare_chat_sequence(self.model, request, render_lock=self._render_lock)
        except Exception as error:  # noqa: BLE001 - it concerns this request only
            return error

    def add_prepared(self, request: ChatRequest, outcome: Sequence | Exception | None) -> None:
        """Give the result of `prepare` to `step`."""
        if outcome is not None:
            self._prepared.append((request, outcome))
        self._preparing.discard(request)

    def step(self) -> None:
        """Generate one token for each running chat, then encode one image of the other chats.

        Outputs go to the chats' `on_output`. Chats whose prompts are complete start to run. Raises
        nothing: an error of one chat is delivered to it, and one of the generation, such as a lack
        of memory, to all running chats, which end.
        """
        try:
            self._generate_tokens()
            self._collect_searches()
            self._admit_prepared_requests()
            self._read_after_pause()
        except Exception as error:  # noqa: BLE001 - delivered to the chats that it ends
            requests = list(self._running.values())
            # Releases their memory before anything else.
            self._running, self._batcher = {}, None
            self._forget_finished()
            for request in requests:
                request.deliver(error)

    def fail_all(self, error: Exception) -> None:
        """Deliver `error` to every running and waiting chat; the scheduler is not usable after."""
        prepared = [request for request, _ in self._prepared]
        prepared += [request for request, _, _ in self._prefilling]
        waiting = [*self._preparing, *prepared, *self.waiting_requests]
        for request in (*self._running.values(), *waiting):
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
        """Deliver the outputs of a step, queue searches, and forget the chats that are finished.

        The batcher is released when no chat runs any more.
        """
        for entry, output in outputs:
            if isinstance(output, SliceEnd):
                self._pause(entry, output)
            else:
                self.num_generated_tokens += 1
                self._running[entry].deliver(output)
        self._forget_finished()

    def _forget_finished(self) -> None:
        """Forget the chats that are finished, and release the batcher when no chat runs."""
        self._running = {e: request for e, request in self._running.items() if not e.is_finished}
        self._paused &= self._running.keys()
        self._reading = deque(paused for paused in self._reading if paused.entry in self._running)
        if not self._running:
            self._batcher = None

    # ------------------------------------------------------------------ pauses

    def _pause(self, entry: Request, slice_end: SliceEnd) -> None:
        """Queue the search of an answer that pauses; an error ends its chat."""
        request, batcher = self._running[entry], self._batcher
        assert request.interleaving is not None and batcher is not None
        try:
            vector = request.interleaving.answer.embed(slice_end)
        except Exception as error:  # noqa: BLE001 - it concerns this request only
            self._end(entry, error)
            return
        num_cached = batcher.count_cached_tokens(entry)
        self._paused.add(entry)
        self.searches.add(
            PausedChat(request, request.interleaving, entry, slice_end, vector, num_cached)
        )

    def _end(self, entry: Request, output: Delta | Exception) -> None:
        """Deliver the last output of a running chat; it leaves the batch with the next step."""
        self._running[entry].deliver(output)
        entry.is_finished = True

    def _collect_searches(self) -> None:
        """Deliver the images that other threads have found, and let their chats go on.

        A chat that reads nothing joins the batch again. Errors are delivered to their chats.
        """
        for paused in self.searches.take_finished():
            entry = paused.entry
            if entry not in self._running:  # it has ended with an error of the batch
                continue
            self._paused.remove(entry)
            if paused.error is not None:
                self._end(entry, paused.error)
            elif paused.step is None:
                entry.is_finished = True  # it was cancelled
            else:
                if paused.outputs and (text := entry.take_unsent_text()):
                    paused.request.deliver(Delta(text))
                for output in paused.outputs:
                    self.num_retrieved_images += isinstance(output, AnswerImage)
                    paused.request.deliver(output)
                self._go_on(paused)
        self._forget_finished()

    def _go_on(self, paused: PausedChat) -> None:
        """End a chat whose template is complete, resume it, or queue what it reads next."""
        entry, step, batcher = paused.entry, paused.step, self._batcher
        assert step is not None and batcher is not None
        if step.is_complete:
            last = Delta("", "stop", entry.prompt_tokens, len(entry.token_ids))
            self._end(entry, last)
        elif step.sequence is not None:
            self._reading.append(paused)
        else:
            try:
                outputs = batcher.resume(entry)
            except Exception as error:  # noqa: BLE001 - such as memory that running chats use
                self._end(entry, error)
            else:
                self._deliver_outputs(outputs)

    def _read_after_pause(self) -> None:
        """Let one chat read what follows its pause, such as an image, if that is encoded.

        An error is delivered to the chat, which ends.
        """
        paused = next((p for p in self._reading if not p.images), None)
        if paused is None:
            return
        self._reading.remove(paused)
        entry, step, batcher = paused.entry, paused.step, self._batcher
        assert step is not None and step.sequence is not None and batcher is not None
        entry.prompt_tokens += len(step.sequence)
        try:
            inputs = self.model.prefill_inputs([step.sequence], num_past=paused.num_cached)
            outputs = batcher.extend(entry, inputs)
        except Exception as error:  # noqa: BLE001 - such as memory that running chats use
            self._end(entry, error)
            self._forget_finished()
        else:
            self._deliver_outputs(outputs)

    # ------------------------------------------------------------------ new chats

    def _admit_prepared_requests(self) -> None:
        """Start the chats whose prompts are complete, prompts of similar length in one forward.

        Encodes one image at most of the others. An error is delivered to the chats of that forward
        only, which end.
        """
        self._collect_prepared()
        self._encode_image()
        # They stay in the queue until they run: while uncounted, they would let others in.
        complete = [(request, prompt) for request, prompt, images in self._prefilling if not images]
        lengths = [len(sequence) for _, sequence in complete]
        for group in group_by_length(lengths, FORWARD_MAX_TOKENS):
            requests = [complete[i][0] for i in group]
            try:
                self._start_decoding(requests, [complete[i][1] for i in group])
            except Exception as error:  # noqa: BLE001 - such as memory that running chats use
                for request in requests:
                    request.deliver(error)
        self._prefilling = deque(entry for entry in self._prefilling if entry[2])
        self._prefilling.rotate(-1)  # another chat is the first one in the next step

    def _start_decoding(self, requests: list[ChatRequest], sequences: list[Sequence]) -> None:
        """Read the prompts, add the requests to the running ones, and deliver their first tokens.

        A batcher is created if no chat runs. Raises the error of the forward pass; the chats that
        run already are then unaffected.
        """
        prefill_inputs = self.model.prefill_inputs(sequences)
        batcher = self._batcher
        if batcher is None:
            batcher = ContinuousBatcher(self.model.backbone, prefill_inputs.eos_token_ids)
        entries = [make_entry(request) for request in requests]
        outputs = batcher.add_requests(prefill_inputs, entries)
        self._batcher = batcher
        self._running |= zip(entries, requests, strict=True)
        for request in requests:
            if request.interleaving and (text := request.interleaving.answer.opening_text):
                request.deliver(Delta(text))
        self._deliver_outputs(outputs)

    def _collect_prepared(self) -> None:
        """Queue the prompts that other threads have prepared, and drop the cancelled chats.

        An error of the preparation is delivered to its chat.
        """
        while self._prepared:
            request, outcome = self._prepared[0]
            if isinstance(outcome, Exception):
                request.deliver(outcome)
            else:
                images = [image for _, image in outcome.images]
                self._prefilling.append((request, outcome, images))
            self._prepared.popleft()
        self._prefilling = deque(entry for entry in self._prefilling if not entry[0].cancelled)

    def _encode_image(self) -> None:
        """Pass the next image of the first chat that has one through the vision tower.

        Chats that read an image after a pause come first: their clients see them stand still.
        Running chats thus wait for one image at most. An error is delivered to the chat, which is
        dropped.
        """
        for paused in self._reading:
            if paused.images:
                try:
                    self.model.vision_features([paused.images.pop(0)])  # into the cache
                except Exception as error:  # noqa: BLE001 - it concerns this request only
                    self._end(paused.entry, error)
                    self._reading.remove(paused)
                    self._forget_finished()
                return
        for entry in self._prefilling:
            request, _, images = entry
            if images:
                try:
                    self.model.vision_features([images.pop(0)])  # into the cache
                except Exception as error:  # noqa: BLE001 - it concerns this request only
                    request.deliver(error)
                    self._prefilling.remove(entry)
                return


def make_entry(request: ChatRequest) -> Request:
    """Return the entry of a chat in the batch."""
    if request.interleaving is not None:
        return request.interleaving.answer.request
    return Request(
        request.max_new_tokens,
        sampling_params=request.sampling_params,
        stop_strings=request.stop_strings,
    )


def prepare_chat_sequence(
    model: DuetModel, request: ChatRequest, *, render_lock: threading.Lock
) -> Sequence | None:
    """Return the prompt of a chat, which ends where the answer begins; None if it is cancelled.

    The images are decoded and the texts tokenised, without truncation. `render_lock` is held while
    the model's renderer is used.

    Raises:
        DataError: the prompt and the longest answer exceed the context length, or a broken image.
    """
    prepared_images = {}
    parts = [part for message in request.messages for part in message.parts]
    for image in extract_images(parts):
        if request.cancelled:
            return None
        prepared_images[image] = model.prepare_image(image)
    context_length = model.backbone.context_length or UNLIMITED_TOKENS
    renderer = model.renderer.with_options(
        max_tokens=UNLIMITED_TOKENS, prepare_image=prepared_images.__getitem__
    )
    answer = request.interleaving.answer if request.interleaving is not None else None
    with render_lock:
        text = "".join(part for part in parts if isinstance(part, str))
        text += answer.template if answer is not None else ""
        max_token_chars = renderer.layouts.tokenizer.max_token_chars
        is_certain = find_visible_chars(text, context_length * max_token_chars) < len(text)
        if is_certain:  # and tokens take time
            raise _too_long_error(f"more than {context_length}", request, context_length)
        if answer is None:
            sequence = renderer.render_chat(request.messages, add_generation_prompt=True)
        else:
            sequence = answer.render_prompt(renderer)
            request.max_new_tokens = answer.request.max_new_tokens
    if len(sequence) + request.max_new_tokens > context_length:
        raise _too_long_error(str(len(sequence)), request, context_length)
    return sequence


def _too_long_error(num_tokens: str, request: ChatRequest, context_length: int) -> DataError:
    """Return the error of a chat whose prompt has so many tokens."""
    lengths = f"{num_tokens} tokens and an answer of up to {request.max_new_tokens}"
    message = f"{lengths}: the model's window is {context_length}"
    return DataError(message, place="messages", fix="Send less, or a smaller max_tokens")
