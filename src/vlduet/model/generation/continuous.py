"""Answers under way in one batch: prompts join, and answers leave, between two tokens.

join   prompts are read in one forward, and have their first token; their keys and values are put beside those of the others,
       all padded on the left
step   one forward reads the last token of every answer, and each gets its next; those that end leave

Each token is what transformers' `generate` would choose, which keeps a batch as it is until its last answer ends. Of a
checkpoint's generation config `repetition_penalty` and `no_repeat_ngram_size` are followed.
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
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from vlduet.errors import ModelError
from vlduet.model.backbone import Backbone
from vlduet.model.generation.beam import (
    MIN_SAMPLING_TEMPERATURE,
    PrefillInputs,
    eval_mode,
    suppressed_tokens,
)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen."""

    temperature: float = 0.0
    """0 is greedy, and so is what is colder than `COLD`."""
    top_p: float = 1.0
    """Only the likeliest tokens are sampled from, as many as have this much probability together."""
    seed: int | None = None
    """None: whatever torch's own generator gives."""


@dataclass(frozen=True, slots=True)
class Delta:
    """What is new of an answer; may be empty."""

    text: str
    finish_reason: str | None = None
    """Of the last piece: `stop` (the model ended, or wrote a stop string) or `length`."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    """Written so far."""


class Request:
    """One answer under way.

    Args:
        longest: tokens that it may have.
        stop: strings before which it ends.

    Attributes:
        over: it leaves with the next step; set when it ends, or by whoever wants no more of it.
    """

    def __init__(
        self,
        max_new_tokens: int,
        *,
        sampling_params: SamplingParams | None = None,
        stop_strings: Sequence[str] = (),
    ):
        if max_new_tokens < 1:
            raise ValueError(f"an answer of {max_new_tokens} tokens")
        self.max_new_tokens, self.sampling_params, self.stop_strings = (
            max_new_tokens,
            sampling_params or SamplingParams(),
            stop_strings,
        )
        self.is_finished = False
        self.token_ids: list[int] = []
        self.prompt_tokens = self.num_streamed_chars = 0
        self.generator: torch.Generator | None = None

    def sample_token(self, scores: Tensor) -> Tensor:
        """Logits of what may follow, float32[1, V] -> int64[1], the next token."""
        if self.sampling_params.temperature < MIN_SAMPLING_TEMPERATURE:
            return scores.argmax(1)
        if self.sampling_params.seed is not None and self.generator is None:
            self.generator = torch.Generator(scores.device).manual_seed(self.sampling_params.seed)
        so_far = torch.empty(0)  # what shapes a distribution does not ask for it
        scores = TemperatureLogitsWarper(float(self.sampling_params.temperature))(so_far, scores)
        if self.sampling_params.top_p < 1:
            scores = TopPLogitsWarper(self.sampling_params.top_p)(so_far, scores)
        return torch.multinomial(scores.softmax(1), 1, generator=self.generator)[:, 0]

    def next_delta(self, text: str, *, ended: bool) -> Delta:
        """What is new, and may be shown, of the text so far. `ended`: its last token says that it is whole."""
        stops = [at for at in map(text.find, self.stop_strings) if at >= 0]
        if stops or ended:
            reason, until = "stop", min(stops, default=len(text))
        elif len(self.token_ids) >= self.max_new_tokens:
            reason, until = "length", len(text)
        else:
            reason, until = (
                None,
                max(
                    self.num_streamed_chars,
                    len(text) - max(holdback_lengths(text, self.stop_strings), default=0),
                ),
            )
        piece = Delta(
            text[self.num_streamed_chars : until], reason, self.prompt_tokens, len(self.token_ids)
        )
        self.num_streamed_chars, self.is_finished = until, reason is not None
        return piece


StepOutputs = list[tuple[Request, Delta | Exception]]
"""What rows have to tell of their next token. One with an error is over."""


@dataclass(frozen=True, slots=True)
class _KVState:
    """What the trunk has read, a row each, left-padded: all but the last token."""

    past_key_values: DynamicCache
    attention_mask: Tensor
    """int64[B, T], 0 on padding."""
    last_positions: Tensor
    """int64[B], the position of what was read last."""

    def concatenate(self, other: _KVState) -> _KVState:
        """The rows of both."""
        width = max(self.attention_mask.shape[1], other.attention_mask.shape[1])
        cache = DynamicCache(
            (
                _concatenate_left_padded(a.keys, b.keys, width),
                _concatenate_left_padded(a.values, b.values, width),
            )
            for a, b in zip(self.past_key_values.layers, other.past_key_values.layers, strict=True)
        )
        mask = torch.cat(
            [
                F.pad(each.attention_mask, (width - each.attention_mask.shape[1], 0))
                for each in (self, other)
            ]
        )
        return _KVState(cache, mask, torch.cat([self.last_positions, other.last_positions]))

    def select_rows(self, rows: list[int]) -> _KVState | None:
        """Some rows, without the columns that are padding for all of them."""
        if len(rows) == len(self.attention_mask):
            return self
        if not rows:
            return None
        at = torch.tensor(rows, device=self.attention_mask.device)
        begin = int(self.attention_mask[at].argmax(1).min())
        cache = DynamicCache(
            (layer.keys[at, :, begin:], layer.values[at, :, begin:])
            for layer in self.past_key_values.layers
        )
        return _KVState(cache, self.attention_mask[at, begin:], self.last_positions[at])


class ContinuousBatcher:
    """A batch of answers, of which none waits for another to end.

    Args:
        eos_ids: tokens that end an answer.

    Attributes:
        rows: the answers under way.
    """

    def __init__(self, backbone: Backbone, eos_token_ids: Sequence[int]):
        self.backbone, self.eos_token_ids = backbone, list(eos_token_ids)
        self.requests: list[Request] = []
        self._kv_state: _KVState | None = None
        self._forbidden = suppressed_tokens(backbone, eos_token_ids)
        self._habits = LogitsProcessorList()
        told = backbone.model.generation_config
        if told.repetition_penalty not in (None, 1):
            self._habits.append(RepetitionPenaltyLogitsProcessor(told.repetition_penalty))
        if told.no_repeat_ngram_size:
            self._habits.append(NoRepeatNGramLogitsProcessor(told.no_repeat_ngram_size))

    @torch.no_grad()
    def add_requests(
        self, prefill_inputs: PrefillInputs, requests: Sequence[Request]
    ) -> StepOutputs:
        """Read prompts, one for each row, which gets its first token. Where that fails, those under way are as they were."""
        cache = (
            DynamicCache()
        )  # not of the config: a layer that keeps its window alone could not be padded
        logits = self._through(
            cache,
            prefill_inputs.attention_mask,
            {**prefill_inputs.language_model_inputs, "position_ids": prefill_inputs.position_ids},
        )
        for row, tokens in zip(
            requests, prefill_inputs.attention_mask.sum(1).tolist(), strict=True
        ):
            row.prompt_tokens = tokens
        told = self._write(requests, logits)
        axes = (0, 2) if prefill_inputs.position_ids.ndim == 3 else 1  # the furthest of three axes
        going = [i for i, row in enumerate(requests) if not row.is_finished]
        read = _KVState(
            cache, prefill_inputs.attention_mask, prefill_inputs.position_ids.amax(axes)
        ).select_rows(going)
        if read is not None:
            self._kv_state = read if self._kv_state is None else self._kv_state.concatenate(read)
            self.requests = [*self.requests, *(requests[i] for i in going)]
        return told

    @torch.no_grad()
    def step(self) -> StepOutputs:
        """One more token for every row. Those that are over, before or then, are gone."""
        self._leave()
        if self._kv_state is None:
            return []
        cache, mask, last = (
            self._kv_state.past_key_values,
            F.pad(self._kv_state.attention_mask, (0, 1), value=1),
            self._kv_state.last_positions + 1,
        )
        ids = torch.tensor(
            [row.token_ids[-1:] for row in self.requests], device=mask.device
        )  # [B, 1]
        given = {"inputs_embeds": self.backbone.token_embedding(ids), "position_ids": last[:, None]}
        logits = self._through(cache, mask, given | self.backbone.per_layer_inputs(ids))
        self._kv_state = _KVState(cache, mask, last)
        told = self._write(self.requests, logits)
        self._leave()
        return told

    def _leave(self) -> None:
        going = [i for i, row in enumerate(self.requests) if not row.is_finished]
        self._kv_state = self._kv_state and self._kv_state.select_rows(going)
        self.requests = [self.requests[i] for i in going]

    def _through(self, cache: DynamicCache, mask: Tensor, given: dict[str, Any]) -> Tensor:
        """Logits after the last column, float[B, V]; the cache grows by what is read."""
        with eval_mode(self.backbone):
            given = {"attention_mask": mask, **given}  # a prompt may bring its own
            out = self.backbone.language_model(**given, past_key_values=cache, use_cache=True)
            return self.backbone.compute_logits(out.last_hidden_state[:, -1])

    def _write(self, rows: Sequence[Request], logits: Tensor) -> StepOutputs:
        """The next token of every row, by float[B, V]; whatever goes wrong with one is told of it."""
        scores = logits.float()
        sound = scores.amax(1).isfinite()
        scores = scores.masked_fill(~sound[:, None], 0.0)
        scores[:, self._forbidden] = -torch.inf
        chosen, wrong = [], dict[Request, Exception]()
        for row, offered in zip(rows, scores.split(1), strict=True):
            try:
                if not row.token_ids:
                    offered[:, self.eos_token_ids] = -torch.inf  # an answer has at least one token
                offered = self._habits(
                    torch.tensor([row.token_ids], dtype=torch.long, device=offered.device), offered
                )
                chosen.append(row.sample_token(offered))
            except Exception as error:  # noqa: BLE001 - such as a temperature that is no number: the others go on
                wrong[row] = error
                chosen.append(offered.new_zeros(1, dtype=torch.long))
        told: StepOutputs = []
        for row, token, fine in zip(rows, torch.cat(chosen).tolist(), sound.tolist(), strict=True):
            if not fine:
                fix = "Its weights or its precision are broken"
                wrong[row] = ModelError("the model gave logits that are not finite", fix=fix)
            if row in wrong:
                row.is_finished = True
                told.append((row, wrong[row]))
                continue
            row.token_ids.append(token)
            text = self.backbone.tokenizer.decode(row.token_ids, skip_special_tokens=True)
            assert isinstance(text, str)
            told.append((row, row.next_delta(text, ended=token in self.eos_token_ids)))
        return told


def stream_text(
    backbone: Backbone, start: PrefillInputs, max_new_tokens: int, *, temperature: float = 0.0
) -> Iterator[str]:
    """Continue one prompt, piece by piece. Raises ModelError for logits that are not finite."""
    decoder = ContinuousBatcher(backbone, start.eos_token_ids)
    told = decoder.add_requests(
        start, [Request(max_new_tokens, sampling_params=SamplingParams(temperature))]
    )
    while told:
        for _, piece in told:
            if isinstance(piece, Exception):
                raise piece
            if piece.text:
                yield piece.text
        told = decoder.step()


def holdback_lengths(text: str, stop_strings: Sequence[str]) -> Iterator[int]:
    """Numbers of letters at the end that are not told yet: half a character, a blank that some tokenizers take back before a
    comma, and what may become a stop string, with or without these."""
    settled = text.rstrip(" \N{REPLACEMENT CHARACTER}")
    loose = len(text) - len(settled)
    yield loose
    for each in stop_strings:
        yield from (n for n in range(1, min(len(each), len(text) + 1)) if text.endswith(each[:n]))
        yield from (
            loose + n
            for n in range(1, min(len(each), len(settled) + 1))
            if settled.endswith(each[:n])
        )


def _concatenate_left_padded(a: Tensor, b: Tensor, width: int) -> Tensor:
    """[A, H, T, d] and [B, H, U, d] -> [A + B, H, width, d], padded on the left."""
    return torch.cat([F.pad(each, (0, 0, width - each.shape[2], 0)) for each in (a, b)])
