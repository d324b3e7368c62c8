"""Preparation of contents for the model's thread: decoded, rendered, tokenised and counted.

It needs no weights and may take seconds, so that other threads than the model's do it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np

from vlduet.data.records import ImageRef, Part, Parts, as_parts, extract_images
from vlduet.data.sequences import PreparedImage
from vlduet.encoders.dual import DualEncoder
from vlduet.model import embedding
from vlduet.model.conversation import is_conversation
from vlduet.model.duet import DuetModel
from vlduet.model.embedding import Embeddable
from vlduet.model.limits import accept_truncation, too_long_error


@dataclass(frozen=True, slots=True)
class PreparedContent:
    """Content of an embedding that the model can embed without further work in Python."""

    content: Any
    """What `ContentEncoder.embed` takes."""
    num_tokens: int
    """Number of tokens that the model reads."""
    images: tuple[PreparedImage, ...] = ()
    """Images that pass the vision tower, unless their features are cached."""
    is_truncated: bool = False
    """Whether a text of it was cut."""


def list_images(item: Embeddable) -> tuple[ImageRef, ...]:
    """Return the images of a content to embed, in order."""
    if is_conversation(item):
        return extract_images(part for message in item for part in message.parts)
    return extract_images(as_parts(cast("Part | Parts", item)))


class ContentEncoder(Protocol):
    """Model that embeds in two steps: `prepare` in any thread, `embed` in the model's."""

    def prepare(self, item: Embeddable, *, is_query: bool, truncate: bool) -> PreparedContent:
        """Return a content ready to embed.

        Raises:
            DataError: it cannot be embedded, or is too long without `truncate`.
        """

    def embed(self, contents: Sequence[PreparedContent]) -> np.ndarray:
        """Return the embeddings float32[N, D] of at least one content.

        Raises:
            DataError: one of them cannot be embedded.
        """

    def embed_in_chunks(
        self, content: PreparedContent, chunk_tokens: int
    ) -> Iterator[np.ndarray | None]:
        """Yield None after each pass over so many tokens, and the embedding after the last one."""


class DuetEncoder:
    """`ContentEncoder` of a `DuetModel`."""

    def __init__(self, model: DuetModel):
        self.model = model
        # Renderers and tokenizers fill caches that are not made for several threads, of which
        # each holds this.
        self.render_lock = threading.Lock()

    def prepare(self, item: Embeddable, *, is_query: bool, truncate: bool) -> PreparedContent:
        """Return the sequence of a content; raises as `ContentEncoder.prepare`."""
        images = {image: self.model.prepare_image(image) for image in list_images(item)}
        renderer = self.model.renderer.with_options(prepare_image=images.__getitem__)
        with self.render_lock:
            sequence = embedding.render(renderer, item, is_query=is_query, truncate=truncate)
        is_cut = sequence.num_cut_tokens > 0
        prepared = tuple(image for _, image in sequence.images)
        return PreparedContent(sequence, len(sequence), prepared, is_cut)

    def embed(self, contents: Sequence[PreparedContent]) -> np.ndarray:
        """Return the embeddings float32[N, D] of at least one content, in one forward pass."""
        return self.model.embed_sequences([content.content for content in contents])

    def embed_in_chunks(
        self, content: PreparedContent, chunk_tokens: int
    ) -> Iterator[np.ndarray | None]:
        """Yield as `ContentEncoder.embed_in_chunks`."""
        return embedding.embed_in_chunks(self.model, content.content, chunk_tokens)


class TowerEncoder:
    """`ContentEncoder` of a `DualEncoder`, which decodes and tokenises in the model's thread."""

    def __init__(self, model: DualEncoder):
        self.model = model
        self._count_lock = threading.Lock()

    def prepare(self, item: Embeddable, *, is_query: bool, truncate: bool) -> PreparedContent:
        """Return a content whose length was checked; raises as `ContentEncoder.prepare`.

        Conversations are refused before: only models that chat get them.
        """
        with self._count_lock:
            (num_tokens,) = self.model.count_tokens([cast("Part | Parts", item)])
        limit = self.model.max_text_tokens
        if num_tokens > limit and not truncate:
            raise too_long_error(num_tokens, limit)
        return PreparedContent(item, min(num_tokens, limit), is_truncated=num_tokens > limit)

    def embed(self, contents: Sequence[PreparedContent]) -> np.ndarray:
        """Return the embeddings float32[N, D]; raises as `DualEncoder.encode`."""
        items = [content.content for content in contents]
        return self.model.encode(items, on_truncate=accept_truncation)

    def embed_in_chunks(
        self, content: PreparedContent, chunk_tokens: int
    ) -> Iterator[np.ndarray | None]:
        """Yield the embedding: texts are short, and the towers read them at once."""
        yield self.embed([content])
