"""Queue of embedding requests, whose items are prepared, embedded and collected in rotation.

    items      waiting -> being prepared -> prepared -> taken for a turn -> embedded

Each request gives one item at a time, so that a long list does not delay a short one. The caller
holds a lock, except for `add_vector` and `fail`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np

from vlduet.data.batches import PACKED_ROW_TOKENS
from vlduet.errors import DataError, ModelError
from vlduet.model.embedding import Embeddable
from vlduet.serve.preparation import PreparedContent, list_images

MAX_PREPARED_OF_JOB = 16
"""Number of prepared items that one request may have; bounds the decoded images in memory."""
MAX_PREPARED = 128
"""Number of prepared items of all requests together."""


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
class EmbeddingJob:
    """Items of one embedding request, which may be embedded over several turns."""

    items: Sequence[Embeddable]
    is_query: bool
    truncate: bool
    future: Future[EmbeddingResult] = field(default_factory=Future)
    """Receives the result, or the error of the first item that failed."""
    num_started: int = 0
    """Number of items that have been taken for preparation."""
    num_unfinished: int = 0
    """Number of items that are being prepared or are prepared."""
    prepared: deque[tuple[int, PreparedContent]] = field(default_factory=deque)
    """Position and content of items that are ready for the model."""
    vectors: dict[int, np.ndarray] = field(default_factory=dict)
    """Finished embeddings, float32[D], by position of the item."""
    num_tokens: int = 0
    num_truncated: int = 0

    def add_vector(self, position: int, content: PreparedContent, vector: np.ndarray) -> None:
        """Store an item's embedding float32[D]; set the future's result after the last item.

        A vector that is not finite is not stored and fails the job with ModelError. A future that
        was cancelled or has an error already stays as it is.
        """
        if not np.isfinite(vector).all():
            message = f"the model gave a vector that is not finite for input[{position}]"
            self.fail(ModelError(message, fix="Its weights or its precision are broken"))
            return
        self.vectors[position] = vector
        self.num_tokens += content.num_tokens
        self.num_truncated += content.is_truncated
        if len(self.vectors) == len(self.items):
            embeddings = np.stack([self.vectors[i] for i in range(len(self.items))])
            result = EmbeddingResult(embeddings, self.num_tokens, self.num_truncated)
            with suppress(InvalidStateError):  # the future was cancelled or has an error
                self.future.set_result(result)

    def fail(self, error: Exception, position: int | None = None) -> None:
        """Set `error` as the outcome, unless the future has an outcome already.

        The place of a DataError becomes the `position` of its item.
        """
        if isinstance(error, DataError) and position is not None:
            error = type(error)(error.message, place=f"input[{position}]", fix=error.fix)
        with suppress(InvalidStateError):
            self.future.set_exception(error)


@dataclass(frozen=True, slots=True)
class TurnItem:
    """Prepared item that is embedded in this turn."""

    job: EmbeddingJob
    position: int
    content: PreparedContent


class EmbeddingQueue:
    """Embedding requests in the order of their turns."""

    def __init__(self) -> None:
        self.jobs: deque[EmbeddingJob] = deque()
        self._num_prepared = 0  # items that are being prepared, prepared, or taken for a turn

    def __bool__(self) -> bool:
        """Return whether there is a request that is not finished."""
        return bool(self.jobs)

    @property
    def num_unfinished(self) -> int:
        """Number of items that are not embedded yet."""
        return sum(len(job.items) - len(job.vectors) for job in self.jobs if not job.future.done())

    def has_unprepared(self, *, texts_only: bool = False) -> bool:
        """Return whether `take_unprepared` would return an item."""
        has_room = self._num_prepared < MAX_PREPARED
        return has_room and any(_can_prepare(job, texts_only) for job in self.jobs)

    def take_unprepared(self, *, texts_only: bool = False) -> tuple[EmbeddingJob, int] | None:
        """Return the next item to prepare, as (job, position); None if there is none.

        The other jobs come before the next item of its job. With `texts_only`, jobs whose next item
        has an image are passed over.
        """
        self.drop_finished()
        for job in [*self.jobs]:
            if self._num_prepared < MAX_PREPARED and _can_prepare(job, texts_only):
                position = job.num_started
                job.num_started += 1
                job.num_unfinished += 1
                self._num_prepared += 1
                # To the end: the next job is the next one of which an item is prepared.
                self.jobs.remove(job)
                self.jobs.append(job)
                return job, position
        return None

    def add_prepared(self, job: EmbeddingJob, position: int, content: PreparedContent) -> None:
        """Make an item ready for a turn, unless its job has ended meanwhile."""
        if job.future.done():
            self.release(job)
        else:
            job.prepared.append((position, content))

    def release(self, job: EmbeddingJob) -> None:
        """Count an item as no longer prepared: it was embedded, or it failed."""
        job.num_unfinished -= 1
        self._num_prepared -= 1

    def has_prepared(self) -> bool:
        """Return whether `take_turn` would return an item."""
        return any(job.prepared for job in self.jobs)

    def take_turn(
        self, max_tokens: int, max_images: int, *, skips_longer: bool = False
    ) -> list[list[TurnItem]]:
        """Take the items of one turn, from the jobs in rotation.

        Args:
            max_tokens: bound on the padded tokens of all passes together. An item that is longer is
                a turn of its own.
            max_images: bound on the number of images; an item that has more is a turn of its own.
            skips_longer: leave out items that are longer than `max_tokens`.

        Returns:
            The items of each forward pass: of similar length, so that little is padded.
        """
        self.drop_finished()
        rows = _RowCount()
        passes: dict[int, list[TurnItem]] = {}
        num_images = 0
        waiting = deque(job for job in self.jobs if job.prepared)
        while waiting:
            job = waiting.popleft()
            position, content = job.prepared[0]
            if skips_longer and content.num_tokens > max_tokens:
                continue
            is_first = not passes
            num_images += len(content.images)
            if not is_first and (
                num_images > max_images or rows.size_with(content.num_tokens) > max_tokens
            ):
                break
            rows.add(content.num_tokens)
            job.prepared.popleft()
            length = _round_length(content.num_tokens)
            passes.setdefault(length, []).append(TurnItem(job, position, content))
            # The others have their turns before it next time.
            self.jobs.remove(job)
            self.jobs.append(job)
            if job.prepared:
                waiting.append(job)
        return list(passes.values())

    def fail_all(self, error: Exception) -> None:
        """Fail all requests."""
        for job in self.jobs:
            job.fail(error)

    def drop_finished(self) -> None:
        """Forget the jobs that are embedded, were cancelled or failed, and their prepared items."""
        for job in self.jobs:
            if job.future.done():
                for _ in range(len(job.prepared)):
                    self.release(job)
                job.prepared.clear()
        unfinished = [job for job in self.jobs if not job.future.done()]
        self.jobs.clear()
        self.jobs.extend(unfinished)


class _RowCount:
    """Padded tokens of the passes of a turn, in rows as `embed_sequences` packs them."""

    def __init__(self) -> None:
        self._free_by_length: dict[int, list[int]] = {}  # tokens left in each row of a length

    def size_with(self, num_tokens: int) -> int:
        """Return the padded tokens if a sequence of so many tokens were added."""
        length = _round_length(num_tokens)
        free = self._free_by_length.get(length, [])
        needs_row = not any(num_tokens <= tokens for tokens in free)
        size = sum(length * len(rows) for length, rows in self._free_by_length.items())
        return size + (length if needs_row else 0)

    def add(self, num_tokens: int) -> None:
        """Add a sequence to the first row of its length that has room, or to a new row."""
        length = _round_length(num_tokens)
        free = self._free_by_length.setdefault(length, [])
        for row, tokens in enumerate(free):
            if num_tokens <= tokens:
                free[row] -= num_tokens
                return
        free.append(length - num_tokens)


def _round_length(num_tokens: int) -> int:
    """Return the length of the rows that a sequence shares: the next multiple of packed rows."""
    return -(-num_tokens // PACKED_ROW_TOKENS) * PACKED_ROW_TOKENS


def _can_prepare(job: EmbeddingJob, texts_only: bool) -> bool:
    """Return whether a job has an item to prepare, and room for it.

    With `texts_only`, its next item must not have an image.
    """
    if job.num_started == len(job.items) or job.future.done():
        return False
    if job.num_unfinished >= MAX_PREPARED_OF_JOB:
        return False
    return not (texts_only and list_images(job.items[job.num_started]))
