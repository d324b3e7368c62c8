"""Interleaved generation: images of an index are retrieved while the model writes (Sugar, fig. 1).

    prompt -> tokens of a sentence -> its hidden state is an embedding -> search -> image -> ...

1. `ContinuousBatcher` pauses a request at the end of every sentence, and gives its hidden state.
2. `InterleavedAnswer.embed` turns the state into an embedding, which is that of the conversation up
   to there (`model.conversation`), and `find_image` searches the index with it.
3. `InterleavedAnswer.advance` returns what the model reads next: nothing, or with `feed_back` the
   tokens of the image, on which the following text then depends.

An answer of n tokens with m images that are fed back takes at most 1 + n + m forward passes.
`interleave` runs one answer; the server runs several in one batch with the same steps.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import numpy as np

from vlduet.data.records import Conversation, ImageRef, Message, Part
from vlduet.data.sequences import Sequence as TokenSequence
from vlduet.errors import ConfigError, DataError, ImageError, ModelError
from vlduet.logs import logger
from vlduet.model.conversation import (
    render_answer_prompt,
    render_continuation,
    render_conversation,
)
from vlduet.model.embedding import embed_state
from vlduet.model.generation.continuous import (
    ContinuousBatcher,
    Delta,
    Request,
    SamplingParams,
    StepOutputs,
)
from vlduet.model.generation.inputs import require_lm_head
from vlduet.model.generation.slices import SliceEnd, SliceReader

if TYPE_CHECKING:
    from vlduet.model.duet import DuetModel
    from vlduet.model.prompts import Renderer

IMAGE_SLOT = "{image}"
"""Place of an image in a template."""
CLOSING_MARKS = ".,;:!?…)]}”’»。，、；：！？」』）"
"""Punctuation marks that no blank precedes."""
MAX_SEARCHED = 1024
"""Number of nearest documents among which an image is looked for; others may be texts."""


class ImageHit(Protocol):
    """Document that a search found (`retrieval.search.Hit`)."""

    @property
    def id(self) -> str:
        """Return the id of the document."""

    @property
    def score(self) -> float:
        """Return the cosine to the query."""

    @property
    def image(self) -> ImageRef | None:
        """Return the image of the document, or None."""

    @property
    def text(self) -> str:
        """Return the text of the document, which may be empty."""

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Return the metadata of the document."""


HitT = TypeVar("HitT", bound=ImageHit)
HitT_co = TypeVar("HitT_co", bound=ImageHit, covariant=True)


class ImageIndex(Protocol[HitT_co]):
    """Index of documents with images (`retrieval.index.Index`)."""

    def check_model(self, model: Any) -> None:
        """Raise RetrievalError unless the model built the index."""

    def check_image_search(self, where: Any) -> None:
        """Raise RetrievalError for an index of texts, or a filter that fits no document."""

    def search_vector(self, vector: np.ndarray, *, k: int, where: Any) -> Sequence[HitT_co]:
        """Return the `k` documents nearest to an embedding, best first."""


@dataclass(frozen=True, slots=True)
class TextDelta:
    """Piece of the text of an answer."""

    text: str


@dataclass(frozen=True, slots=True)
class RetrievedImage(Generic[HitT]):
    """Image at its place in an answer."""

    hit: HitT
    """The document, whose `image` is set."""
    slice: int
    """Number of sentences of the answer before the image; in a template, of its places before."""
    score: float
    """Cosine of the document and the answer up to this place."""
    is_fed_back: bool = False
    """Whether the following text depends on the image."""


@dataclass(frozen=True, slots=True)
class ImageOptions:
    """Which images an answer gets.

    Raises:
        ConfigError: `threshold` is not between -1 and 1, or `max_images` is below 1.
    """

    threshold: float | None = None
    """Lowest cosine at the end of a sentence; None takes the best image at every sentence. The
    places of a template always get the best image."""
    where: Any = None
    """Filter on metadata, see `retrieval.filters.Where`."""
    max_images: int = 8
    """Number of images of an answer. None is shown twice."""

    def __post_init__(self) -> None:
        """Raise ConfigError as the class says."""
        if self.threshold is not None and not -1 <= self.threshold <= 1:
            fix = "Scores are cosines: give a number from -1 to 1"
            raise ConfigError(f"{self.threshold}", place="threshold", fix=fix)
        if self.max_images < 1:
            raise ConfigError(f"{self.max_images}", place="max_images", fix="Give 1 or more")


