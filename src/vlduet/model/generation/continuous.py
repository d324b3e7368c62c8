"""Continuous batching: requests enter and leave the batch between two tokens.

1. `ContinuousBatcher.add_requests` prefills prompts in one forward pass and samples their first
   tokens. Their keys and values are concatenated with those of the running requests, left-padded.
2. `ContinuousBatcher.step` runs the last token of every request through the language model in one
   forward pass and samples the next one. Finished requests leave the batch.
3. A request with a `SliceReader` pauses at the end of every sentence, outside the batch, until
   `resume` goes on or `extend` first reads further tokens, such as those of an image.

Each token is the one that transformers' `generate` would choose for the prompt alone. Of a
checkpoint's generation config, `repetition_penalty` and `no_repeat_ngram_size` are applied.
"""

from __future__ import annotations

from collections.abc import Sequence
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
from vlduet.model.generation.kv_state import KVState
from vlduet.model.generation.slices import SliceEnd, SliceReader
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
        read_span: the hidden states that the next forward pass reads for a `SliceEnd`, their mean:
            from so many tokens before the end of its tokens to so many. By default the last one.
    """

    def __init__(
        self,
        max_new_tokens: int,
        *,
        sampling_params: SamplingParams | None = None,
        stop_strings: Sequence[str] = (),
        slices: SliceReader | None = None,
        generates: bool = True,
    ):
        """Create a request without tokens, for one `ContinuousBatcher.add_requests`.

        Args:
            max_new_tokens: largest number of tokens of the answer.
            sampling_params: default is greedy. They are not checked before a token is sampled.
            stop_strings: non-empty; the answer ends before the first occurrence of any of them.
            slices: a new reader pauses the request at the end of every slice.
            generates: False samples no token: the request pauses after every forward pass.

        Raises:
            ValueError: `max_new_tokens` is less than 1.
        """
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
        self.max_new_tokens = max_new_tokens
        self.sampling_params = sampling_params or SamplingParams()
        self.stop_strings = stop_strings
        self.slices = slices
        self.generates = generates
        self.read_span = (1, 0)
        self.is_finished = False
        self.token_ids: list[int] = []
        self.prompt_tokens = 0
        self._unsent_text = ""  # held back, since it may begin a stop string
        self._has_text = False  # something of the answer was returned
        self._detokenizer: IncrementalDetokenizer | None = None
        # Token that was sampled at the end of a slice, its text, and whether it ends the answer.
        self._next_token: tuple[int, str, bool] | None = None
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
        return self._append(token_id, self._decode(token_id, tokenizer), is_end=is_end)

    def add_sampled_token(
        self, token_id: int, tokenizer: Tokenizer, *, is_end: bool, state: Tensor
    ) -> Delta | SliceEnd:
        """Append a token as `append_token` does, unless a slice ends before it.

        Then the end of the slice is returned, and the token waits for `append_next_token` or
        `drop_next_token`. `state` is the hidden state float[D] that the token was sampled from.
        """
        text = self._decode(token_id, tokenizer)
        if self.slices is not None:
            slice_end = self.slices.find_end(state, text, is_end=is_end)
            if slice_end is not None:
                self._next_token = token_id, text, is_end
                return slice_end
        return self._append(token_id, text, is_end=is_end)

    def append_next_token(self) -> Delta:
        """Append the token that waits since the end of a slice; see `append_token`."""
        assert self._next_token is not None, "no token waits"
        token_id, text, is_end = self._next_token
        self._next_token = None
        return self._append(token_id, text, is_end=is_end)

    def drop_next_token(self) -> None:
        """Forget the token that waits: what is read next comes before the following text."""
        self._next_token = None
        self._detokenizer = None
        if self.slices is not None:
            self.slices.restart()

    def take_unsent_text(self) -> str:
        """Return, and forget, the text that is held back since it may begin a stop string."""
        text, self._unsent_text = self._unsent_text, ""
        return text

    def _decode(self, token_id: int, tokenizer: Tokenizer) -> str:
        """Return the text that a token completes; to call once for every token."""
        if self._detokenizer is None:
            self._detokenizer = IncrementalDetokenizer(tokenizer)
        return self._detokenizer.add(token_id)

    def _append(self, token_id: int, text: str, *, is_end: bool) -> Delta:
        """Append a token with its decoded text; the result is that of `append_token`."""
        self.token_ids.append(token_id)
        if self.slices is not None:
            self.slices.add_text(text)
        text = self._unsent_text + text
        is_full = len(self.token_ids) >= self.max_new_tokens
        if (is_end or is_full) and self._detokenizer is not None:
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


StepOutputs = list[tuple[Request, Delta | SliceEnd | Exception]]
"""Result of one token of every request. A request with an exception is finished, and one with the
end of a slice pauses."""


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
        self._kv_state: KVState | None = None
        # Keys and values of the requests that pause, without padding.
        self._paused: dict[Request, KVState] = {}
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
        hidden, logits = self._forward(cache, mask, inputs)
        for request, num_tokens in zip(requests, mask.sum(1).tolist(), strict=True):
            request.prompt_tokens = num_tokens
        outputs = self._sample_tokens(requests, hidden, logits)
        self._join(requests, KVState(cache, mask, _last_positions(positions)), outputs)
        return outputs

    @torch.no_grad()
    def resume(self, request: Request) -> StepOutputs:
        """Append the token that a paused request has sampled, without a forward pass.

        The request joins the batch again unless the token finishes it. Its output is a delta.
        """
        state = self._paused.pop(request)
        outputs: StepOutputs = [(request, request.append_next_token())]
        self._join([request], state, outputs)
        return outputs

    @torch.no_grad()
    def extend(self, request: Request, inputs: PrefillInputs) -> StepOutputs:
        """Read further tokens after those of a paused request, and return its next output.

        The token that it has sampled is dropped, and the next one follows from what was read. An
        exception propagates, and the request is then no longer known.

        Args:
            request: a paused request.
            inputs: one row of further tokens with positions from 0, made with
                `num_past=count_cached_tokens(request)`.
        """
        state = self._paused.pop(request)
        request.drop_next_token()
        mask = torch.cat([state.attention_mask, inputs.attention_mask], 1)
        positions = inputs.position_ids + state.last_positions + 1
        cache = state.past_key_values
        lm_inputs = {**inputs.language_model_inputs, "position_ids": positions}
        hidden, logits = self._forward(cache, mask, lm_inputs)
        outputs = self._sample_tokens([request], hidden, logits)
        self._join([request], KVState(cache, mask, _last_positions(positions)), outputs)
        return outputs

    def count_cached_tokens(self, request: Request) -> int:
        """Return the number of tokens that a paused request has read, those of images included."""
        return self._paused[request].attention_mask.shape[1]

    def _join(self, requests: Sequence[Request], state: KVState, outputs: StepOutputs) -> None:
        """Add requests that go on to the batch, and keep those that pause outside of it.

        `state` has one row for each of the requests, and `outputs` the output of each.
        """
        running = self._set_aside(requests, state, outputs)
        selected = state.select_rows(running)
        if selected is not None:
            old_state = self._kv_state
            self._kv_state = selected if old_state is None else old_state.concatenate(selected)
            self.requests = [*self.requests, *(requests[i] for i in running)]

    def _set_aside(
        self, requests: Sequence[Request], state: KVState, outputs: StepOutputs
    ) -> list[int]:
        """Keep the keys and values of requests that pause; return the rows of those that go on."""
        running = []
        for i, (request, (_, output)) in enumerate(zip(requests, outputs, strict=True)):
            if isinstance(output, SliceEnd):
                self._paused[request] = state.copy_rows([i])
            elif not request.is_finished:
                running.append(i)
        return running

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
        hidden, logits = self._forward(cache, mask, inputs)
        state = KVState(cache, mask, positions)
        outputs = self._sample_tokens(self.requests, hidden, logits)
        running = self._set_aside(self.requests, state, outputs)
        self._kv_state = state.select_rows(running)
        self.requests = [self.requests[i] for i in running]
        return outputs

    def _remove_finished(self) -> None:
        """Drop finished requests, and their keys and values."""
        for request in [request for request in self._paused if request.is_finished]:
            del self._paused[request]
        running = [i for i, request in enumerate(self.requests) if not request.is_finished]
        if self._kv_state is not None:
            self._kv_state = self._kv_state.select_rows(running)
        self.requests = [self.requests[i] for i in running]

    def _forward(
        self, cache: DynamicCache, mask: Tensor, inputs: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Run the language model; return hidden states float[B, T, D] and logits float[B, V].

        The hidden states are those of the new columns, and the logits those of the last of them.

        Appends keys and values to `cache`, in place. The backbone is in evaluation mode meanwhile;
        disabling gradients is left to the caller.

        Args:
            mask: int64[B, T] over the cache and the new columns.
            inputs: further arguments of the language model; its `attention_mask` replaces `mask`.
        """
        with eval_mode(self.backbone):
            inputs = {"attention_mask": mask, **inputs}  # a prompt may bring masks of its own
            outputs = self.backbone.language_model(**inputs, past_key_values=cache, use_cache=True)
            hidden = outputs.last_hidden_state
            return hidden, self.backbone.compute_logits(hidden[:, -1])

    def _sample_tokens(
        self, requests: Sequence[Request], hidden: Tensor, logits: Tensor
    ) -> StepOutputs:
        """Sample and append the next token of every request from the results of `_forward`.

        Returns one output per request, in order: the end of a slice where the request pauses. An
        exception while one is sampled becomes its output and finishes it without a token, and so
        does a ModelError if its largest logit is not finite; the others go on. `logits` is not
        modified.
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
        token_ids = torch.cat(sampled).tolist()
        for request, token_id, states in zip(requests, token_ids, hidden, strict=True):
            if request in errors:
                request.is_finished = True
                outputs.append((request, errors[request]))
                continue
            state = _read_state(states, request.read_span)  # [D]
            request.read_span = (1, 0)
            if not request.generates:
                outputs.append((request, SliceEnd(state)))
                continue
            is_end = token_id in self.eos_token_ids
            output = request.add_sampled_token(
                token_id, self.backbone.tokenizer, is_end=is_end, state=state
            )
            outputs.append((request, output))
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


def _last_positions(position_ids: Tensor) -> Tensor:
    """Return int64[B], the largest position id of every row of int64[B, T] or int64[3, B, T]."""
    return position_ids.amax((0, 2) if position_ids.ndim == 3 else 1)


def _read_state(states: Tensor, read_span: tuple[int, int]) -> Tensor:
    """Return the mean float[D] of states float[T, D] in a `Request.read_span`."""
    first, last = read_span
    length = len(states)
    if first - last == 1:
        return states[length - first]
    # A mean in half precision would lose digits.
    return states[length - first : length - last].float().mean(0)
