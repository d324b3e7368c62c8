"""A conversation with a model: its turns, attached images, and retrieval for its answers.

It neither reads nor prints; `vlduet chat` shows what it yields.

1. `attach`   adds an image to the next message
2. `answer`   searches, generates, and keeps the message and what was answered as two turns
3. `search`   finds documents without an answer

Images get numbers, counted from 1, when they are attached or retrieved.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from vlduet.data.image_formats import IMAGE_SUFFIXES
from vlduet.data.images import load_image, read_bytes, write_image_file
from vlduet.data.records import ImageRef, Message, Part, Parts
from vlduet.errors import ConfigError, DataError, ImageError, RetrievalError, quote_value
from vlduet.logs import logger
from vlduet.model.generation.inputs import require_lm_head
from vlduet.retrieval.filters import Where
from vlduet.retrieval.rag import Scope, add_references, prepare_prompt
from vlduet.retrieval.search import Hit, SearchOptions, check_where
from vlduet.retrieval.search import search as find_hits

if TYPE_CHECKING:
    from vlduet.model.duet import DuetModel
    from vlduet.model.generation.interleave import RetrievedImage, TextDelta
    from vlduet.retrieval.index import Index

RetrievalMode = Literal["off", "context", "interleave"]
"""Whether answers retrieve: not at all, references before the answer, or images while it is
generated."""


@dataclass(frozen=True, slots=True)
class ChatSettings:
    """Settings of how a conversation is answered.

    Raises:
        ConfigError: an unknown mode or scope, a length below 1, or a negative temperature.
        RetrievalError: a threshold that is not between -1 and 1.
    """

    retrieval: RetrievalMode = "off"
    scope: Scope = "last"
    """Query of the mode `context`: the last message, or the whole conversation."""
    where: Where = None
    """Filter of every search."""
    k: int = 3
    """Number of references in the mode `context`."""
    threshold: float | None = None
    """Lowest score of an image in the mode `interleave`; None shows one after every sentence."""
    feed_back: bool = False
    """Let the model read the images of the mode `interleave`, in the answer and in later turns."""
    max_new_tokens: int = 256
    """Length limit of an answer."""
    temperature: float = 0.0
    """0 takes the likeliest token."""
    system: str = ""
    """Instruction for the whole conversation; an empty one is left out."""

    def __post_init__(self) -> None:
        """Check the values; raise ConfigError as the class says."""
        for place, value, choices in (
            ("retrieval", self.retrieval, get_args(RetrievalMode)),
            ("scope", self.scope, get_args(Scope)),
        ):
            if value not in choices:
                fix = f"Use {', '.join(choices[:-1])} or {choices[-1]}"
                raise ConfigError(quote_value(value), place=place, fix=fix)
        for place, number in (("k", self.k), ("max_new_tokens", self.max_new_tokens)):
            if number < 1:
                raise ConfigError(f"{number}", place=place, fix="Give 1 or more")
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"{self.temperature}", place="temperature", fix="Give 0 or more")
        SearchOptions(threshold=self.threshold)


@dataclass(frozen=True, slots=True)
class Sources:
    """Documents that the prompt of an answer quotes, by their ranks; before the text of it."""

    hits: tuple[Hit, ...]


@dataclass(frozen=True, slots=True)
class Notice:
    """Sentence about what is left out of a prompt."""

    text: str


class ChatSession:
    """One conversation, in memory.

    Attributes:
        model: model that answers, and embeds queries.
        index: index that is searched; None without one.
        settings: how answers are made; `change` replaces it.
        turns: messages of the user and answers, alternating. A message is kept without the
            references that were quoted for it.
        attached: copies of the images of the next message.
    """

    def __init__(
        self,
        model: DuetModel,
        index: Index | None = None,
        *,
        folder: Path,
        settings: ChatSettings | None = None,
    ):
        """Begin an empty conversation.

        Args:
            model: generative model with a chat template.
            index: index that this model built, or None.
            folder: existing folder for copies of images, so that a conversation does not change
                when their files do.
            settings: how answers are made; by default without retrieval.

        Raises:
            ModelError: the model cannot generate, or not retrieve meanwhile as the settings say.
            ConfigError: it has no usable chat template, retrieval without an index, or answers
                longer than the model's window.
            DataError: its chat template refuses a system message.
            RetrievalError: another model built the index, or a filter is unusable.
        """
        self.model = model
        self.index = index
        self.turns: list[Message] = []
        self.attached: list[ImageRef] = []
        self._folder = folder
        self._numbered: list[ImageRef] = []
        self.settings = ChatSettings()
        require_lm_head(model.backbone)
        if index is not None:
            index.check_model(model)
        self._apply(settings or ChatSettings())

    # ------------------------------------------------------------------ settings

    def change(self, *, retrieval: RetrievalMode | None = None, scope: Scope | None = None) -> None:
        """Change what later answers retrieve; None leaves a setting as it is.

        Raises ConfigError for an unknown value, and for retrieval without an index; ModelError if
        the model cannot retrieve while it generates.
        """
        settings = self.settings
        if retrieval is not None:
            settings = replace(settings, retrieval=retrieval)
        if scope is not None:
            settings = replace(settings, scope=scope)
        self._apply(settings)

    def _apply(self, settings: ChatSettings) -> None:
        """Replace the settings after checks with model and index; raises as `__init__`."""
        if self.index is None:
            uses_index = {
                "retrieval": settings.retrieval != "off",
                "scope": settings.scope != "last",
                "where": bool(settings.where),
                "feed_back": settings.feed_back,
                "threshold": settings.threshold is not None,
            }
            for place, is_used in uses_index.items():
                if is_used:
                    fix = "Name an index: vlduet chat MODEL --index INDEX"
                    raise ConfigError("there is no index", place=place, fix=fix)
        else:
            check_where(self.index, settings.where)
        if _token_limit(self.model, settings.max_new_tokens) < 1:
            window = self.model.backbone.context_length
            message = f"{settings.max_new_tokens}, and the model's window is {window} tokens"
            raise ConfigError(message, place="max_new_tokens", fix="Give less")
        greeting = (*_system_turns(settings), Message("user", ("Hello",)))
        self.model.renderer.render_chat_parts(greeting, add_generation_prompt=True)
        if settings.retrieval == "interleave":
            self._interleave(greeting, settings)
        self.settings = settings

    # ------------------------------------------------------------------ images

    def attach(self, path: Path) -> int:
        """Add a copy of an image to the next message, and return its number.

        Raises:
            DataError: no such file, one that is no image or cannot be decoded, or a full disk.
        """
        if not os.path.lexists(path):
            fix = f"Correct the path; relative ones start from {Path.cwd()}"
            raise DataError("no such file", place=path, fix=fix)
        load_image(ImageRef(path=path))
        self.attached.append(self._copy_image(ImageRef(path=path)))
        return self.number_image(ImageRef(path=path.absolute()))

    def number_image(self, image: ImageRef) -> int:
        """Return the number of an image, a new one for an image that has none."""
        if image not in self._numbered:
            self._numbered.append(image)
        return self._numbered.index(image) + 1

    def locate_image(self, number: int) -> Path:
        """Return a file, with the ending of an image's format, that holds a numbered image.

        Raises:
            DataError: no image has this number.
            ImageError: its file is gone or cannot be read.
        """
        if not 1 <= number <= len(self._numbered):
            count = len(self._numbered)
            fix = f"Give a number from 1 to {count}" if count else "No image has been shown yet"
            raise DataError(f"no image {number}", fix=fix)
        image = self._numbered[number - 1]
        data = read_bytes(image)
        if image.path is not None and image.path.suffix.lower() in IMAGE_SUFFIXES:
            return image.path
        # A viewer goes by the ending, and a file of another one may be opened as a program.
        copy = write_image_file(ImageRef(data=data), self._folder).path
        assert copy is not None
        return copy

    def _copy_image(self, image: ImageRef) -> ImageRef:
        """Return a reference to a copy of an image in the session's folder; raises ImageError."""
        return write_image_file(ImageRef(data=read_bytes(image)), self._folder)

    # ------------------------------------------------------------------ search and answers

    def search(self, text: str, *, k: int = 5) -> list[Hit]:
        """Return the documents nearest to a text and the attached images, which stay attached.

        Raises:
            ConfigError: there is no index.
            RetrievalError: neither a text nor an image.
            DataError: a query that cannot be embedded.
        """
        if self.index is None:
            fix = "Name one: vlduet chat MODEL --index INDEX"
            raise ConfigError("there is no index to search", fix=fix)
        self.index.refresh()
        query = (*self.attached, *((text,) if text.strip() else ()))
        return find_hits(self.index, self.model, query, k=k, where=self.settings.where)

    def answer(self, text: str) -> Iterator[Sources | Notice | TextDelta | RetrievedImage[Hit]]:
        """Yield the answer to a message with the attached images, while it is generated.

        Once something of the answer was yielded, it and the message become turns when the iterator
        ends, also by an error or by `close`. If nothing was, the conversation stays as it was, and
        the images stay attached. Of a conversation that is too long, the oldest turns are left out
        from then on, and then the references that are farthest from the query, each with a notice.

        Raises:
            RetrievalError: a blank text, or an unusable index.
            DataError: the message alone is too long.
            ModelError: the model fails.
        """
        if not text.strip():
            raise RetrievalError("an empty message", fix="Ask something")
        message = Message("user", (*self.attached, text))
        sources = self._search_references(message) if self.settings.retrieval == "context" else ()
        num_turns, num_sources = self._fit_window(message, sources)
        yield from self._shorten(num_turns, len(sources) - num_sources)
        sources = sources[:num_sources]
        if self.settings.retrieval == "context":
            yield Sources(sources)
        prompt = add_references((*self._system(), *self.turns, message), sources)
        answered: list[Part] = []
        try:
            for event in self._generate(prompt):
                self._append_event(answered, event)
                yield event
        finally:
            parts = _tidy_parts(answered)
            if parts:
                self.turns += [message, Message("assistant", parts)]
                self.attached = []

    def clear(self) -> None:
        """Forget all turns and the attached images; numbers of images and settings stay."""
        self.turns = []
        self.attached = []

    def _search_references(self, message: Message) -> tuple[Hit, ...]:
        """Return the documents to quote for a message; raises as `prepare_prompt`."""
        assert self.index is not None
        self.index.refresh()
        num_turns, _ = self._fit_window(message, ())  # a longer conversation cannot be embedded
        turns = self.turns[len(self.turns) - num_turns :]
        prompt = prepare_prompt(
            self.index,
            self.model,
            (*self._system(), *turns, message),
            scope=self.settings.scope,
            k=self.settings.k,
            where=self.settings.where,
        )
        return prompt.sources

    def _generate(self, prompt: tuple[Message, ...]) -> Iterator[TextDelta | RetrievedImage[Hit]]:
        """Yield the model's answer to a prompt in the mode of the settings."""
        from vlduet.model.generation.interleave import TextDelta

        settings = self.settings
        if settings.retrieval == "interleave":
            assert self.index is not None
            self.index.refresh()
            yield from self._interleave(prompt, settings)
            return
        pieces = self.model.generate(
            prompt,
            max_new_tokens=settings.max_new_tokens,
            stream=True,
            temperature=settings.temperature,
        )
        yield from map(TextDelta, pieces)

    def _interleave(
        self, prompt: tuple[Message, ...], settings: ChatSettings
    ) -> Iterator[TextDelta | RetrievedImage[Hit]]:
        """Check an interleaved answer, and return an iterator that generates it."""
        from vlduet.model.generation.interleave import ImageOptions

        assert self.index is not None
        return self.model.interleave(
            prompt,
            self.index,
            feed_back=settings.feed_back,
            images=ImageOptions(threshold=settings.threshold, where=settings.where),
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
        )

    def _append_event(self, answered: list[Part], event: TextDelta | RetrievedImage[Hit]) -> None:
        """Append what later turns have of an event: a text, or with feed-back a copy of an image.

        An image that cannot be read is left out, which is logged.
        """
        from vlduet.model.generation.interleave import TextDelta

        if not isinstance(event, TextDelta):
            image = event.hit.image
            if self.settings.feed_back and image is not None:
                try:
                    load_image(image)  # later turns would fail if it were broken
                    answered.append(self._copy_image(image))
                except ImageError as error:
                    logger.warning(f"{event.hit.id}: not part of later turns: {error}")
        elif answered and isinstance(answered[-1], str):
            answered[-1] += event.text
        else:
            answered.append(event.text)

    # ------------------------------------------------------------------ the model's window

    def _system(self) -> tuple[Message, ...]:
        """Return the system message as a tuple of one; () without one."""
        return _system_turns(self.settings)

    def _fit_window(self, message: Message, sources: tuple[Hit, ...]) -> tuple[int, int]:
        """Return how many of the newest turns and of the best sources fit before an answer.

        Raises DataError if the message does not fit even without them.
        """
        limit = _token_limit(self.model, self.settings.max_new_tokens)
        turns, num_sources = self.turns, len(sources)
        while True:
            prompt = add_references((*self._system(), *turns, message), sources[:num_sources])
            builder, _ = self.model.renderer.render_chat_parts(prompt, add_generation_prompt=True)
            num_tokens = builder.count_tokens()[-1]
            if num_tokens <= limit:
                return len(turns), num_sources
            if turns:
                turns = turns[2:]  # a message and its answer
            elif num_sources:
                num_sources -= 1
            else:
                raise DataError(
                    f"the message takes {num_tokens:,} tokens, and the model's limit is {limit:,} "
                    f"before an answer of up to {self.settings.max_new_tokens:,}",
                    fix="Shorten it, attach fewer images, or allow shorter answers",
                )

    def _shorten(self, num_turns: int, num_removed_sources: int) -> Iterator[Notice]:
        """Forget all but the newest turns, and yield a notice of what does not fit the window."""
        num_removed = len(self.turns) - num_turns
        if num_removed:
            self.turns = self.turns[num_removed:]
            yield Notice(
                f"The conversation is longer than the model's window: its oldest {num_removed} "
                "messages are forgotten."
            )
        if num_removed_sources:
            yield Notice(
                f"The message leaves no room for {num_removed_sources} of the references, the "
                "last of those found."
            )


def _system_turns(settings: ChatSettings) -> tuple[Message, ...]:
    """Return the system message of settings as a tuple of one; () without one."""
    return (Message("system", (settings.system,)),) if settings.system.strip() else ()


def _token_limit(model: DuetModel, max_new_tokens: int) -> int:
    """Return the largest number of tokens of a prompt: nothing is cut, and an answer fits."""
    limit = model.renderer.max_tokens  # longer ones are cut
    window = model.backbone.context_length
    return limit if window is None else min(limit, window - max_new_tokens)


def _tidy_parts(parts: list[Part]) -> Parts:
    """Return the parts of an answer without white space around it, and without empty texts."""
    tidy = list(parts)
    if tidy and isinstance(tidy[0], str):
        tidy[0] = tidy[0].lstrip()
    if tidy and isinstance(tidy[-1], str):
        tidy[-1] = tidy[-1].rstrip()
    return tuple(part for part in tidy if part)
