"""Prompts as inputs of the language model, and the tokens that no answer may contain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlduet.errors import ModelError
from vlduet.model.backbone import Backbone

if TYPE_CHECKING:
    from vlduet.data.sequences import Sequence as TokenSequence
    from vlduet.model.duet import DuetModel


@dataclass(frozen=True, slots=True)
class PrefillInputs:
    """Left-padded prompts, ready for the first forward pass of the language model."""

    language_model_inputs: Mapping[str, Any]
    """`inputs_embeds`, float[B, T, D], and further keyword arguments (masks, DeepStack, ...)."""
    attention_mask: Tensor
    """int64[B, T], 0 at padding and 1 elsewhere."""
    position_ids: Tensor
    """int64[B, T], or int64[3, B, T] for multimodal RoPE."""
    eos_token_ids: list[int]
    """Token ids that end an answer."""


@torch.no_grad()
def build_prefill_inputs(
    model: DuetModel, sequences: list[TokenSequence], *, num_past: int = 0
) -> PrefillInputs:
    """Collate sequences whose end is to be continued into one left-padded batch, B = their number.

    Images run through the vision tower and the projector here, without gradients. `num_past` is the
    number of tokens in a key-value cache that the sequences follow. Raises ModelError as
    `require_lm_head`.
    """
    require_lm_head(model.backbone)
    batch = model.collate(sequences, padding_side="left")
    return PrefillInputs(
        language_model_inputs=model.language_model_inputs(batch, num_past=num_past),
        attention_mask=(batch.segment_ids > 0).long(),
        position_ids=batch.position_ids,
        eos_token_ids=model.renderer.eos_token_ids,
    )


def require_lm_head(backbone: Backbone) -> None:
    """Raise ModelError for a checkpoint without an LM head: it embeds and cannot generate."""
    if not backbone.has_lm_head:
        message = "the checkpoint was saved without its LM head: it embeds and cannot generate"
        fix = "Use one with lm_head.weight, or train with objectives.language=0"
        raise ModelError(message, place=backbone.folder, fix=fix)


def suppressed_tokens(backbone: Backbone, eos_token_ids: Sequence[int]) -> list[int]:
    """Return ids of all special tokens except those in `eos_token_ids`.

    An answer must not contain them: they would begin a turn or stand for an image.
    """
    # Soft-prompt tokens have ids beyond the LM head until they are merged into the embedding.
    vocab_size = len(backbone.lm_head.weight)
    return [
        token_id
        for token_id, token in backbone.tokenizer.added_tokens_decoder.items()
        if token.special and token_id < vocab_size and token_id not in eos_token_ids
    ]
