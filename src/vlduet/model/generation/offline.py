"""Offline generation: a batch of prompts from beginning to end; no request joins it later."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from vlduet.model.backbone import Backbone
from vlduet.model.generation.continuous import ContinuousBatcher, Delta, Request, SamplingParams
from vlduet.model.generation.inputs import PrefillInputs


def _run_to_end(
    backbone: Backbone, prefill_inputs: PrefillInputs, requests: Sequence[Request]
) -> Iterator[tuple[Request, Delta]]:
    """Yield the deltas of all requests, step by step, until all are finished.

    The first exception of any request is raised, which abandons the others: ModelError if its
    logits are not finite. ValueError for another number of requests than of prompts.
    """
    batcher = ContinuousBatcher(backbone, prefill_inputs.eos_token_ids)
    outputs = batcher.add_requests(prefill_inputs, requests)
    while outputs:
        for request, delta in outputs:
            if isinstance(delta, Exception):
                raise delta
            assert isinstance(delta, Delta), "these requests never pause"
            yield request, delta
        outputs = batcher.step()


def stream_text(
    backbone: Backbone,
    prefill_inputs: PrefillInputs,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
) -> Iterator[str]:
    """Yield the continuation of a single prompt in non-empty pieces, without leading white space.

    Nothing runs, and nothing is raised, before the first piece is requested.

    Args:
        temperature: below `MIN_SAMPLING_TEMPERATURE` greedy; else tokens are sampled from torch's
            global generator.

    Raises:
        ModelError: the model gave logits that are not finite.
        ValueError: `max_new_tokens` is less than 1, or there are several prompts.
    """
    request = Request(max_new_tokens, sampling_params=SamplingParams(temperature))
    for _, delta in _run_to_end(backbone, prefill_inputs, [request]):
        if delta.text:
            yield delta.text


def generate_with_finish_reason(
    backbone: Backbone, prefill_inputs: PrefillInputs, max_new_tokens: int
) -> list[tuple[str, str]]:
    """Continue every prompt greedily and return (text, finish reason) of each, in order.

    Text has no leading or trailing whitespace. The finish reason is `stop` if the model ended the
    text and `length` if `max_new_tokens` did. The backbone's mode is restored.

    Raises:
        ModelError: the model gave logits that are not finite for any prompt.
        ValueError: `max_new_tokens` is less than 1.
    """
    num_prompts = len(prefill_inputs.attention_mask)
    requests = [Request(max_new_tokens) for _ in range(num_prompts)]
    texts = dict.fromkeys(requests, "")
    finish_reasons = dict.fromkeys(requests, "")
    for request, delta in _run_to_end(backbone, prefill_inputs, requests):
        texts[request] += delta.text
        finish_reasons[request] = delta.finish_reason or ""
    return [(texts[request].strip(), finish_reasons[request]) for request in requests]


def generate_texts(
    backbone: Backbone, prefill_inputs: PrefillInputs, max_new_tokens: int
) -> list[str]:
    """Return the texts of `generate_with_finish_reason`; raises as it does."""
    results = generate_with_finish_reason(backbone, prefill_inputs, max_new_tokens)
    return [text for text, _ in results]