DEFAULT_IMAGES = ImageOptions()


@dataclass(frozen=True, slots=True)
class NextStep:
    """What follows a place at which an image was searched."""

    text: str = ""
    """Text of the template up to the next place; "" where the model writes the text."""
    sequence: TokenSequence | None = None
    """Tokens that the model reads next (`ContinuousBatcher.extend`). None: it goes on writing, or
    in a template the next place is the same one."""
    is_fed_back: bool = False
    """Whether the image is among these tokens."""
    is_complete: bool = False
    """Whether the answer is complete: the model reads and writes nothing more."""


@dataclass(slots=True, eq=False)
class InterleavedAnswer:
    """One answer with images: what is searched, and what the model reads next.

    `embed` runs the embedding head and belongs in the thread of the model. `find_image` and
    `advance` need no weights and may run in another one, while the request is paused.

    Raises:
        ConfigError: a template without a place of an image, or with more than `max_images`.
        ModelError: the model cannot generate, or its embeddings are means over all tokens.
    """

    model: DuetModel
    messages: Conversation
    request: Request
    """A new request with the limits of the answer; it is made to pause at the ends of slices."""
    template: str = ""
    feed_back: bool = False
    images: ImageOptions = DEFAULT_IMAGES
    used_ids: list[str] = field(default_factory=list)
    """Ids of the images that the answer has."""
    num_slices: int = 0
    """Number of slice ends so far."""
    _texts: list[str] = field(default_factory=list)
    """Texts of the template between the places that are still to come."""

    def __post_init__(self) -> None:
        """Check the model and split the template; raise as the class says."""
        require_lm_head(self.model.backbone)
        if self.model.prompts.pool != "last":
            raise ModelError(
                "the model's embeddings are means over all tokens, which no position of an answer "
                "has",
                fix="Use a model with prompts.pool: last",
            )
        if self.template:
            self._texts = split_template(self.template)
            num_places, limit = len(self._texts) - 1, self.images.max_images
            if num_places > limit:
                message = f"{num_places} places of images, and at most {limit} images"
                raise ConfigError(message, place="template", fix="Raise max_images")
            self.request.generates = False
        else:
            self.request.slices = SliceReader()

    @property
    def opening_text(self) -> str:
        """Text of the template before its first place; "" without a template."""
        return self._texts[0] if self._texts else ""

    def render_prompt(self, renderer: Renderer) -> TokenSequence:
        """Return what the model reads first, and set the place that `request` reads there.

        With a template, the limit of `request` becomes the number of tokens that are read later.

        Raises:
            DataError: no visible content, or the chat template refuses the turns.
            ImageError: an image cannot be decoded.
            ConfigError: the checkpoint has no usable chat template.
        """
        if self.template:  # its texts are read instead of generated
            texts = [text for text in self._texts[1:-1] if text.strip()]
            num_tokens = sum(len(render_continuation(renderer, (text,))) for text in texts)
            self.request.max_new_tokens = max(1, num_tokens)
        opening = self.opening_text
        if opening.strip():
            turns = (*self.messages, Message("assistant", (opening,)))
            sequence = render_conversation(renderer, turns)
        else:
            sequence = render_answer_prompt(renderer, self.messages)
        self.request.read_span = find_read_span(sequence)
        return sequence

    def embed(self, slice_end: SliceEnd) -> np.ndarray:
        """Return the embedding float32[E], unit length, of the conversation up to a slice end."""
        return embed_state(self.model, slice_end.state)

    def find_image(self, index: ImageIndex[HitT], vector: np.ndarray) -> HitT | None:
        """Return the best document with an image that the answer does not have, or None.

        None also where its score is below the threshold, which the places of a template do not
        have, or where the answer has `max_images`. Raises RetrievalError for a filter.
        """
        if len(self.used_ids) >= self.images.max_images:
            return None
        threshold = None if self.template else self.images.threshold
        k = len(self.used_ids) + 4
        while True:
            hits = index.search_vector(vector, k=k, where=self.images.where)
            for hit in hits:
                if threshold is not None and hit.score < threshold:
                    return None
                if hit.image is not None and hit.id not in self.used_ids:
                    return hit
            if len(hits) < k or k >= MAX_SEARCHED:
                return None
            k = min(4 * k, MAX_SEARCHED)

    def advance(
        self, renderer: Renderer, hit: ImageHit | None, slice_end: SliceEnd, *, num_cached: int
    ) -> NextStep:
        """Count a slice end with its image, which may be None, and return what follows.

        Sets the place that `request` reads next. An image that is fed back is decoded here. One
        that cannot be decoded, or does not fit the model's window, is not fed back, which is
        logged.

        Args:
            renderer: renderer of the model.
            hit: result of `find_image`.
            slice_end: the place.
            num_cached: number of tokens that the model has read (`count_cached_tokens`).
        """
        self.num_slices += 1
        image: tuple[Part, ...] = ()
        if hit is not None:
            self.used_ids.append(hit.id)
            if len(self.used_ids) >= self.images.max_images:
                self.request.slices = None  # no further pause
            if self.feed_back and hit.image is not None and not slice_end.is_last:
                image = (hit.image,)
        text = ""
        if self.template:
            text = self._texts[1]
            del self._texts[0]
            if len(self._texts) == 1:
                return NextStep(text, is_complete=True)
        read_text = (text,) if text.strip() else ()
        if hit is not None and image:
            try:
                sequence = render_continuation(renderer, (*image, *read_text))
                if self.fits(num_cached, sequence):
                    self.request.read_span = find_read_span(sequence)
                    return NextStep(text, sequence, is_fed_back=True)
                reason = "it does not fit the model's window"
            except ImageError as error:
                reason = str(error)
            logger.warning(f"{hit.id}: shown and not read: {reason}")
        if not read_text:
            return NextStep(text)
        sequence = render_continuation(renderer, read_text)
        self.request.read_span = find_read_span(sequence)
        return NextStep(text, sequence)

    def fits(self, num_cached: int, sequence: TokenSequence) -> bool:
        """Return whether further tokens and the rest of the answer fit the model's window."""
        limit = self.model.backbone.context_length
        num_left = self.request.max_new_tokens - len(self.request.token_ids)
        return limit is None or num_cached + len(sequence) + num_left <= limit


