"""Worker: the one thread that owns the model. New requests join those that are being served.

Other threads submit work: items to embed, a chat, or a call such as a search. The thread loops over

1. call     one call
2. embed    one batch of up to `TEXTS_PER_EMBEDDING_TURN` texts, or an eighth of that in images,
            taken from all embedding requests in rotation
3. chat     one image of a chat that is being prepared, then one token of every running chat

Results go to the request's future or callback, in this thread. A request that fails does not affect
the others. An embedding thus waits for one token and not for a whole answer, and one copy of the
weights does both.
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
from vlduet.model.limits import accept_truncation, too_long_error
from vlduet.serve.scheduler import ChatRequest, ChatScheduler
from vlduet.serve.statistics import WorkerStatistics

Result = TypeVar("Result")

TEXTS_PER_EMBEDDING_TURN = 32
"""Number of texts that are embedded before the next token of the running chats."""
IMAGE_COST_IN_TEXTS = 8
"""Number of texts that an image counts as: it is decoded and passes the vision tower."""
MAX_WAITING = 4096
"""Number of items, chats and calls that may wait; further requests are refused."""


class ServerBusyError(Exception):
    """Too many requests are waiting, or the worker has been closed."""


@dataclass(frozen=True, slots=True)
class EmbeddingResult:
    """Embeddings of the items of one request."""

    vectors: np.ndarray
    """float32[N, D], of unit length."""
    num_tokens: int
    """Number of tokens that the model read."""
    num_truncated: int
    """Number of items of which a text was cut."""


@dataclass(slots=True, eq=False)
class _EmbeddingJob:
    """Items of one embedding request, which may be embedded over several turns."""

    items: Sequence[Part | Parts]
    is_query: bool
    truncate: bool
    future: Future[EmbeddingResult] = field(default_factory=Future)
    """Receives the result, or the error of the first item that failed."""
    num_tokens: int = 0
    num_truncated: int = 0
    vectors: dict[int, np.ndarray] = field(default_factory=dict)
    """Finished embeddings, float32[D], by position of the item."""
    num_started: int = 0
    """Number of items that have been taken for embedding."""

    def add_vector(self, position: int, vector: np.ndarray) -> None:
        """Store an item's embedding float32[D]; set the future's result after the last item.

        A vector that is not finite is not stored and fails the job with ModelError. A future that
        was cancelled or has an error already stays as it is.
        """
        if not np.isfinite(vector).all():
            message = f"the model gave a vector that is not finite for input[{position}]"
            self.fail(ModelError(message, fix="Its weights or its precision are broken"))
            return
        self.vectors[position] = vector
        if len(self.vectors) == len(self.items):
            embeddings = np.stack([self.vectors[i] for i in range(len(self.items))])
            result = EmbeddingResult(embeddings, self.num_tokens, self.num_truncated)
            with suppress(InvalidStateError):  # the future was cancelled or has an error
                self.future.set_result(result)

    def fail(self, error: Exception) -> None:
        """Set `error` as the outcome, unless the future has an outcome already."""
        with suppress(InvalidStateError):
            self.future.set_exception(error)


class Worker:
    """Owner of a model, which no other thread may use from now on; starts its thread.

    A `DualEncoder` embeds and cannot chat.
    """

    def __init__(self, model: DuetModel | DualEncoder):
        """Start the daemon thread, which alone uses `model` until `close`."""
        self.model = model
        self._embedding_jobs: deque[_EmbeddingJob] = deque()
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._waiting_chats: deque[ChatRequest] = deque()
        self._scheduler: ChatScheduler | None = None
        if isinstance(model, DuetModel):
            self._scheduler = ChatScheduler(model, self._waiting_chats)
        self._work_available = threading.Condition()
        self._closed = False
        self._num_embedded_items = 0
        self._num_refused_requests = 0
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------ for other threads

    def submit_embedding(
        self, items: Sequence[Part | Parts], *, is_query: bool, truncate: bool = False
    ) -> Future[EmbeddingResult]:
        """Return a future of the embeddings of queries or documents.

        Without items it is finished, with float32[0, D]. With `truncate`, texts that are longer
        than the model's limit are cut. Raises ServerBusyError if too many requests wait or the
        worker is closed. The future raises DataError with the position of an
        item that cannot be embedded, ModelError for a vector that is not finite, any other error of
        the model, or ServerBusyError if the worker is closed before the end.
        """
        job = _EmbeddingJob(items, is_query, truncate)
        if not items:
            empty = np.empty((0, self.model.dim), np.float32)
            job.future.set_result(EmbeddingResult(empty, 0, 0))
            return job.future
        self._enqueue(self._embedding_jobs, job, count=len(items))
        return job.future

    def submit_chat(self, request: ChatRequest) -> None:
        """Queue a chat, which outputs to its `on_output`; ServerBusyError if too many wait."""
        assert self.can_generate
        self._enqueue(self._waiting_chats, request)

    def submit_call(self, function: Callable[[], Result]) -> Future[Result]:
        """Return a future of `function()`, which runs in the worker's thread and must be short.

        Raises ServerBusyError if too many requests are waiting.
        """
        future: Future[Result] = Future()
        self._enqueue(self._calls, (function, future))
        return future

    def read_statistics(self) -> WorkerStatistics:
        """Return the counts of this worker, as they are now."""
        scheduler = self._scheduler
        with self._work_available:
            return WorkerStatistics(
                running_chats=scheduler.num_running if scheduler is not None else 0,
                waiting_chats=len(self._waiting_chats),
                waiting_embedding_items=self._num_waiting_items,
                generated_tokens=scheduler.num_generated_tokens if scheduler is not None else 0,
                embedded_items=self._num_embedded_items,
                refused_requests=self._num_refused_requests,
            )

    @property
    def _num_waiting_items(self) -> int:
        """Number of items of embedding requests that are not being embedded yet."""
        return sum(len(job.items) - job.num_started for job in self._embedding_jobs)

    @property
    def can_generate(self) -> bool:
        """Whether the model can generate text."""
        return self._scheduler is not None

    def close(self) -> None:
        """Fail all waiting and running requests with ServerBusyError; wait until the thread ends.

        The current turn (a call, a batch, a token) is finished first. Later requests are refused.
        """
        with self._work_available:
            self._closed = True
            self._work_available.notify()
        self._thread.join()

    def _enqueue(self, queue: deque[Any], work: Any, *, count: int = 1) -> None:
        """Append `work`, which counts as `count` waiting items, to `queue` and wake the thread.

        Raises ServerBusyError if more than `MAX_WAITING` would wait, or the worker is closed.
        """
        with self._work_available:
            num_waiting = self._num_waiting_items + len(self._calls) + len(self._waiting_chats)
            if self._closed or num_waiting + count > MAX_WAITING:
                self._num_refused_requests += 1
                raise ServerBusyError
            queue.append(work)
            self._work_available.notify()

    # ------------------------------------------------------------------ in the worker's thread

    def _run(self) -> None:
        """Serve until the worker is closed, then fail everything that is left with ServerBusyError.

        This is the body of the worker's thread.
        """
        while self._wait_for_work():
            self._run_next_call()
            self._run_embedding_turn()
            if self._scheduler is not None:
                self._scheduler.step()
        for job in self._embedding_jobs:
            job.fail(ServerBusyError())
        for _, future in self._calls:
            if future.set_running_or_notify_cancel():
                future.set_exception(ServerBusyError())
        if self._scheduler is not None:
            self._scheduler.fail_all(ServerBusyError())

    def _wait_for_work(self) -> bool:
        """Block until there is work; return False once the worker is closed."""
        with self._work_available:
            self._work_available.wait_for(lambda: self._closed or self._has_work())
            return not self._closed

    def _has_work(self) -> bool:
        has_chats = self._scheduler is not None and self._scheduler.has_work
        return bool(self._embedding_jobs or self._calls or has_chats)

    def _run_next_call(self) -> None:
        """Take the oldest call, if there is one, run it, and set its future to the result or error.

        A call that was cancelled is taken but not run. Exceptions of the call are not raised here.
        """
        with self._work_available:
            if not self._calls:
                return
            function, future = self._calls.popleft()
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(function())
            except Exception as error:  # noqa: BLE001 - the caller's error must not end the thread
                future.set_exception(error)

    def _run_embedding_turn(self) -> None:
        """Embed one turn's items, if there are any: documents in one batch, queries in another.

        Results and errors go to the jobs' futures.
        """
        with self._work_available:
            selected = self._select_items()
        for is_query in (False, True):
            batch = [(job, i) for job, i in selected if job.is_query is is_query]
            if batch:
                self._embed_items(batch, is_query=is_query)

    def _select_items(self) -> list[tuple[_EmbeddingJob, int]]:
        """Take one turn's items, as (job, position), from the jobs in rotation.

        Each job gives one item at a time, so that a long list does not delay a short one, until the
        items cost TEXTS_PER_EMBEDDING_TURN or none is left. Updates `num_started` of the jobs and
        drops from the queue jobs that have no further items, were cancelled or failed.
        """
        selected: list[tuple[_EmbeddingJob, int]] = []
        cost = 0
        while self._embedding_jobs and cost < TEXTS_PER_EMBEDDING_TURN:
            job = self._embedding_jobs.popleft()
            if job.future.done():
                continue
            selected.append((job, job.num_started))
            num_images = len(extract_images(as_parts(job.items[job.num_started])))
            cost += max(1, IMAGE_COST_IN_TEXTS * num_images)
            job.num_started += 1
            if job.num_started < len(job.items):
                self._embedding_jobs.append(job)
        return selected

    @property
    def max_tokens(self) -> int:
        """Number of tokens of the longest content that the model embeds uncut."""
        model = self.model
        if isinstance(model, DuetModel):
            return model.renderer.max_tokens
        return model.max_text_tokens

    def _count_tokens(self, item: Part | Parts, *, is_query: bool) -> tuple[int, bool]:
        """Return the number of tokens of an item, and whether a text of it must be cut."""
        if isinstance(self.model, DualEncoder):
            (count,) = self.model.count_tokens([item])
            return count, count > self.max_tokens
        sequence = self.model.renderer.render_embedding(as_parts(item), is_query=is_query)
        return len(sequence) + sequence.num_cut_tokens, sequence.num_cut_tokens > 0

    def _embed_items(self, batch: list[tuple[_EmbeddingJob, int]], *, is_query: bool) -> None:
        """Embed items of several jobs in one batch and give each job its vectors.

        An item that cannot be embedded fails its own job with a DataError that names its position;
        any other error, such as a lack of memory, fails all jobs of the batch. Raises nothing.
        """
        encode = self.model.encode_query if is_query else self.model.encode_document

        def encode_batch(entries: list[tuple[_EmbeddingJob, int]]) -> np.ndarray:
            for job, i in entries:
                num_tokens, is_cut = self._count_tokens(job.items[i], is_query=is_query)
                if is_cut and not job.truncate:
                    raise too_long_error(num_tokens, self.max_tokens)
                job.num_tokens += num_tokens
                job.num_truncated += is_cut
            return encode([job.items[i] for job, i in entries], on_truncate=accept_truncation)

        def on_error(entry: tuple[_EmbeddingJob, int], error: DataError) -> None:
            job, position = entry
            job.fail(type(error)(error.message, place=f"input[{position}]", fix=error.fix))

        try:
            vectors = bisect_failures(encode_batch, batch, on_error=on_error)
        except Exception as error:  # noqa: BLE001 - delivered to the jobs that it fails
            for job, _ in batch:
                job.fail(error)
            return
        for (job, position), vector in zip(batch, vectors, strict=True):
            if vector is not None:
                self._num_embedded_items += 1
                job.add_vector(position, vector)
