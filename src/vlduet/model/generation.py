"""Generation from input embeddings: transformers' own `generate`, whole or as a stream."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from threading import Thread
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TextIteratorStreamer

from vlduet.model.backbones import Backbone


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

    embeddings: Tensor
    """float[B, T, D]"""
    mask: Tensor
    """int64[B, T], 0 on padding."""
    positions: Tensor
    """int64[B, T] or int64[3, B, T], as a batch has them."""
    eos_ids: list[int]
    max_new_tokens: int
    temperature: float = 0.0
    """0 is greedy."""

    def arguments(self, backbone: Backbone) -> dict[str, Any]:
        """For transformers."""
        sampling = self.temperature > 0
        special = [i for i, token in backbone.tokenizer.added_tokens_decoder.items() if token.special]
        return {
            "inputs_embeds": self.embeddings,
            "attention_mask": self.mask,
            "position_ids": self.positions,
            "max_new_tokens": self.max_new_tokens,
            # An answer has at least one token, and no control token but its end: no turn of its own, no image.
            "min_new_tokens": 1,
            "suppress_tokens": [i for i in special if i not in self.eos_ids] or None,
            "do_sample": sampling,
            "temperature": self.temperature if sampling else None,
            "top_p": None,
            "top_k": None,
            "pad_token_id": backbone.tokenizer.pad_token_id,
            "eos_token_id": self.eos_ids,
        }


@torch.no_grad()
def generate(backbone: Backbone, start: Start) -> list[str]:
    """Continue every prompt."""
    with evaluating(backbone):
        ids = backbone.model.generate(**start.arguments(backbone))
    return [text.strip() for text in backbone.tokenizer.batch_decode(ids, skip_special_tokens=True)]


def stream(backbone: Backbone, start: Start) -> Iterator[str]:
    """Continue one prompt, piece by piece; an error in the working thread is raised here."""
    streamer = TextIteratorStreamer(backbone.tokenizer, skip_prompt=False, skip_special_tokens=True)
    failed: list[BaseException] = []

    def work() -> None:
        try:
            with torch.no_grad(), evaluating(backbone):
                backbone.model.generate(**start.arguments(backbone), streamer=streamer)
        except BaseException as error:  # noqa: BLE001 - raised again in the reader, who would wait for ever otherwise
            failed.append(error)
            streamer.end()

    thread = Thread(target=work, daemon=True)
    thread.start()
    yield from (piece for piece in streamer if piece)
    thread.join()
    if failed:
        raise failed[0]
