"""Continuous batching: requests enter and leave the batch between two tokens.

1. `ContinuousBatcher.add_requests` prefills prompts in one forward pass and samples their first
   tokens. Their keys and values are concatenated with those of the running requests, left-padded.
2. `ContinuousBatcher.step` runs the last token of every request through the language model in one
   forward pass and samples the next one. Finished requests leave the batch.

Each token is the one that transformers' `generate` would choose for the prompt alone. Of a
checkpoint's generation config, `repetition_penalty` and `no_repeat_ngram_size` are applied.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from vlduet.errors import ModelError
from vlduet.model.backbone import Backbone, eval_mode
from vlduet.model.generation.detokenize import IncrementalDetokenizer, holdback_length
from vlduet.model.generation.inputs import PrefillInputs, suppressed_tokens
from vlduet.model.processing import Tokenizer

MIN_SAMPLING_TEMPERATURE = 1e-3
"""Temperature below which decoding is greedy: divided by it, logits could overflow."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Settings of how the next token is chosen."""

    temperature: float = 0.0
    """Divisor of the logits; below `MIN_SAMPLING_TEMPERATURE` the most likely token is taken."""
    top_p: float = 1.0
    """Total probability of the most likely tokens that are sampled from."""
    seed: int | None = None
    """Seed of the request's own generator; None samples from torch's global generator."""
    top_k: int = 0
    """Number of the most likely tokens that are sampled from; 0 samples from all."""
    min_p: float = 0.0
    """Tokens are sampled if their probability is at least this share of the highest one."""
    repetition_penalty: float | None = None
    """Divisor of the positive logits of tokens that the answer already has, and factor of the
    negative ones; None is the checkpoint's."""


@dataclass(frozen=True, slots=True)
class Delta:
    """Text that one token added to an answer."""

    text: str
    """New text; may be empty."""
    finish_reason: str | None = None
    """None before the last delta, then `stop` (end token or stop string) or `length`."""
    prompt_tokens: int = 0
    """Number of tokens of the prompt."""
    completion_tokens: int = 0
    """Number of tokens generated so far."""


