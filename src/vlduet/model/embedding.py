"""Embedding of texts, images and mixtures by a `DuetModel`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from vlduet.data.batches import FORWARD_MAX_TOKENS, PACKED_ROW_TOKENS, group_by_length
from vlduet.data.records import Part, Parts, as_parts
from vlduet.data.sequences import Sequence as TokenSequence
from vlduet.model.backbone import eval_mode
from vlduet.model.limits import TruncationCallback, too_long_error

if TYPE_CHECKING:
    from vlduet.model.duet import DuetModel

Embeddable = Part | Parts
"""A content to embed: a text, an image, or a tuple of both in order."""
ProgressCallback = Callable[[int], None] | None
"""Function that receives the number of items embedded since its last call; None reports nothing."""
MAX_DECODED_ITEMS = 512
"""Number of items that are rendered at once; bounds the decoded images in memory."""


@torch.no_grad()
def encode(
    model: DuetModel,
    items: Sequence[Embeddable],
    *,
    is_query: bool = False,
    batch_tokens: int = FORWARD_MAX_TOKENS,
    max_tokens: int | None = None,
    progress: ProgressCallback = None,
    on_truncate: TruncationCallback | None = None,
) -> np.ndarray:
    """Return the embeddings of items, float32[N, E], unit length, in their order.

    The model is in evaluation mode meanwhile; computed vision features are stored in its cache.
    Nothing is skipped: one unusable item raises.

    Args:
        items: each a text, an `ImageRef`, or a tuple of both; without items the result has no rows.
        is_query: embed the items as queries, whose texts get `prompts.query` as a prefix.
        batch_tokens: bound on the padded tokens of a forward pass; items are grouped by length, and
            short ones share packed rows.
        max_tokens: longest sequence; None is the model's own limit.
        progress: called after every forward pass with the number of items embedded by it.
        on_truncate: allows texts to be cut to `max_tokens`, and is called for every item of which
            one is cut. None refuses such items.

    Raises:
        DataError: an item is empty or blank, longer than `max_tokens` without `on_truncate`, or
            longer without any text to cut.
        ImageError: an image cannot be decoded.
        ConfigError: the prompts need a chat template that the checkpoint does not have.
    """
    renderer = model.renderer.with_options(max_tokens=max_tokens)
    embeddings = np.empty((len(items), model.dim), dtype=np.float32)
    with eval_mode(model):
        for begin in range(0, len(items), MAX_DECODED_ITEMS):
            sequences = []
            for row, item in enumerate(items[begin : begin + MAX_DECODED_ITEMS], begin):
                # The anchor's record name carries the row of the result through packing.
                sequence = renderer.render_embedding(
                    as_parts(item), is_query=is_query, record_name=str(row)
                )
                _report_truncation(sequence, row, on_truncate)
                sequences.append(sequence)
            for group in group_by_length([len(s) for s in sequences], batch_tokens):
                longest = len(sequences[group[-1]])
                batch = model.collate(
                    [sequences[i] for i in group], pack_to=max(PACKED_ROW_TOKENS, longest)
                )
                rows = [int(anchor.record_name) for anchor in batch.anchors]
                embeddings[rows] = model(batch).embeddings.float().cpu().numpy()
                if progress:
                    progress(len(group))
    return embeddings


def _report_truncation(
    sequence: TokenSequence, position: int, on_truncate: TruncationCallback | None
) -> None:
    """Call `on_truncate` if a text of a sequence was cut; raise DataError if that is None."""
    if sequence.num_cut_tokens:
        num_tokens = len(sequence) + sequence.num_cut_tokens
        if on_truncate is None:
            raise too_long_error(num_tokens, len(sequence))
        on_truncate(position, num_tokens)
