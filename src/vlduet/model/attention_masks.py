"""Attention masks of language models that do not build the right ones themselves.

These have layers with a sliding window, or images whose tokens see each other both ways (Gemma).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from vlduet.data.batches import Batch


def build_attention_masks(
    batch: Batch, kinds: Mapping[str, bool], *, window: int, num_past: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return a mask for each type of layer, float[B, 1, T, P + T].

    It is 0 where attention is allowed and the lowest number elsewhere: `block_causal_mask` of the
    batch, in sliding layers within the window.

    Args:
        batch: B rows of T tokens.
        kinds: {layer type: whether the tokens of one image attend to each other both ways}.
        window: number of positions that a sliding layer sees.
        num_past: P, number of tokens before those of each row in a key-value cache. All tokens of
            the row attend to them.
        dtype: dtype of the masks.
    """
    positions = batch.position_ids + num_past
    past = torch.arange(num_past, device=positions.device).expand(len(positions), -1)
    key_positions = torch.cat([past, positions], 1)
    in_window = positions[:, None, :, None] - key_positions[:, None, None, :] < window
    zero = torch.zeros((), dtype=dtype, device=positions.device)
    lowest = torch.finfo(dtype).min
    masks = {}
    for layer_type, is_bidirectional in kinds.items():
        allowed = batch.block_causal_mask(bidirectional_images=is_bidirectional)
        allowed = F.pad(allowed, (num_past, 0), value=True)
        if layer_type == "sliding_attention":
            allowed = allowed & in_window
        masks[layer_type] = torch.where(allowed, zero, lowest)
    return masks
