"""Generation from input embeddings: transformers' own `generate`; whole, streamed, watched, or several drafts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Thread, get_ident
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from vlduet.model.backbones import Backbone, of_beams

COLD = 1e-3
"""The temperature below which logits divided by it may leave their range."""


class evaluating:
    """`model.eval()` inside, the former mode after."""

    def __init__(self, model: nn.Module):
        self.model, self.was = model, model.training

    def __enter__(self) -> None:
        self.model.eval()

    def __exit__(self, *_: object) -> None:
        self.model.train(self.was)


@dataclass(frozen=True, slots=True)
class Start:
    """Left-padded prompts, ready for the trunk."""

    inputs: Mapping[str, Any]
    """`inputs_embeds`, float[B, T, D], and what `Backbone.deeper` adds."""
    mask: Tensor
    """int64[B, T], 0 on padding."""
    positions: Tensor
    """int64[B, T] or int64[3, B, T], as a batch has them."""
    eos_ids: list[int]
    max_new_tokens: int
    temperature: float = 0.0
    """0 is greedy, and so is what is colder than `COLD`."""
    beams: int = 1
    """More than one: beam search, whose finished beams are the drafts."""

    def arguments(self, backbone: Backbone) -> dict[str, Any]:
        """For transformers."""
        sampling = self.temperature >= COLD
        special = [i for i, token in backbone.tokenizer.added_tokens_decoder.items() if token.special]
        return {
            "inputs_embeds": self.inputs["inputs_embeds"],
            "attention_mask": self.mask,
            "position_ids": self.positions,
            "max_new_tokens": self.max_new_tokens,
            # An answer has at least one token, and no control token but its end: no turn of its own, no image.
            "min_new_tokens": 1,
            "suppress_tokens": [i for i in special if i not in self.eos_ids] or None,
            "do_sample": sampling,
            "num_beams": self.beams,
            "num_return_sequences": self.beams,
            "temperature": self.temperature if sampling else None,
            "top_p": None,
            "top_k": None,
            "pad_token_id": backbone.tokenizer.pad_token_id,
            "eos_token_id": self.eos_ids,
        }


@contextmanager
def prompted(backbone: Backbone, start: Start) -> Iterator[dict[str, Any]]:
    """The arguments of transformers' `generate`; what they cannot carry is given to the trunk as it reads the prompt."""
    deep = {name: value for name, value in start.inputs.items() if name != "inputs_embeds"}
    here = get_ident()

    def give(_: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> tuple[Any, ...] | None:
        cache = given.get("past_key_values")
        # Not a later token's pass, nor one without a cache (it embeds), nor another thread's (it answers something else).
        if not deep or cache is None or cache.get_seq_length() or get_ident() != here:
            return None
        return args, given | of_beams(**deep, rows=len(given["inputs_embeds"]))

    handle = backbone.trunk.register_forward_pre_hook(give, with_kwargs=True)
    try:
        with torch.no_grad(), evaluating(backbone):
            yield start.arguments(backbone)
    finally:
        handle.remove()


def generate(backbone: Backbone, start: Start) -> list[str]:
    """Continue every prompt."""
    return [texts[0] for texts in drafts(backbone, start)]


def drafts(backbone: Backbone, start: Start) -> list[list[str]]:
    """As many continuations of every prompt as there are beams, the likeliest first."""
    with prompted(backbone, start) as arguments:
        ids = backbone.model.generate(**arguments)
    texts = [text.strip() for text in backbone.tokenizer.batch_decode(ids, skip_special_tokens=True)]
    return [texts[begin : begin + start.beams] for begin in range(0, len(texts), start.beams)]


def nearest(drafts: Sequence[Sequence[str]], similarity: Callable[[list[str]], np.ndarray]) -> list[str]:
    """Of each image's drafts the one that is nearest to it; of equals, the first.

    Args:
        similarity: distinct texts -> float[images, texts]. Not asked where there is nothing to choose.
    """
    texts = list(dict.fromkeys(text for some in drafts if len(some) > 1 for text in some if text))
    if not texts:
        return [some[0] for some in drafts]
    row = {text: n for n, text in enumerate(texts)}
    cosines = similarity(texts)
    return [
        max((text for text in some if text in row), key=lambda text: cosines[n, row[text]], default=some[0])
        for n, some in enumerate(drafts)
    ]


def watched(backbone: Backbone, start: Start, watch: Callable[[Tensor], Tensor]) -> None:
    """Continue every prompt, and call `watch` after every token, in this thread.

    Args:
        watch: int64[B, n], all that is new -> bool[B], the prompts that go on no longer; they are filled with padding then.
    """
    criteria = StoppingCriteriaList([cast("StoppingCriteria", lambda ids, scores: watch(ids))])
    with prompted(backbone, start) as arguments:
        backbone.model.generate(**arguments, stopping_criteria=criteria)


def stream(backbone: Backbone, start: Start) -> Iterator[str]:
    """Continue one prompt, piece by piece; an error in the working thread is raised here."""
    streamer = TextIteratorStreamer(backbone.tokenizer, skip_prompt=False, skip_special_tokens=True)
    failed: list[BaseException] = []

    def work() -> None:
        try:
            with prompted(backbone, start) as arguments:
                backbone.model.generate(**arguments, streamer=streamer)
        except BaseException as error:  # noqa: BLE001 - raised again in the reader, who would wait for ever otherwise
            failed.append(error)
            streamer.end()

    thread = Thread(target=work, daemon=True)
    thread.start()
    yield from (piece for piece in streamer if piece)
    thread.join()
    if failed:
        raise failed[0]
