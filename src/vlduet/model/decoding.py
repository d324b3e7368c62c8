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
from vlduet.model.backbones import Backbone
from vlduet.model.generation import COLD, Start, evaluating, forbidden


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen."""

    temperature: float = 0.0
    """0 is greedy, and so is what is colder than `COLD`."""
    top_p: float = 1.0
    """Only the likeliest tokens are sampled from, as many as have this much probability together."""
    seed: int | None = None
    """None: whatever torch's own generator gives."""


@dataclass(frozen=True, slots=True)
class Piece:
    """What is new of an answer; may be empty."""

    text: str
    reason: str | None = None
    """Of the last piece: `stop` (the model ended, or wrote a stop string) or `length`."""
    prompt_tokens: int = 0
    tokens: int = 0
    """Written so far."""


class Continuation:
    """One answer under way.

    Args:
        longest: tokens that it may have.
        stop: strings before which it ends.

    Attributes:
        over: it leaves with the next step; set when it ends, or by whoever wants no more of it.
    """

    def __init__(self, longest: int, *, sampling: Sampling | None = None, stop: Sequence[str] = ()):
        if longest < 1:
            raise ValueError(f"an answer of {longest} tokens")
        self.longest, self.sampling, self.stop = longest, sampling or Sampling(), stop
        self.over = False
        self.ids: list[int] = []
        self.prompt_tokens = self.shown = 0
        self.generator: torch.Generator | None = None

    def choose(self, scores: Tensor) -> Tensor:
        """Logits of what may follow, float32[1, V] -> int64[1], the next token."""
        if self.sampling.temperature < COLD:
            return scores.argmax(1)
        if self.sampling.seed is not None and self.generator is None:
            self.generator = torch.Generator(scores.device).manual_seed(self.sampling.seed)
        so_far = torch.empty(0)  # what shapes a distribution does not ask for it
        scores = TemperatureLogitsWarper(float(self.sampling.temperature))(so_far, scores)
        if self.sampling.top_p < 1:
            scores = TopPLogitsWarper(self.sampling.top_p)(so_far, scores)
        return torch.multinomial(scores.softmax(1), 1, generator=self.generator)[:, 0]

    def written(self, text: str, *, ended: bool) -> Piece:
        """What is new, and may be shown, of the text so far. `ended`: its last token says that it is whole."""
        stops = [at for at in map(text.find, self.stop) if at >= 0]
        if stops or ended:
            reason, until = "stop", min(stops, default=len(text))
        elif len(self.ids) >= self.longest:
            reason, until = "length", len(text)
        else:
            reason, until = None, max(self.shown, len(text) - max(held(text, self.stop), default=0))
        piece = Piece(text[self.shown : until], reason, self.prompt_tokens, len(self.ids))
        self.shown, self.over = until, reason is not None
        return piece


Told = list[tuple[Continuation, Piece | Exception]]
"""What rows have to tell of their next token. One with an error is over."""


@dataclass(frozen=True, slots=True)
class _Read:
    """What the trunk has read, a row each, left-padded: all but the last token."""

    cache: DynamicCache
    mask: Tensor
    """int64[B, T], 0 on padding."""
    last: Tensor
    """int64[B], the position of what was read last."""

    def beside(self, other: _Read) -> _Read:
        """The rows of both."""
        width = max(self.mask.shape[1], other.mask.shape[1])
        cache = DynamicCache(
            (_stacked(a.keys, b.keys, width), _stacked(a.values, b.values, width))
            for a, b in zip(self.cache.layers, other.cache.layers, strict=True)
        )
        mask = torch.cat([F.pad(each.mask, (width - each.mask.shape[1], 0)) for each in (self, other)])
        return _Read(cache, mask, torch.cat([self.last, other.last]))

    def of(self, rows: list[int]) -> _Read | None:
        """Some rows, without the columns that are padding for all of them."""
        if len(rows) == len(self.mask):
            return self
        if not rows:
            return None
        at = torch.tensor(rows, device=self.mask.device)
        begin = int(self.mask[at].argmax(1).min())
        cache = DynamicCache((layer.keys[at, :, begin:], layer.values[at, :, begin:]) for layer in self.cache.layers)
        return _Read(cache, self.mask[at, begin:], self.last[at])


