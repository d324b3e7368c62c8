"""Answers with images of the index: they pause in the batch until an image has been found.

paused -> searched and, to be fed back, decoded (in the preparation threads) -> read (images pass
the vision tower, one per step) -> running
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from vlduet.data.records import ImageRef
from vlduet.data.sequences import PreparedImage
from vlduet.errors import ImageError
from vlduet.model.duet import DuetModel
from vlduet.model.generation.continuous import Delta, Request
from vlduet.model.generation.interleave import NextStep
from vlduet.model.generation.slices import SliceEnd
from vlduet.retrieval.index import Index
from vlduet.retrieval.search import Hit
from vlduet.serve.chats import AnswerImage, ChatOutput, ChatRequest, Interleaving
from vlduet.serve.index_images import format_image_url


@dataclass(slots=True, eq=False)
class PausedChat:
    """A chat that pauses at the end of a slice of its answer."""

    request: ChatRequest
    interleaving: Interleaving
    entry: Request
    """The answer in the batch."""
    slice_end: SliceEnd
    vector: np.ndarray
    """Embedding of the conversation up to the end of the slice, float32[E]."""
    num_cached: int
    """Number of tokens that the model has read."""
    hit: Hit | None = None
    """Image that was found last."""
    is_searched: bool = False
    """Whether `hit` is the result for this place and not delivered yet."""
    outputs: list[ChatOutput] = field(default_factory=list)
    """Images, and texts of a template, to deliver."""
    step: NextStep | None = None
    """Next step of the model; None until it is known."""
    images: list[PreparedImage] = field(default_factory=list)
    """Images that it reads next, which must pass the vision tower before."""
    error: Exception | None = None
    """Error that ends the chat."""

    @property
    def needs_image(self) -> bool:
        """Whether the next thing to do is to decode an image that is fed back."""
        feeds_back = self.interleaving.answer.feed_back and not self.slice_end.is_last
        return self.is_searched and self.hit is not None and feeds_back


class ImageSearches:
    """Searches of paused chats, which other threads than the model's do.

    The model's thread calls `add` and `take_finished`, the preparation threads the other methods.
    Each of them holds a lock of its own, and none raises.

    Args:
        model: model that generates.
        render_lock: lock to hold while the model's renderer is used.
    """

    def __init__(self, model: DuetModel, render_lock: threading.Lock):
        self.model = model
        self._render_lock = render_lock
        self._lock = threading.Lock()
        self._waiting: deque[PausedChat] = deque()
        self._finished: deque[PausedChat] = deque()

    def add(self, paused: PausedChat) -> None:
        """Queue the search of a chat that has just paused."""
        with self._lock:
            self._waiting.append(paused)

    def take_finished(self) -> list[PausedChat]:
        """Return the chats whose model can go on, or whose search has failed."""
        with self._lock:
            finished = [*self._finished]
            self._finished.clear()
        return finished

    @property
    def has_finished(self) -> bool:
        """Whether `take_finished` would return a chat."""
        return bool(self._finished)

    def has_waiting(self, *, texts_only: bool = False) -> bool:
        """Return whether `take_waiting` would return a chat."""
        with self._lock:
            return any(not (texts_only and paused.needs_image) for paused in self._waiting)

    def take_waiting(self, *, texts_only: bool = False) -> PausedChat | None:
        """Return the chat that waits longest, to be given to `search`; None if there is none.

        With `texts_only`, those that need an image decoded are passed over.
        """
        with self._lock:
            for paused in self._waiting:
                if not (texts_only and paused.needs_image):
                    self._waiting.remove(paused)
                    return paused
        return None

    def search(self, paused: PausedChat, *, texts_only: bool = False) -> None:
        """Find the image of a chat and what its model does next.

        With `texts_only`, an image that is fed back is left to another thread to decode. A chat
        that was cancelled is not searched for.
        """
        try:
            while not paused.request.cancelled and not self._is_complete(paused):
                if not paused.is_searched:
                    paused.hit = find_image(paused)
                    paused.is_searched = True
                if paused.needs_image and texts_only:
                    with self._lock:
                        self._waiting.append(paused)
                    return
                self._advance(paused)
        except Exception as error:  # noqa: BLE001 - it concerns this chat only
            paused.error = error
        with self._lock:
            self._finished.append(paused)

    @staticmethod
    def _is_complete(paused: PausedChat) -> bool:
        """Return whether the model goes on; in a template several places may have no text between.

        Then the next image is searched for with the same embedding.
        """
        step, template = paused.step, paused.interleaving.answer.template
        return step is not None and (not template or step.is_complete or step.sequence is not None)

    def _advance(self, paused: PausedChat) -> None:
        """Add the image that was found to the outputs, and decode it if it is fed back."""
        hit, counts = paused.hit, paused.request.image_counts
        prepared: PreparedImage | ImageError | None = None
        if hit is not None:
            paused.outputs.append(AnswerImage(hit))
            counts.retrieved += 1
        if paused.needs_image and hit is not None and hit.image is not None:
            try:
                prepared = self.model.prepare_image(hit.image)
            except ImageError as error:
                prepared = error

        def get_prepared(_: ImageRef) -> PreparedImage:
            if isinstance(prepared, ImageError):
                raise prepared
            assert prepared is not None
            return prepared

        renderer = self.model.renderer.with_options(prepare_image=get_prepared)
        answer = paused.interleaving.answer
        with self._render_lock:
            step = answer.advance(renderer, hit, paused.slice_end, num_cached=paused.num_cached)
        paused.is_searched = False
        counts.fed_back += step.is_fed_back
        if step.text:
            paused.outputs.append(Delta(step.text))
        if step.sequence is not None:
            paused.images = [image for _, image in step.sequence.images]
        paused.step = step


class _UrlIndex:
    """Index of which only images with a URL on this server are found."""

    def __init__(self, index: Index):
        self.index = index

    def check_model(self, model: DuetModel) -> None:
        """Raise RetrievalError unless the model built the index."""
        self.index.check_model(model)

    def check_image_search(self, where: Any) -> None:
        """Raise RetrievalError as `Index.check_image_search`."""
        self.index.check_image_search(where)

    def search_vector(self, vector: np.ndarray, *, k: int, where: Any) -> Sequence[Hit]:
        """Return hits as `Index.search_vector`, without images that have no URL."""
        hits = self.index.search_vector(vector, k=k, where=where)
        return [hit if format_image_url(hit.id) else replace(hit, image=None) for hit in hits]


def find_image(paused: PausedChat) -> Hit | None:
    """Return the image for the place at which a chat pauses; it blocks. None if there is none.

    Raises:
        RetrievalError: the filter does not fit an index that has been updated.
        HTTPException: 503 if the index was rebuilt by another model.
    """
    answer = paused.interleaving.answer
    return paused.interleaving.read_index(
        lambda index: answer.find_image(_UrlIndex(index), paused.vector)
    )
