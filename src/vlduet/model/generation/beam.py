"""Generation from input embeddings by transformers' own `generate`: a whole answer to every prompt, or several drafts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from vlduet.model.backbone import Backbone

MIN_SAMPLING_TEMPERATURE = 1e-3
"""The temperature below which logits divided by it may leave their range."""


class eval_mode:
    """`model.eval()` inside, the former mode after. Walking a model takes milliseconds: not where it is in evaluation."""

    def __init__(self, model: nn.Module):
        self.model, self.was = model, model.training

    def __enter__(self) -> None:
        if self.was:
            self.model.eval()

    def __exit__(self, *_: object) -> None:
        if self.was:
            self.model.train()


@dataclass(frozen=True, slots=True)
class PrefillInputs:
    """Left-padded prompts, ready for the trunk."""

    language_model_inputs: Mapping[str, Any]
    """`inputs_embeds`, float[B, T, D], and what `Backbone.attention`, `Backbone.words` and `Backbone.deeper` add."""
    attention_mask: Tensor
    """int64[B, T], 0 on padding."""
    position_ids: Tensor
    """int64[B, T] or int64[3, B, T], as a batch has them."""
    eos_token_ids: list[int]


def suppressed_tokens(backbone: Backbone, eos_token_ids: Sequence[int]) -> list[int]:
    """Tokens that no answer has: control tokens but its end, so no turn of its own and no image."""
    special = (i for i, token in backbone.tokenizer.added_tokens_decoder.items() if token.special)
    words = len(
        backbone.lm_head.weight
    )  # learned prompt tokens lie behind them until a model is merged
    return [i for i in special if i < words and i not in eos_token_ids]


@contextmanager
def generate_arguments(
    backbone: Backbone,
    start: PrefillInputs,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    num_beams: int = 1,
) -> Iterator[dict[str, Any]]:
    """The arguments of transformers' `generate`. As the trunk reads the prompts it is given all that they have, each once:
    `generate` cannot carry all of it, and has a row for every beam.

    Args:
        temperature: 0 is greedy, and so is what is colder than `COLD`.
        beams: more than one is a beam search, whose finished beams are the drafts.
    """
    here, reading = get_ident(), list[Any]()
    sampling = temperature >= MIN_SAMPLING_TEMPERATURE
    arguments = {
        "inputs_embeds": start.language_model_inputs["inputs_embeds"],
        "attention_mask": start.attention_mask,
        "position_ids": start.position_ids,
        "max_new_tokens": max_new_tokens,
        "min_new_tokens": 1,  # an answer has at least one token
        "suppress_tokens": suppressed_tokens(backbone, start.eos_token_ids) or None,
        "do_sample": sampling,
        "num_beams": num_beams,
        "num_return_sequences": num_beams,
        "temperature": float(temperature) if sampling else None,
        "top_p": None,
        "top_k": None,
        "pad_token_id": backbone.tokenizer.pad_token_id,
        "eos_token_id": start.eos_token_ids,
    }

    if (
        "per_layer_inputs" in start.language_model_inputs
    ):  # one token's, for Gemma 4 would else look every embedding up in its table
        arguments["per_layer_inputs"] = start.language_model_inputs["per_layer_inputs"][:, :1]

    def give(_: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> tuple[Any, ...] | None:
        cache = given.get("past_key_values")
        # Not a later token's pass, nor one without a cache (it embeds), nor another thread's (it answers something else).
        if cache is None or cache.get_seq_length() or get_ident() != here:
            return None
        reading.append(cache)
        return args, given | {
            "attention_mask": start.attention_mask,
            "position_ids": start.position_ids,
            **start.language_model_inputs,
        }

    def spread(_: nn.Module, __: tuple[Any, ...], out: Any) -> Any:
        if get_ident() == here and reading:
            cache = reading.pop()
            if num_beams > 1:
                cache.batch_repeat_interleave(num_beams)
            # No more is asked for than the last one, which must not lie apart: a product of slices is a slow one.
            out.last_hidden_state = out.last_hidden_state[:, -1:].repeat_interleave(num_beams, 0)
        return out

    handles = (
        backbone.language_model.register_forward_pre_hook(give, with_kwargs=True),
        backbone.language_model.register_forward_hook(spread),
    )
    try:
        with torch.no_grad(), eval_mode(backbone):
            yield arguments
    finally:
        for handle in handles:
            handle.remove()


def generate_texts(
    backbone: Backbone, start: PrefillInputs, max_new_tokens: int, *, temperature: float = 0.0
) -> list[str]:
    """Continue every prompt."""
    return [
        text
        for text, _ in generate_with_finish_reason(
            backbone, start, max_new_tokens, temperature=temperature
        )
    ]


def generate_with_finish_reason(
    backbone: Backbone, start: PrefillInputs, max_new_tokens: int, *, temperature: float = 0.0
) -> list[tuple[str, bool]]:
    """The continuation of every prompt, and whether it ended by itself: False where the limit cut it."""
    with generate_arguments(backbone, start, max_new_tokens, temperature=temperature) as arguments:
        ids = backbone.model.generate(**arguments)
    ends = torch.isin(ids, torch.tensor(start.eos_token_ids, device=ids.device)).any(1).tolist()
    return list(zip(_texts(backbone, ids), ends, strict=True))


def generate_drafts(
    backbone: Backbone, start: PrefillInputs, max_new_tokens: int, *, num_drafts: int
) -> list[list[str]]:
    """As many continuations of every prompt as there are beams, the likeliest first; without beams an empty one."""
    if not num_drafts:
        return [[""] for _ in start.attention_mask]
    with generate_arguments(backbone, start, max_new_tokens, num_beams=num_drafts) as arguments:
        texts = _texts(backbone, backbone.model.generate(**arguments))
    return [texts[begin : begin + num_drafts] for begin in range(0, len(texts), num_drafts)]


def _texts(backbone: Backbone, ids: Tensor) -> list[str]:
    return [text.strip() for text in backbone.tokenizer.batch_decode(ids, skip_special_tokens=True)]
