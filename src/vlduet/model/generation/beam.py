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

    In the block, gradients are off, the backbone is in evaluation mode, and hooks of
    `_prefill_once` on the language model give it all of `prefill_inputs`. All three are undone at
    the end, also after an error.

    Args:
        prefill_inputs: B prompts.
        max_new_tokens: largest number of tokens of an answer; the smallest is 1.
        num_beams: 1 is greedy; with more, all beams of a prompt are returned, best first.

    Yields:
        Arguments with which `generate` returns the new tokens alone, int64[B * num_beams, length],
        without sampling and without special tokens other than the end tokens and padding.
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
    """Make `generate` in this thread compute each prompt once instead of once per beam.

    Registers two hooks on `language_model` and removes them after the block, also after an error.
    They replace the inputs of the prefill by `prefill_inputs`, of which `generate` cannot carry
    all, and then repeat its keys, values and last hidden states `num_beams` times. Forward passes
    of later tokens, without a cache, or in other threads are left alone.
    """
    thread = get_ident()
    caches: list[Any] = []  # the cache of the prefill while it runs

    def replace_inputs(
        _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, ...] | None:
        """Return a prefill's (args, kwargs) with `prefill_inputs`; None keeps those of others.

        Appends the cache of the prefill to `caches`.
        """
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
        """Return `outputs`, which after a prefill hold the last state of each beam only, in place.

        The states become float[B * num_beams, 1, D]. The prefill's cache is removed from `caches`
        and repeated in place. Outputs of other forward passes are not changed.
        """
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
    """Return `num_beams` continuations of every prompt, the most likely first.

    Texts are stripped and have no special tokens; some may be equal or empty. The backbone's mode
    is restored. Raises ValueError (of transformers) if `max_new_tokens` is less than 1.
    """
    with generate_arguments(
        backbone, prefill_inputs, max_new_tokens, num_beams=num_beams
    ) as arguments:
        token_ids = backbone.model.generate(**arguments)
    decoded = backbone.tokenizer.batch_decode(
        token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    texts = [text.strip() for text in decoded]
    return [texts[begin : begin + num_beams] for begin in range(0, len(texts), num_beams)]
