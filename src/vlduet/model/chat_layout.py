"""Layout of a chat: what its template writes around the texts and images, and what is learned.

1. `marker`    every text is a numbered marker in the template's output, which does not depend on
               the texts; equal structures of chats share it
2. `prompt`    what an answer is prompted with: the template with the turns before, up to where the
               answer begins
3. `layout`    the output in parts: control text, places of texts, places of images

    template writes    <|user|>MARKER</s><|assistant|>MARKER</s>
    prompt             <|user|>MARKER</s><|assistant|>
    labels                                            ^^^^^^^^^^
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any, Literal

from jinja2 import TemplateError

from vlduet.data.records import Message
from vlduet.errors import ConfigError, DataError
from vlduet.logs import logger
from vlduet.model.chat_template import TEMPLATE_PLACES
from vlduet.model.families.family import token_string
from vlduet.model.text_tokenizer import TextTokenizer

MARKER_SPACE = "\N{EM SPACE}"
"""White space around a marker, which a template that strips texts takes away."""
RAW_MARKER = re.compile(f"({MARKER_SPACE}?)\ue000(\\d+)\ue001({MARKER_SPACE}?)")
"""Marker as it is in the template's output."""
MAX_CACHED_LAYOUTS = 1_000
"""Number of structures of chats whose layout is remembered."""

TurnStructure = tuple[str, tuple[bool, ...], bool]
"""Role of a turn, which of its parts are texts (the others are images), and if it is supervised."""


@dataclass(frozen=True, slots=True)
class LayoutPart:
    """Part of a template's output."""

    kind: Literal["control", "text", "image"]
    text: str = ""
    """Control text; "" for a text or an image."""
    index: int = 0
    """Number of the text or image among those of the chat, from 0."""
    strips: tuple[bool, bool] = (False, False)
    """Whether the template strips the beginning and the end of the text."""
    is_supervised: bool = False
    is_answer_start: bool = False
    """The model is prompted with what precedes."""
    lacks_end: bool = False
    """The text ends an answer, and the template writes no token that ends its turn."""


@dataclass(frozen=True, slots=True)
class _Answer:
    """Turn of the assistant in a template's output."""

    texts: range
    """Numbers of its texts, at least one."""
    is_supervised: bool
    start: int | None
    """Index of the character before which the model is prompted; None: never, by this template."""


