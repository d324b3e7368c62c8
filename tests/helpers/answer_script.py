"""Stand-in for the generation of a model, for tests of conversations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vlduet.data.records import Message
from vlduet.retrieval.index import Index


class AnswerScript:
    """Methods in place of a model's, which yield prepared events.

    `events` are what an answer yields, pieces of text by `generate`; an exception among them is
    raised. `prompts` and `options` list the arguments of every call.
    """

    def __init__(self) -> None:
        self.events: list[Any] = ["An ", "answer."]
        self.prompts: list[tuple[Message, ...]] = []
        self.options: list[dict[str, Any]] = []

    def generate(self, messages: tuple[Message, ...], **options: Any) -> Iterator[str]:
        return self.run(messages, options)

    def interleave(
        self, messages: tuple[Message, ...], index: Index, **options: Any
    ) -> Iterator[Any]:
        return self.run(messages, {"index": index, **options})

    def run(self, messages: tuple[Message, ...], options: dict[str, Any]) -> Iterator[Any]:
        self.prompts.append(messages)
        self.options.append(options)
        for event in self.events:
            if isinstance(event, BaseException):
                raise event
            yield event