class Request:
    """One answer in progress.

    Attributes:
        token_ids: tokens generated so far.
        prompt_tokens: number of tokens of the prompt; set when the request enters a batch.
        is_finished: the request leaves the batch with the next step. Set when the answer ends;
            callers set it, between two steps, to cancel the request.
    """

    def __init__(
        self,
        max_new_tokens: int,
        *,
        sampling_params: SamplingParams | None = None,
        stop_strings: Sequence[str] = (),
    ):
        """Create a request without tokens, for one `ContinuousBatcher.add_requests`.

        Args:
            max_new_tokens: largest number of tokens of the answer.
            sampling_params: default is greedy. They are not checked before a token is sampled.
            stop_strings: non-empty; the answer ends before the first occurrence of any of them.

        Raises:
            ValueError: `max_new_tokens` is less than 1.
        """
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
        self.max_new_tokens = max_new_tokens
        self.sampling_params = sampling_params or SamplingParams()
        self.stop_strings = stop_strings
        self.is_finished = False
        self.token_ids: list[int] = []
        self.prompt_tokens = 0
        self._unsent_text = ""  # held back, since it may begin a stop string
        self._has_text = False  # something of the answer was returned
        self._detokenizer: IncrementalDetokenizer | None = None
        self._generator: torch.Generator | None = None

    def sample_token(self, logits: Tensor) -> Tensor:
        """Choose the next token from float32[1, V] logits and return its id, int64[1].

        Nothing is appended, and `logits` is not modified. Sampling advances the request's
        generator, which the first call seeds, or without a seed torch's global one.

        Raises:
            TypeError, ValueError, RuntimeError: the temperature is not a finite number, or
                `top_p`, `top_k` or `min_p` is out of its range or not a number.
        """
        params = self.sampling_params
        if params.temperature < MIN_SAMPLING_TEMPERATURE:
            return logits.argmax(1)
        if params.seed is not None and self._generator is None:
            self._generator = torch.Generator(logits.device).manual_seed(params.seed)
        input_ids = torch.empty(0)  # required by the interface of the warpers, which ignore it
        # The order of transformers.
        logits = TemperatureLogitsWarper(float(params.temperature))(input_ids, logits)
        if params.top_k > 0:
            logits = TopKLogitsWarper(params.top_k)(input_ids, logits)
        if params.top_p < 1:
            logits = TopPLogitsWarper(params.top_p)(input_ids, logits)
        if params.min_p > 0:
            logits = MinPLogitsWarper(params.min_p)(input_ids, logits)
        return torch.multinomial(logits.softmax(1), 1, generator=self._generator)[:, 0]

    def append_token(self, token_id: int, tokenizer: Tokenizer, *, is_end: bool) -> Delta:
        """Append a token and return the text that it adds, with the token counts so far.

        Text that may begin a stop string, and incomplete characters, are held back for a later
        delta. The last delta holds all remaining text, up to the earliest stop string. Its finish
        reason is `stop` after an end token or a stop string, else `length` at `max_new_tokens`.
        White space at the beginning of the answer is left out: where a prompt ends before a space,
        the first token begins with it. `is_finished` becomes True for the last delta and False for
        any other.

        Args:
            token_id: id of the token; special tokens add no text.
            tokenizer: the same in every call.
            is_end: whether the token ends the answer.
        """
        if self._detokenizer is None:
            self._detokenizer = IncrementalDetokenizer(tokenizer)
        self.token_ids.append(token_id)
        text = self._unsent_text + self._detokenizer.add(token_id)
        is_full = len(self.token_ids) >= self.max_new_tokens
        if is_end or is_full:
            text += self._detokenizer.flush()
        stop_positions = [position for s in self.stop_strings if (position := text.find(s)) >= 0]
        finish_reason = None
        end = len(text)
        if stop_positions or is_end:
            finish_reason = "stop"
            end = min(stop_positions, default=end)
        elif is_full:
            finish_reason = "length"
        else:
            end -= holdback_length(text, self.stop_strings)
        self._unsent_text = text[end:]
        self.is_finished = finish_reason is not None
        delta_text = text[:end] if self._has_text else text[:end].lstrip()
        self._has_text = self._has_text or bool(delta_text)
        return Delta(delta_text, finish_reason, self.prompt_tokens, len(self.token_ids))


StepOutputs = list[tuple[Request, Delta | Exception]]
"""Result of one token of every request; a request with an exception is finished."""


@dataclass(frozen=True, slots=True)
class _KVState:
    """Keys and values of all tokens but the last of B requests, left-padded to T columns."""

    past_key_values: DynamicCache
    attention_mask: Tensor
    """int64[B, T], 0 at padding."""
    last_positions: Tensor
    """int64[B], position id of the last token in the cache."""

    def concatenate(self, other: _KVState) -> _KVState:
        """Return a new state with the rows of `self`, then those of `other`.

        The narrower state is padded on the left. Neither of both is modified.
        """
        width = max(self.attention_mask.shape[1], other.attention_mask.shape[1])
        layers = []
        for a, b in zip(self.past_key_values.layers, other.past_key_values.layers, strict=True):
            keys = _concatenate_left_padded(a.keys, b.keys, width)
            layers.append((keys, _concatenate_left_padded(a.values, b.values, width)))
        masks = [
            F.pad(state.attention_mask, (width - state.attention_mask.shape[1], 0))
            for state in (self, other)
        ]
        positions = torch.cat([self.last_positions, other.last_positions])
        return _KVState(DynamicCache(layers), torch.cat(masks), positions)

    def select_rows(self, rows: list[int]) -> _KVState | None:
        """Return a new state of some rows, without leading columns that are padding in all of them.

        Args:
            rows: distinct indices in increasing order. For all rows `self` is returned, with all
                its columns, and for none None.
        """
        if len(rows) == len(self.attention_mask):
            return self
        if not rows:
            return None
        index = torch.tensor(rows, device=self.attention_mask.device)
        begin = int(self.attention_mask[index].argmax(1).min())
        cache = DynamicCache(
            (layer.keys[index, :, begin:], layer.values[index, :, begin:])
            for layer in self.past_key_values.layers
        )
        return _KVState(cache, self.attention_mask[index, begin:], self.last_positions[index])