class ChatLayouts:
    """Layouts of chats by the chat template of one tokenizer; they are remembered."""

    def __init__(
        self,
        tokenizer: TextTokenizer,
        *,
        image_placeholder: str,
        eos_token_ids: Sequence[int],
        template: str = "",
        system: str = "",
        variables: Mapping[str, str] | None = None,
    ):
        """Store the arguments.

        Args:
            tokenizer: with the chat template.
            image_placeholder: text that the template writes for an image.
            eos_token_ids: tokens that end an answer.
            template: chat template in place of the tokenizer's own.
            system: text of a system turn before all chats, which is control text; "" for none.
            variables: further variables of the template.
        """
        self.tokenizer = tokenizer
        self._template = template or None
        self._system = system
        self._variables = dict(variables or {})
        self._image_placeholder = image_placeholder
        ends = [token_string(tokenizer.tokenizer, token_id) for token_id in eos_token_ids]
        self._end_of_turn = re.compile("|".join(map(re.escape, ends)) or r"(?!)")
        self._places = re.compile(f"\ue000(\\d+)([01])([01])\ue001|{re.escape(image_placeholder)}")
        self._layouts: dict[tuple[tuple[TurnStructure, ...], bool], list[LayoutPart]] = {}
        self._user_turn: tuple[str, str, str] | None = None

    def layout(
        self, messages: Sequence[Message], *, add_generation_prompt: bool
    ) -> list[LayoutPart]:
        """Return the parts of a chat in the template's order.

        What an answer is prompted with ends where the answer's first token begins: white space at
        the end of a generation prompt that the tokenizer merges into an answer is left out.

        An answer that is supervised, and all that the template writes up to the token that ends its
        turn, are labels. Where the template writes something else before an earlier answer than it
        is prompted with, that answer is not learned, which is logged once; the last answer of a
        chat gets the prompt in its place.

        Args:
            messages: turns in order, at least one.
            add_generation_prompt: end where the answer begins; nothing is supervised.

        Raises:
            DataError: the template refuses the messages, for example roles that do not alternate.
            ConfigError: there is no template, or no form of the messages keeps all content.
        """
        structure = tuple(
            _describe_turn(message, supervised=not add_generation_prompt) for message in messages
        )
        key = (structure, add_generation_prompt)
        if key not in self._layouts:
            if len(self._layouts) >= MAX_CACHED_LAYOUTS:
                self._layouts.clear()
            self._layouts[key] = self._compute_layout(structure, add_generation_prompt)
        return self._layouts[key]

    def user_turn(self) -> tuple[str, str, str]:
        """Return what the template writes before and after the text of a single turn of a user.

        The second text ends where an answer begins. The third is white space that the template
        writes after it and that the tokenizer merges into an answer. Raises as `layout`.
        """
        if self._user_turn is None:
            output, _ = self._apply((("user", (True,), False),), add_generation_prompt=True)
            marker = _find_text(output, 0)
            end = len(output) - self.tokenizer.count_merged_space(output)
            closing = output[marker.end() : end]
            self._user_turn = output[: marker.start()], closing, output[end:]
        return self._user_turn

    def _compute_layout(
        self, structure: tuple[TurnStructure, ...], add_generation_prompt: bool
    ) -> list[LayoutPart]:
        """Compute the result of `layout` for a structure; raises as it does."""
        output, as_list = self._apply(structure, add_generation_prompt=add_generation_prompt)
        if add_generation_prompt:
            output = output[: len(output) - self.tokenizer.count_merged_space(output)]
        answers = []
        num_texts = 0
        for turn, (role, is_text, is_supervised) in enumerate(structure):
            texts = range(num_texts, num_texts + sum(is_text))
            num_texts += len(texts)
            if role != "assistant" or not texts:
                continue
            start: int | None = _find_text(output, texts[0]).start()
            if is_text[0]:
                output, start = self._place_prompt(output, structure, turn=turn, as_list=as_list)
            if start is None and is_supervised:
                is_supervised = False
                _log_unlearned_answers()
            answers.append(_Answer(texts, is_supervised, start))
        return self._split(output, answers)

    def _place_prompt(
        self, output: str, structure: tuple[TurnStructure, ...], *, turn: int, as_list: bool
    ) -> tuple[str, int | None]:
        """Return the output and the place where the model is prompted for the answer of a turn.

        The place is None where the template writes something else there than the prompt; for the
        last turn, the prompt then replaces that in the output.
        """
        first_text = sum(sum(is_text) for _, is_text, _ in structure[:turn])
        position = _find_text(output, first_text).start()
        prompt = output[:position]
        if turn:
            # Where it is refused, nobody can be prompted with this beginning of a chat.
            with suppress(ConfigError, DataError):
                prompt, _ = self._apply(
                    structure[:turn], add_generation_prompt=True, forms=(as_list,)
                )
        start = len(prompt) - self.tokenizer.count_merged_space(prompt)
        if output.startswith(prompt[:start]) and not output[start:position].strip():
            return output, start
        if turn + 1 < len(structure):
            return output, None
        return prompt + output[position:], start

    def _split(self, output: str, answers: list[_Answer]) -> list[LayoutPart]:
        """Return the parts of an output."""
        places = list(self._places.finditer(output))
        spans, ends = self._find_labels(output, answers)
        starts = {answer.start for answer in answers if answer.start is not None}
        edges = sorted({edge for span in spans for edge in span} | starts)

        def is_supervised(position: int) -> bool:
            return any(begin <= position < end for begin, end in spans)

        parts: list[LayoutPart] = []

        def append_control(begin: int, end: int) -> None:
            bounds = [begin, *(edge for edge in edges if begin < edge < end), end]
            for first, last in pairwise(bounds):
                if first < last:
                    parts.append(
                        LayoutPart(
                            "control",
                            output[first:last],
                            is_supervised=is_supervised(first),
                            is_answer_start=first in starts,
                        )
                    )

        position = num_images = 0
        for match in places:
            append_control(position, match.start())
            position = match.end()
            if match[1] is None:
                parts.append(LayoutPart("image", index=num_images))
                num_images += 1
                continue
            parts.append(
                LayoutPart(
                    "text",
                    index=int(match[1]),
                    strips=(match[2] == "1", match[3] == "1"),
                    is_supervised=is_supervised(match.start()),
                    is_answer_start=match.start() in starts,
                    lacks_end=position in ends,
                )
            )
        append_control(position, len(output))
        return parts

    def _find_labels(
        self, output: str, answers: list[_Answer]
    ) -> tuple[list[tuple[int, int]], set[int]]:
        """Return the spans of an output that are labels, and where an end of a turn is missing.

        What the template writes between two texts of an answer is a label, unless it has special
        tokens, which a model does not generate.
        """
        spans = []
        missing_ends = set()
        for answer in answers:
            matches = [_find_text(output, number) for number in answer.texts]
            begin = matches[0].start() if answer.start is None else answer.start
            for match, next_match in pairwise(matches):
                between = output[match.end() : next_match.start()]
                is_plain = self.tokenizer.alias_control(between) == between
                if answer.is_supervised and not (is_plain and self._places.search(between) is None):
                    spans.append((begin, match.end()))
                    begin = next_match.start()
            end = matches[-1].end()
            next_place = self._places.search(output, end)
            limit = next_place.start() if next_place else len(output)
            end_of_turn = self._end_of_turn.search(output, end, limit)
            if end_of_turn is None:
                missing_ends.add(end)
            else:
                end = end_of_turn.end()
            if answer.is_supervised:
                spans.append((begin, end))
        return spans, missing_ends

    def _apply(
        self,
        structure: tuple[TurnStructure, ...],
        *,
        add_generation_prompt: bool,
        forms: tuple[bool, ...] = (True, False),
    ) -> tuple[str, bool]:
        """Return the template's output for turns whose texts are markers, and the form of these.

        Contents are lists of typed parts, and strings if the template does not take these (False of
        `forms`). In the output a marker says whether its text is stripped, as two digits.

        Raises:
            DataError: the template refuses the messages, for example roles that do not alternate.
            ConfigError: there is no template, or no form of the messages keeps all content.
        """
        tokenizer = self.tokenizer.tokenizer
        if not (self._template or tokenizer.chat_template):
            raise ConfigError(
                f"the checkpoint has no chat template ({TEMPLATE_PLACES})",
                place="prompts.chat",
                fix="Set prompts.chat to false, or add a chat_template.jinja",
            )
        all_is_text = [flag for _, is_text, _ in structure for flag in is_text]
        num_texts = sum(all_is_text)
        refusal: Exception | None = None
        for as_list in forms:  # templates of text-only origin accept strings only
            messages = self._mark_texts(structure, as_list=as_list)
            try:
                raw_output = str(
                    tokenizer.apply_chat_template(
                        messages,
                        chat_template=self._template,
                        tokenize=False,
                        add_generation_prompt=add_generation_prompt,
                        **self._variables,
                    )
                )
            except (TemplateError, TypeError) as error:
                refusal = error
                continue
            numbers = [int(match[2]) for match in RAW_MARKER.finditer(raw_output)]
            is_complete = (
                sorted(numbers) == list(range(num_texts))
                and raw_output.count(self._image_placeholder) == len(all_is_text) - num_texts
                and "'type'" not in raw_output  # the list itself, printed by a template for strings
            )
            if is_complete:
                output = RAW_MARKER.sub(
                    lambda m: f"\ue000{m[2]}{int(not m[1])}{int(not m[3])}\ue001", raw_output
                )
                return output, as_list
        if refusal is not None:
            raise DataError(
                f"the checkpoint's chat template refuses this chat ({refusal})",
                fix="Correct the order of its turns",
            )
        raise ConfigError(
            "the checkpoint's chat template drops or repeats content",
            place="chat_template",
            fix="Correct chat_template.jinja",
        )

    def _mark_texts(
        self, structure: tuple[TurnStructure, ...], *, as_list: bool
    ) -> list[dict[str, Any]]:
        """Return turns for a chat template, with numbered markers as texts.

        Contents are lists of typed parts, or strings, which join the texts without separators, with
        the image placeholder and a line end for an image.
        """
        messages: list[dict[str, Any]] = []
        if self._system:
            text: Any = [{"type": "text", "text": self._system}] if as_list else self._system
            messages.append({"role": "system", "content": text})
        number = 0
        for role, is_text, _ in structure:
            parts: list[dict[str, str]] = []
            for flag in is_text:
                if flag:
                    marker = f"{MARKER_SPACE}\ue000{number}\ue001{MARKER_SPACE}"
                    parts.append({"type": "text", "text": marker})
                    number += 1
                else:
                    parts.append({"type": "image"})
            content: Any = parts
            if not as_list:
                image = f"{self._image_placeholder}\n"
                content = "".join(part.get("text", image) for part in parts)
            messages.append({"role": role, "content": content})
        return messages


def _describe_turn(message: Message, *, supervised: bool) -> TurnStructure:
    """Return the structure of a turn; `supervised` False makes no turn supervised."""
    is_text = tuple(isinstance(part, str) for part in message.parts)
    return message.role, is_text, supervised and message.supervised and message.role == "assistant"


def _find_text(output: str, number: int) -> re.Match[str]:
    """Return the match of the marker of a text in an output, which has it."""
    match = re.search(f"\ue000{number}[01][01]\ue001", output)
    assert match is not None
    return match


@cache
def _log_unlearned_answers() -> None:
    """Log, once per process, that earlier answers of chats are not learned."""
    logger.warning(
        "the chat template writes other text before an earlier answer than the model is prompted "
        "with: only the last answer of a chat is learned. Split chats of several answers"
    )