def find_read_span(sequence: TokenSequence) -> tuple[int, int]:
    """Return the `Request.read_span` of the anchor of a sequence."""
    anchor = sequence.anchors[0]
    return len(sequence) - anchor.start, len(sequence) - anchor.end


def split_template(template: str) -> list[str]:
    """Return the texts before, between and after the places of images in a template.

    An image follows the last word: white space before its place moves behind it, as one blank, and
    is left out before a punctuation mark.

    Raises ConfigError for a template without a place.
    """
    pieces = template.split(IMAGE_SLOT)
    if len(pieces) == 1:
        fix = f"Write {IMAGE_SLOT} where an image belongs"
        raise ConfigError("no place of an image", place="template", fix=fix)
    texts = [pieces[0].strip()]
    for before, text in pairwise(pieces):
        is_apart = before[-1:].isspace() or text[:1].isspace()
        text = text.strip()
        texts.append(f" {text}" if is_apart and text and text[0] not in CLOSING_MARKS else text)
    return texts


def interleave(
    model: DuetModel,
    messages: Sequence[Message],
    index: ImageIndex[HitT],
    *,
    template: str = "",
    feed_back: bool = False,
    images: ImageOptions = DEFAULT_IMAGES,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
) -> Iterator[TextDelta | RetrievedImage[HitT]]:
    """Yield the answer to a conversation with images of an index at the ends of its sentences.

    Arguments and model are checked, and the prompt's images decoded, at once; the answer is made
    while the iterator is advanced.

    Args:
        model: model that built the index.
        messages: turns in order, the last one of the user.
        index: index to search, of which only documents with an image are used.
        template: text of the answer with ``{image}`` where images belong, such as ``A day at the
            beach: {image} Then {image}.`` Nothing is generated then, and `max_new_tokens` and
            `temperature` have no meaning.
        feed_back: let the model read every image that it shows, so that the following text depends
            on it. An image that is broken or does not fit the model's window is shown and not read,
            which is logged.
        images: threshold, filter and number of images.
        max_new_tokens: longest answer in tokens, at which it is cut. A sentence that is cut there
            gets no image.
        temperature: 0 is greedy; else tokens are sampled from torch's global generator.

    Raises:
        ModelError: a model that only embeds, or whose embeddings are means over all tokens.
        RetrievalError: an index of another model or of texts, or a filter on metadata that no
            document has.
        ConfigError: a template without ``{image}`` or with more than `images.max_images`, or a
            checkpoint without a chat template.
        DataError: a conversation that is too long or whose turns the chat template refuses.
        ImageError: an image of the conversation cannot be decoded.
    """
    index.check_model(model)
    index.check_image_search(images.where)
    request = Request(max_new_tokens, sampling_params=SamplingParams(temperature))
    answer = InterleavedAnswer(
        model, tuple(messages), request, template=template, feed_back=feed_back, images=images
    )
    prompt = answer.render_prompt(model.renderer)
    if not answer.fits(0, prompt):
        lengths = f"{len(prompt)} tokens and an answer of up to {request.max_new_tokens}"
        limit = model.backbone.context_length
        raise DataError(
            f"{lengths}: the model's window is {limit}",
            place="messages",
            fix="Give a shorter conversation or template, or a smaller max_new_tokens",
        )
    return _run(answer, index, prompt)