def _concatenate_left_padded(first: Tensor, second: Tensor, width: int) -> Tensor:
    """Concatenate [A, H, T, d] and [B, H, U, d] to [A + B, H, width, d], zeros on the left."""
    padded = [F.pad(tensor, (0, 0, width - tensor.shape[2], 0)) for tensor in (first, second)]
    return torch.cat(padded)


class ContinuousBatcher:
    """Running batch of requests; no request waits for another one to finish.

    Attributes:
        requests: the requests in progress, one per row of the batch.
    """

    def __init__(self, backbone: Backbone, eos_token_ids: Sequence[int]):
        """Create a batcher without requests.

        Args:
            backbone: its generation config is read here, once, for `repetition_penalty` and
                `no_repeat_ngram_size`.
            eos_token_ids: token ids that end an answer; other special tokens are never generated.
        """
        self.backbone = backbone
        self.eos_token_ids = list(eos_token_ids)
        self.requests: list[Request] = []
        self._kv_state: _KVState | None = None
        self._suppressed_tokens = suppressed_tokens(backbone, eos_token_ids)
        self._logits_processors = LogitsProcessorList()
        config = backbone.model.generation_config
        self._repetition_penalty = config.repetition_penalty or 1.0
        if config.no_repeat_ngram_size:
            ngrams = NoRepeatNGramLogitsProcessor(config.no_repeat_ngram_size)
            self._logits_processors.append(ngrams)

    @torch.no_grad()
    def add_requests(
        self, prefill_inputs: PrefillInputs, requests: Sequence[Request]
    ) -> StepOutputs:
        """Prefill one prompt per request in one forward pass; return the first delta of each.

        Sets `prompt_tokens` of the requests and appends their first token. Those that are not
        finished by it join the batch: `self.requests` becomes a new list with them at the end. A
        request whose token cannot be sampled has its exception as output and is finished, with
        ModelError if its logits are not finite. If the forward pass or the concatenation fails,
        the exception propagates and the requests in progress stay as they were.

        Args:
            prefill_inputs: B prompts, at least one.
            requests: B new requests (ValueError for another number).
        """
        cache = DynamicCache()  # without the config: a sliding-window layer could not be padded
        mask = prefill_inputs.attention_mask
        positions = prefill_inputs.position_ids
        inputs = {**prefill_inputs.language_model_inputs, "position_ids": positions}
        logits = self._forward(cache, mask, inputs)
        for request, num_tokens in zip(requests, mask.sum(1).tolist(), strict=True):
            request.prompt_tokens = num_tokens
        outputs = self._sample_tokens(requests, logits)
        axes = (0, 2) if positions.ndim == 3 else 1  # the largest of three axes
        running = [i for i, request in enumerate(requests) if not request.is_finished]
        state = _KVState(cache, mask, positions.amax(axes)).select_rows(running)
        if state is not None:
            old_state = self._kv_state
            self._kv_state = state if old_state is None else old_state.concatenate(state)
            self.requests = [*self.requests, *(requests[i] for i in running)]
        return outputs

    @torch.no_grad()
    def step(self) -> StepOutputs:
        """Generate one token for every request; requests that are or become finished leave.

        An exception of the forward pass propagates, and the batcher is unusable after it: some
        layers of its cache may have grown.

        Returns:
            One output per request that was not finished before, in their order: a delta, or an
            exception as in `add_requests`. Empty, without a forward pass, if there is none.
        """
        self._remove_finished()
        if self._kv_state is None:
            return []
        cache = self._kv_state.past_key_values
        mask = F.pad(self._kv_state.attention_mask, (0, 1), value=1)
        positions = self._kv_state.last_positions + 1
        last_ids = [request.token_ids[-1:] for request in self.requests]
        token_ids = torch.tensor(last_ids, device=mask.device)  # [B, 1]
        inputs = {
            "inputs_embeds": self.backbone.token_embedding(token_ids),
            "position_ids": positions[:, None],
            **self.backbone.per_layer_inputs(token_ids),
        }
        logits = self._forward(cache, mask, inputs)
        self._kv_state = _KVState(cache, mask, positions)
        outputs = self._sample_tokens(self.requests, logits)
        self._remove_finished()
        return outputs

    def _remove_finished(self) -> None:
        """Drop finished requests from `requests`, and their keys and values."""
        running = [i for i, request in enumerate(self.requests) if not request.is_finished]
        if self._kv_state is not None:
            self._kv_state = self._kv_state.select_rows(running)
        self.requests = [self.requests[i] for i in running]

    def _forward(self, cache: DynamicCache, mask: Tensor, inputs: dict[str, Any]) -> Tensor:
        """Run the language model and return the logits float[B, V] of the last column.

        Appends keys and values to `cache`, in place. The backbone is in evaluation mode meanwhile;
        disabling gradients is left to the caller.

        Args:
            mask: int64[B, T] over the cache and the new columns.
            inputs: further arguments of the language model; its `attention_mask` replaces `mask`.
        """
        with eval_mode(self.backbone):
            inputs = {"attention_mask": mask, **inputs}  # a prompt may bring masks of its own
            outputs = self.backbone.language_model(**inputs, past_key_values=cache, use_cache=True)
            return self.backbone.compute_logits(outputs.last_hidden_state[:, -1])

    def _sample_tokens(self, requests: Sequence[Request], logits: Tensor) -> StepOutputs:
        """Sample and append the next token of every request from logits float[B, V].

        Returns one output per request, in order. An exception while one is sampled becomes its
        output and finishes it without a token, and so does a ModelError if its largest logit is
        not finite; the others go on. `logits` is not modified.
        """
        scores = logits.float()
        is_finite = scores.amax(1).isfinite()
        scores = scores.masked_fill(~is_finite[:, None], 0.0)
        scores[:, self._suppressed_tokens] = -torch.inf
        sampled: list[Tensor] = []
        errors: dict[Request, Exception] = {}
        for request, row in zip(requests, scores.split(1), strict=True):
            try:
                sampled.append(self._sample_token(request, row))
            except Exception as error:  # noqa: BLE001 - for example, a temperature that is a string
                errors[request] = error
                sampled.append(row.new_zeros(1, dtype=torch.long))
        for request, finite in zip(requests, is_finite.tolist(), strict=True):
            if not finite:
                errors[request] = ModelError(
                    "the model gave logits that are not finite",
                    fix="Its weights or its precision are broken",
                )
        outputs: StepOutputs = []
        for request, token_id in zip(requests, torch.cat(sampled).tolist(), strict=True):
            if request in errors:
                request.is_finished = True
                outputs.append((request, errors[request]))
                continue
            is_end = token_id in self.eos_token_ids
            tokenizer = self.backbone.tokenizer
            outputs.append((request, request.append_token(token_id, tokenizer, is_end=is_end)))
        return outputs

    def _sample_token(self, request: Request, scores: Tensor) -> Tensor:
        """Return the id of the request's next token, int64[1], which is not appended.

        The generation config's processors are applied, and the request's penalty in place of the
        config's. Before the first token, the end tokens are set to -inf in scores float32[1, V], in
        place. Raises as `Request.sample_token`, and ValueError for a penalty that is not positive.
        """
        if not request.token_ids:
            scores[:, self.eos_token_ids] = -torch.inf  # an answer has at least one token
        token_ids = torch.tensor([request.token_ids], dtype=torch.long, device=scores.device)
        penalty = request.sampling_params.repetition_penalty
        penalty = self._repetition_penalty if penalty is None else penalty
        if penalty != 1:
            scores = RepetitionPenaltyLogitsProcessor(float(penalty))(token_ids, scores)
        return request.sample_token(self._logits_processors(token_ids, scores))


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