class Decoder:
    """A batch of answers, of which none waits for another to end.

    Args:
        eos_ids: tokens that end an answer.

    Attributes:
        rows: the answers under way.
    """

    def __init__(self, backbone: Backbone, eos_ids: Sequence[int]):
        self.backbone, self.eos_ids = backbone, list(eos_ids)
        self.rows: list[Continuation] = []
        self._read: _Read | None = None
        self._forbidden = forbidden(backbone, eos_ids)
        self._habits = LogitsProcessorList()
        told = backbone.model.generation_config
        if told.repetition_penalty not in (None, 1):
            self._habits.append(RepetitionPenaltyLogitsProcessor(told.repetition_penalty))
        if told.no_repeat_ngram_size:
            self._habits.append(NoRepeatNGramLogitsProcessor(told.no_repeat_ngram_size))

    @torch.no_grad()
    def join(self, start: Start, rows: Sequence[Continuation]) -> Told:
        """Read prompts, one for each row, which gets its first token. Where that fails, those under way are as they were."""
        cache = DynamicCache()  # not of the config: a layer that keeps its window alone could not be padded
        logits = self._through(cache, start.mask, {**start.inputs, "position_ids": start.positions})
        for row, tokens in zip(rows, start.mask.sum(1).tolist(), strict=True):
            row.prompt_tokens = tokens
        told = self._write(rows, logits)
        axes = (0, 2) if start.positions.ndim == 3 else 1  # the furthest of three axes
        going = [i for i, row in enumerate(rows) if not row.over]
        read = _Read(cache, start.mask, start.positions.amax(axes)).of(going)
        if read is not None:
            self._read = read if self._read is None else self._read.beside(read)
            self.rows = [*self.rows, *(rows[i] for i in going)]
        return told

    @torch.no_grad()
    def step(self) -> Told:
        """One more token for every row. Those that are over, before or then, are gone."""
        self._leave()
        if self._read is None:
            return []
        cache, mask, last = self._read.cache, F.pad(self._read.mask, (0, 1), value=1), self._read.last + 1
        ids = torch.tensor([row.ids[-1:] for row in self.rows], device=mask.device)  # [B, 1]
        given = {"inputs_embeds": self.backbone.embedding(ids), "position_ids": last[:, None]}
        logits = self._through(cache, mask, given | self.backbone.words(ids))
        self._read = _Read(cache, mask, last)
        told = self._write(self.rows, logits)
        self._leave()
        return told

    def _leave(self) -> None:
        going = [i for i, row in enumerate(self.rows) if not row.over]
        self._read = self._read and self._read.of(going)
        self.rows = [self.rows[i] for i in going]

    def _through(self, cache: DynamicCache, mask: Tensor, given: dict[str, Any]) -> Tensor:
        """Logits after the last column, float[B, V]; the cache grows by what is read."""
        with evaluating(self.backbone):
            given = {"attention_mask": mask, **given}  # a prompt may bring its own
            out = self.backbone.trunk(**given, past_key_values=cache, use_cache=True)
            return self.backbone.logits(out.last_hidden_state[:, -1])

    def _write(self, rows: Sequence[Continuation], logits: Tensor) -> Told:
        """The next token of every row, by float[B, V]; whatever goes wrong with one is told of it."""
        scores = logits.float()
        sound = scores.amax(1).isfinite()
        scores = scores.masked_fill(~sound[:, None], 0.0)
        scores[:, self._forbidden] = -torch.inf
        chosen, wrong = [], dict[Continuation, Exception]()
        for row, offered in zip(rows, scores.split(1), strict=True):
            try:
                if not row.ids:
                    offered[:, self.eos_ids] = -torch.inf  # an answer has at least one token
                offered = self._habits(torch.tensor([row.ids], dtype=torch.long, device=offered.device), offered)
                chosen.append(row.choose(offered))
            except Exception as error:  # noqa: BLE001 - such as a temperature that is no number: the others go on
                wrong[row] = error
                chosen.append(offered.new_zeros(1, dtype=torch.long))
        told: Told = []
        for row, token, fine in zip(rows, torch.cat(chosen).tolist(), sound.tolist(), strict=True):
            if not fine:
                fix = "Its weights or its precision are broken"
                wrong[row] = ModelError("the model gave logits that are not finite", fix=fix)
            if row in wrong:
                row.over = True
                told.append((row, wrong[row]))
                continue
            row.ids.append(token)
            text = self.backbone.tokenizer.decode(row.ids, skip_special_tokens=True)
            assert isinstance(text, str)
            told.append((row, row.written(text, ended=token in self.eos_ids)))
        return told


def stream(backbone: Backbone, start: Start, max_new_tokens: int, *, temperature: float = 0.0) -> Iterator[str]:
    """Continue one prompt, piece by piece. Raises ModelError for logits that are not finite."""
    decoder = Decoder(backbone, start.eos_ids)
    told = decoder.join(start, [Continuation(max_new_tokens, sampling=Sampling(temperature))])
    while told:
        for _, piece in told:
            if isinstance(piece, Exception):
                raise piece
            if piece.text:
                yield piece.text
        told = decoder.step()


def held(text: str, stop: Sequence[str]) -> Iterator[int]:
    """Numbers of letters at the end that are not told yet: half a character, a blank that some tokenizers take back before a
    comma, and what may become a stop string, with or without these."""
    settled = text.rstrip(" \N{REPLACEMENT CHARACTER}")
    loose = len(text) - len(settled)
    yield loose
    for each in stop:
        yield from (n for n in range(1, min(len(each), len(text) + 1)) if text.endswith(each[:n]))
        yield from (loose + n for n in range(1, min(len(each), len(settled) + 1)) if settled.endswith(each[:n]))


def _stacked(a: Tensor, b: Tensor, width: int) -> Tensor:
    """[A, H, T, d] and [B, H, U, d] -> [A + B, H, width, d], padded on the left."""
    return torch.cat([F.pad(each, (0, 0, width - each.shape[2], 0)) for each in (a, b)])