def _run(
    answer: InterleavedAnswer, index: ImageIndex[HitT], prompt: TokenSequence
) -> Iterator[TextDelta | RetrievedImage[HitT]]:
    """Yield the deltas and images of an answer; see `interleave`."""
    model = answer.model
    batcher = ContinuousBatcher(model.backbone, model.renderer.eos_token_ids)
    if answer.opening_text:
        yield TextDelta(answer.opening_text)
    outputs = batcher.add_requests(model.prefill_inputs([prompt]), [answer.request])
    while outputs:
        ((_, output),) = outputs
        if isinstance(output, Exception):
            raise output
        if isinstance(output, Delta):
            if output.text:
                yield TextDelta(output.text)
            outputs = batcher.step()
            continue
        outputs = yield from _run_slice_end(answer, index, batcher, output)


def _run_slice_end(
    answer: InterleavedAnswer,
    index: ImageIndex[HitT],
    batcher: ContinuousBatcher,
    slice_end: SliceEnd,
) -> Generator[TextDelta | RetrievedImage[HitT], None, StepOutputs]:
    """Yield the image of a slice end, and the text of the template after it.

    Returns the next outputs of the batcher, which are none at the end of the answer.
    """
    model, request = answer.model, answer.request
    vector = answer.embed(slice_end)
    while True:
        number = answer.num_slices
        num_cached = batcher.count_cached_tokens(request)
        hit = answer.find_image(index, vector)
        step = answer.advance(model.renderer, hit, slice_end, num_cached=num_cached)
        if hit is not None:
            yield RetrievedImage(hit, number, hit.score, step.is_fed_back)
        if step.text:
            yield TextDelta(step.text)
        if step.is_complete:
            return []
        if step.sequence is not None:
            inputs = model.prefill_inputs([step.sequence], num_past=num_cached)
            return batcher.extend(request, inputs)
        if not answer.template:
            return batcher.resume(request)
