"""Beam search from input embeddings by transformers' own `generate`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import Any

import torch
from torch import nn

from vlduet.model.backbone import Backbone, eval_mode
from vlduet.model.generation.inputs import PrefillInputs, suppressed_tokens


@contextmanager
def generate_arguments(
    backbone: Backbone, prefill_inputs: PrefillInputs, max_new_tokens: int, *, num_beams: int
) -> Iterator[dict[str, Any]]:
    """Yield keyword arguments for transformers' `generate`, which must be called inside the block.

    Inside, the language model's prefill gets all of `prefill_inputs` (see `_prefill_once`),
    gradients are off, and the backbone is in evaluation mode.

    Args:
        num_beams: 1 is greedy; with more, the finished beams of a prompt are returned, best first.
    """
    arguments = {
        "inputs_embeds": prefill_inputs.language_model_inputs["inputs_embeds"],
        "attention_mask": prefill_inputs.attention_mask,
        "position_ids": prefill_inputs.position_ids,
        "max_new_tokens": max_new_tokens,
        "min_new_tokens": 1,  # an answer has at least one token
        "suppress_tokens": suppressed_tokens(backbone, prefill_inputs.eos_token_ids) or None,
        "do_sample": False,
        "num_beams": num_beams,
        "num_return_sequences": num_beams,
        "temperature": None,
        "top_p": None,
        "top_k": None,
        "pad_token_id": backbone.tokenizer.pad_token_id,
        "eos_token_id": prefill_inputs.eos_token_ids,
    }
    per_layer_inputs = prefill_inputs.language_model_inputs.get("per_layer_inputs")
    if per_layer_inputs is not None:
        # Without any, Gemma 4 would search its table for the token of every embedding. The prefill
        # gets all of them anyway, so those of one token are enough.
        arguments["per_layer_inputs"] = per_layer_inputs[:, :1]
    prefill = _prefill_once(backbone.language_model, prefill_inputs, num_beams)
    with torch.no_grad(), eval_mode(backbone), prefill:
        yield arguments


@contextmanager
def _prefill_once(
    language_model: nn.Module, prefill_inputs: PrefillInputs, num_beams: int
) -> Iterator[None]:
    """Compute each prompt once instead of once per beam in this thread, by hooks in the block.

    The inputs of the prefill are replaced by `prefill_inputs`, of which `generate` cannot carry
    all. Its keys, values and last hidden states are repeated for the beams afterwards.
    """
    thread = get_ident()
    caches: list[Any] = []  # the cache of the prefill while it runs

    def replace_inputs(
        _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, ...] | None:
        cache = kwargs.get("past_key_values")
        # Leave alone: later tokens, passes without a cache (embedding), passes of other threads.
        if cache is None or cache.get_seq_length() or get_ident() != thread:
            return None
        caches.append(cache)
        prompt = {
            "attention_mask": prefill_inputs.attention_mask,
            "position_ids": prefill_inputs.position_ids,
            **prefill_inputs.language_model_inputs,
        }
        return args, kwargs | prompt

    def repeat_outputs(_: nn.Module, __: tuple[Any, ...], outputs: Any) -> Any:
        if get_ident() == thread and caches:
            cache = caches.pop()
            if num_beams > 1:
                cache.batch_repeat_interleave(num_beams)
            # `generate` reads the last state only. Repeating makes it contiguous: the LM head is
            # slow on a strided view.
            last_state = outputs.last_hidden_state[:, -1:]
            outputs.last_hidden_state = last_state.repeat_interleave(num_beams, 0)
        return outputs

    handles = (
        language_model.register_forward_pre_hook(replace_inputs, with_kwargs=True),
        language_model.register_forward_hook(repeat_outputs),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def beam_search(
    backbone: Backbone, prefill_inputs: PrefillInputs, max_new_tokens: int, *, num_beams: int
) -> list[list[str]]:
    """Return `num_beams` continuations of every prompt, the most likely first, stripped."""
    with generate_arguments(
        backbone, prefill_inputs, max_new_tokens, num_beams=num_beams
    ) as arguments:
        token_ids = backbone.model.generate(**arguments)
    decoded = backbone.tokenizer.batch_decode(
        token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    texts = [text.strip() for text in decoded]
    return [texts[begin : begin + num_beams] for begin in range(0, len(texts), num_beams)]
