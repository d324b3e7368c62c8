"""Worker: the one thread that owns the model. New requests join those that are being served.

Other threads submit work: items to embed, a chat, or a call. The model's thread loops over

1. call     one call
2. embed    items of up to `TOKENS_PER_TURN` padded tokens, taken from all requests in rotation, or
            one part of a longer item; fewer on a slow machine, more if no chat waits
3. chat     one image of a chat that is being prepared, then one token of every running chat

Three further threads prepare what these turns read: they decode images, render and tokenise, and
they search the index for answers that pause for an image.
Results go to the request's future or callback. A request that fails does not affect the others. An
embedding thus waits for one token and not for a whole answer, a token waits for a bounded number of
tokens and not for a list of long texts, and one copy of the weights does both.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import numpy as np

from vlduet.data.batches import FORWARD_MAX_TOKENS
from vlduet.data.quarantine import bisect_failures
from vlduet.encoders.dual import DualEncoder
from vlduet.errors import DataError
from vlduet.model.duet import DuetModel
from vlduet.model.embedding import Embeddable
from vlduet.serve.chats import ChatRequest
from vlduet.serve.embedding_jobs import EmbeddingJob, EmbeddingQueue, EmbeddingResult, TurnItem
from vlduet.serve.preparation import ContentEncoder, DuetEncoder, TowerEncoder
from vlduet.serve.scheduler import ChatScheduler
from vlduet.serve.statistics import WorkerStatistics

Result = TypeVar("Result")

TOKENS_PER_TURN = 512
"""Most padded tokens that are embedded between two tokens of the running chats. A longer item is
read in parts."""
MIN_TOKENS_PER_TURN = 64
TURN_SECONDS = 0.5
"""Time that such a turn should take: it has fewer tokens, down to MIN_TOKENS_PER_TURN, where the
model has been slower."""
SPEED_SMOOTHING = 0.3
"""Weight of the last pass in the average of the seconds that a token takes."""
IMAGES_PER_TURN = 4
"""Most images that pass the vision tower in such a turn."""
FREE_TURN_FACTOR = 2
"""How many times as much a turn may embed on a CPU while no chat is served; as the first chat
waits for it, it is not more than what keeps the processor busy."""
NUM_PREPARATION_THREADS = 3
"""Number of threads that decode images and tokenise. The first one takes texts only: an image of 64
megapixels with 16 bits takes seconds, for which the texts of other requests do not wait."""
MAX_WAITING = 4096
"""Number of items, chats and calls that may wait; further requests are refused."""


class ServerBusyError(Exception):
    """Too many requests are waiting, or the worker has been closed."""


class Worker:
    """Owner of a model, which no other thread may use from now on; starts its threads.

    A `DualEncoder` embeds and cannot chat.
    """

    def __init__(self, model: DuetModel | DualEncoder):
        """Start the daemon threads, which alone use `model` until `close`."""
        self.model = model
        self._embeddings = EmbeddingQueue()
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._waiting_chats: deque[ChatRequest] = deque()
        self._scheduler: ChatScheduler | None = None
        self._encoder: ContentEncoder
        if isinstance(model, DuetModel):
            encoder = DuetEncoder(model)
            self._scheduler = ChatScheduler(model, self._waiting_chats, encoder.render_lock)
            self._encoder = encoder
        else:
            self._encoder = TowerEncoder(model)
        self._long_item: tuple[TurnItem, Iterator[np.ndarray | None]] | None = None
        self._long_item_waits = False
        self._seconds_per_token = 0.0  # average over the last passes; 0 before the first one
        self._num_embedded = 0
        self._num_refused = 0
        # One lock for all queues: of requests, of what is prepared, and of what is running.
        self._changed = threading.Condition()
        self._closed = False
        self._threads = [threading.Thread(target=self._run, name="model", daemon=True)]
        self._threads += [
            threading.Thread(
                target=self._run_preparation, args=(i == 0,), name=f"preparation {i}", daemon=True
            )
            for i in range(NUM_PREPARATION_THREADS)
        ]
        for thread in self._threads:
            thread.start()

    # ------------------------------------------------------------------ for other threads

    def submit_embedding(
        self, items: Sequence[Embeddable], *, is_query: bool, truncate: bool = False
    ) -> Future[EmbeddingResult]:
        """Return a future of the embeddings of queries or documents.

        Without items it is finished, with float32[0, D]. With `truncate`, texts that are longer
        than the model's limit are cut. Raises ServerBusyError if too many requests wait or the
        worker is closed. The future raises DataError with the position of an item that cannot be
        embedded, ModelError for a vector that is not finite, any other error of the model, or
        ServerBusyError if the worker is closed before the end.
        """
        job = EmbeddingJob(items, is_query, truncate)
        if not items:
            empty = np.empty((0, self.model.dim), np.float32)
            job.future.set_result(EmbeddingResult(empty, 0, 0))
            return job.future
        self._enqueue(self._embeddings.jobs, job, count=len(items))
        return job.future

    def submit_chat(self, request: ChatRequest) -> None:
        """Queue a chat, which outputs to its `on_output`; ServerBusyError if too many wait."""
        assert self.can_generate
        self._enqueue(self._waiting_chats, request)

    def submit_call(self, function: Callable[[], Result]) -> Future[Result]:
        """Return a future of `function()`, which runs in the model's thread and must be short.

        Raises ServerBusyError if too many requests are waiting.
        """
        future: Future[Result] = Future()
        self._enqueue(self._calls, (function, future))
        return future

    @property
    def can_generate(self) -> bool:
        """Whether the model can generate text."""
        return self._scheduler is not None

    @property
    def max_tokens(self) -> int:
        """Number of tokens of the longest content that the model embeds uncut."""
        model = self.model
        if isinstance(model, DuetModel):
            return model.renderer.max_tokens
        return model.max_text_tokens

    def read_statistics(self) -> WorkerStatistics:
        """Return the present state and the totals."""
        scheduler = self._scheduler
        with self._changed:
            return WorkerStatistics(
                running_chats=scheduler.num_running if scheduler else 0,
                waiting_chats=len(self._waiting_chats),
                waiting_embedding_items=self._embeddings.num_unfinished,
                generated_tokens=scheduler.num_generated_tokens if scheduler else 0,
                retrieved_images=scheduler.num_retrieved_images if scheduler else 0,
                embedded_items=self._num_embedded,
                refused_requests=self._num_refused,
            )

    def close(self) -> None:
        """Fail all waiting and running requests with ServerBusyError; wait until the threads end.

        The current turn (a call, a batch, a token) and the content that is being prepared are
        finished first. Later requests are refused.
        """
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _enqueue(self, queue: deque[Any], work: Any, *, count: int = 1) -> None:
        """Append `work`, which counts as `count` waiting items, to `queue` and wake the threads.

        Raises ServerBusyError if more than `MAX_WAITING` would wait, or the worker is closed.
        """
        with self._changed:
            num_items = self._embeddings.num_unfinished
            num_waiting = num_items + len(self._calls) + len(self._waiting_chats)
            if self._closed or num_waiting + count > MAX_WAITING:
                self._num_refused += 1
                raise ServerBusyError
            queue.append(work)
            self._changed.notify_all()

    # ------------------------------------------------------------------ in the preparation threads

    def _run_preparation(self, texts_only: bool) -> None:
        """Search for paused chats, prepare new ones, and else embeddings, until the worker closes.

        With `texts_only`, those with images are left to the other threads.
        """
        while self._prepare_next(texts_only):
            pass

    def _prepare_next(self, texts_only: bool) -> bool:
        """Wait for a search, a chat or an item and do it; return False if the worker is closed."""
        scheduler, embeddings = self._scheduler, self._embeddings
        with self._changed:
            embeddings.drop_finished()
            self._changed.wait_for(lambda: self._closed or self._has_unprepared(texts_only))
            if self._closed:
                return False
            request = item = paused = None
            if scheduler is not None:
                paused = scheduler.searches.take_waiting(texts_only=texts_only)
            if scheduler is not None and paused is None:
                request = scheduler.take_waiting(texts_only=texts_only)
            if paused is None and request is None:
                item = embeddings.take_unprepared(texts_only=texts_only)
        if paused is not None and scheduler is not None:
            scheduler.searches.search(paused, texts_only=texts_only)
        if request is not None and scheduler is not None:
            outcome = scheduler.prepare(request)
            with self._changed:
                scheduler.add_prepared(request, outcome)
        if item is not None:
            self._prepare_item(*item)
        with self._changed:
            self._changed.notify_all()
        return True

    def _has_unprepared(self, texts_only: bool) -> bool:
        """Return whether a chat or an item can be prepared now, with `texts_only` without image."""
        scheduler = self._scheduler
        has_chat = scheduler is not None and (
            scheduler.searches.has_waiting(texts_only=texts_only)
            or scheduler.has_waiting(texts_only=texts_only)
        )
        return has_chat or self._embeddings.has_unprepared(texts_only=texts_only)

    def _prepare_item(self, job: EmbeddingJob, position: int) -> None:
        """Prepare an item of a job for a turn; its error fails the job."""
        try:
            content = self._encoder.prepare(
                job.items[position], is_query=job.is_query, truncate=job.truncate
            )
        except Exception as error:  # noqa: BLE001 - delivered to the job
            job.fail(error, position)
            with self._changed:
                self._embeddings.release(job)
            return
        with self._changed:
            self._embeddings.add_prepared(job, position, content)

    # ------------------------------------------------------------------ in the model's thread

    def _run(self) -> None:
        """Serve until the worker is closed, then fail everything that is left with ServerBusyError.

        This is the body of the model's thread.
        """
        while self._wait_for_work():
            self._run_next_call()
            self._run_embedding_turn()
            if self._scheduler is not None:
                self._scheduler.step()
                with self._changed:  # a chat that has ended makes room for another one
                    self._scheduler.drop_cancelled()
                    self._changed.notify_all()
        with self._changed:
            self._embeddings.fail_all(ServerBusyError())
            for _, future in self._calls:
                if future.set_running_or_notify_cancel():
                    future.set_exception(ServerBusyError())
            if self._scheduler is not None:
                self._scheduler.fail_all(ServerBusyError())

    def _wait_for_work(self) -> bool:
        """Block until there is work; return False once the worker is closed."""
        with self._changed:
            self._embeddings.drop_finished()
            self._changed.wait_for(lambda: self._closed or self._has_work())
            return not self._closed

    def _has_work(self) -> bool:
        has_chats = self._scheduler is not None and self._scheduler.has_work
        has_items = self._long_item is not None or self._embeddings.has_prepared()
        return bool(has_items or self._calls or has_chats)

    def _run_next_call(self) -> None:
        """Take the oldest call, if there is one, run it, and set its future to the result or error.

        A call that was cancelled is taken but not run. Exceptions of the call are not raised here.
        """
        with self._changed:
            if not self._calls:
                return
            function, future = self._calls.popleft()
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(function())
            except Exception as error:  # noqa: BLE001 - the caller's error must not end the thread
                future.set_exception(error)

    def _run_embedding_turn(self) -> None:
        """Embed the items of one turn, if there are any, or a part of a long item.

        A long item and the others have every second turn. Results and errors go to the jobs'
        futures.
        """
        tokens, images = self._turn_limits()
        if self._long_item is not None and self._long_item_waits:
            self._continue_long_item()
            return
        with self._changed:
            passes = self._embeddings.take_turn(
                tokens, images, skips_longer=self._long_item is not None
            )
        self._long_item_waits = True
        if not passes and self._long_item is not None:
            self._continue_long_item()
        for items in passes:
            if items[0].content.num_tokens > tokens:
                content = items[0].content
                chunks = self._encoder.embed_in_chunks(content, min(tokens, TOKENS_PER_TURN))
                self._long_item = items[0], chunks
                self._continue_long_item()
            else:
                self._embed_items(items)

    def _turn_limits(self) -> tuple[int, int]:
        """Return the most padded tokens and images of a turn now."""
        if self._scheduler is not None and self._scheduler.num_running:
            return self._limit_by_time(TOKENS_PER_TURN), IMAGES_PER_TURN
        is_cpu = not isinstance(self.model, DuetModel) or self.model.backbone.device.type == "cpu"
        factor = FREE_TURN_FACTOR if is_cpu else FORWARD_MAX_TOKENS // TOKENS_PER_TURN
        return TOKENS_PER_TURN * factor, IMAGES_PER_TURN * factor

    def _limit_by_time(self, tokens: int) -> int:
        """Return the number of tokens, at most `tokens`, that TURN_SECONDS are enough for."""
        if self._seconds_per_token * tokens <= TURN_SECONDS:
            return tokens
        return min(tokens, max(MIN_TOKENS_PER_TURN, int(TURN_SECONDS / self._seconds_per_token)))

    def _note_speed(self, num_tokens: int, seconds: float) -> None:
        """Take a pass over so many tokens into the average time of a token."""
        weight = SPEED_SMOOTHING if self._seconds_per_token else 1.0
        self._seconds_per_token += weight * (seconds / max(1, num_tokens) - self._seconds_per_token)

    def _continue_long_item(self) -> None:
        """Read the next part of the long item, and give its job the vector after the last one."""
        assert self._long_item is not None
        self._long_item_waits = False
        item, chunks = self._long_item
        vectors = None
        if not item.job.future.done():
            try:
                vectors = next(chunks)
            except Exception as error:  # noqa: BLE001 - delivered to the job
                item.job.fail(error, item.position)
        if vectors is not None or item.job.future.done():
            self._long_item = None  # with its keys and values
            self._deliver([item], [None if vectors is None else vectors[0]])

    def _embed_items(self, items: list[TurnItem]) -> None:
        """Embed items of several jobs in one pass and give each job its vectors.

        An item that cannot be embedded fails its own job with a DataError that names its position;
        any other error, such as a lack of memory, fails all jobs of the pass. Raises nothing.
        """

        def embed(entries: list[TurnItem]) -> np.ndarray:
            return self._encoder.embed([item.content for item in entries])

        def on_error(item: TurnItem, error: DataError) -> None:
            item.job.fail(error, item.position)

        vectors: list[np.ndarray | None] = [None] * len(items)
        start = time.monotonic()
        try:
            vectors = bisect_failures(embed, items, on_error=on_error)
        except Exception as error:  # noqa: BLE001 - delivered to the jobs that it fails
            for item in items:
                item.job.fail(error)
        self._note_speed(sum(item.content.num_tokens for item in items), time.monotonic() - start)
        self._deliver(items, vectors)

    def _deliver(self, items: list[TurnItem], vectors: Sequence[np.ndarray | None]) -> None:
        """Give the jobs of items their vectors, float32[D] or None for a failure."""
        with self._changed:
            for item in items:
                self._embeddings.release(item.job)
            self._num_embedded += sum(vector is not None for vector in vectors)
            self._changed.notify_all()
        for item, vector in zip(items, vectors, strict=True):
            if vector is not None:
                item.job.add_vector(item.position, item.content, vector)
