"""Keys and values of running requests, as one left-padded batch that gains and loses rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache


@dataclass(frozen=True, slots=True)
class KVState:
    """Keys and values of all tokens but the last of B requests, left-padded to T columns."""

    past_key_values: DynamicCache
    attention_mask: Tensor
    """int64[B, T], 0 at padding."""
    last_positions: Tensor
    """int64[B], position id of the last token in the cache."""

    def concatenate(self, other: KVState) -> KVState:
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
        return KVState(DynamicCache(layers), torch.cat(masks), positions)

    def select_rows(self, rows: list[int]) -> KVState | None:
        """Return a new state of some rows, without leading columns that are padding in all of them.

        Args:
            rows: distinct indices in increasing order. For all rows `self` is returned, with all
                its columns, and for none None.
        """
        if len(rows) == len(self.attention_mask):
            return self
        return self.copy_rows(rows) if rows else None

    def copy_rows(self, rows: list[int]) -> KVState:
        """Return a new state of at least one row, without columns that are padding in all of them.

        The keys and values are copied: they do not keep those of the other rows in memory.
        """
        index = torch.tensor(rows, device=self.attention_mask.device)
        begin = int(self.attention_mask[index].argmax(1).min())
        cache = DynamicCache(
            (layer.keys[index, :, begin:], layer.values[index, :, begin:])
            for layer in self.past_key_values.layers
        )
        return KVState(cache, self.attention_mask[index, begin:], self.last_positions[index])


def _concatenate_left_padded(first: Tensor, second: Tensor, width: int) -> Tensor:
    """Concatenate [A, H, T, d] and [B, H, U, d] to [A + B, H, width, d], zeros on the left."""
    padded = [F.pad(tensor, (0, 0, width - tensor.shape[2], 0)) for tensor in (first, second)]
    return torch.cat(padded)
