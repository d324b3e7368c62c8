"""A chat as the endpoints hand it to the worker, and what comes back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, TypeVar

from vlduet.data.records import Message, extract_images
from vlduet.model.generation.continuous import Delta, SamplingParams

if TYPE_CHECKING:
    from vlduet.model.generation.interleave import InterleavedAnswer
    from vlduet.retrieval.index import Index
    from vlduet.retrieval.search import Hit

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class AnswerImage:
    """Image of the index in an answer, behind the text that was delivered before it."""

    hit: Hit


ChatOutput = Delta | AnswerImage
"""One output of a chat; the last one is a delta with a finish reason."""


@dataclass(slots=True)
class ImageCounts:
    """Numbers of images of the index in one chat; those of the answer grow with it."""

    retrieved: int = 0
    """Images in the answer."""
    fed_back: int = 0
    """Images of the answer that the model saw before it went on."""
    left_out: int = 0
    """Images of earlier answers that are not in the prompt: the model did not see them then."""


class IndexReader(Protocol):
    """Function that returns a function's result for the index, which it refreshes before."""

    def __call__(self, function: Callable[[Index], T], /) -> T:
        """Return `function(index)`; for any thread that may block."""


@dataclass(frozen=True, slots=True)
class Interleaving:
    """An answer with images of the index, and where these are searched."""

    answer: InterleavedAnswer
    read_index: IndexReader


@dataclass(slots=True, eq=False)
class ChatRequest:
    """A conversation to answer."""

    messages: tuple[Message, ...]
    on_output: Callable[[ChatOutput | Exception], None]
    """Function called in the worker's thread with every output, or with an error, the last call."""
    max_new_tokens: int
    sampling_params: SamplingParams = field(default_factory=SamplingParams)
    stop_strings: tuple[str, ...] = ()
    interleaving: Interleaving | None = None
    """Images of the index in the answer; None: it is a text."""
    image_counts: ImageCounts = field(default_factory=ImageCounts)
    cancelled: bool = False
    """Set by any thread when nobody waits for the answer; `on_output` is not called afterwards."""

    @property
    def has_images(self) -> bool:
        """Whether a message has an image, whose decoding takes time."""
        return any(extract_images(message.parts) for message in self.messages)

    def deliver(self, output: ChatOutput | Exception) -> None:
        """Call `on_output` unless the request is cancelled.

        An exception of the call is swallowed and sets `cancelled`.
        """
        try:
            if not self.cancelled:
                self.on_output(output)
        except Exception:  # noqa: BLE001 - such as an event loop that has been closed
            self.cancelled = True
