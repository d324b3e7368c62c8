"""Compare captions with references by a sentence encoder that is independent of the model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vlduet.demo.encoders import fetch_minilm_folder
from vlduet.encoders.loading import open_encoder
from vlduet.eval.metrics import first_hit_ranks
from vlduet.harness.builtin import as_embedder

EMPTY_CAPTION = "nothing"
"""Text that is embedded for an empty caption."""


def compare_captions(
    captions: Sequence[str], references: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Compare every caption with its reference, by all-MiniLM-L6-v2.

    Returns: float[N], the cosine of each caption and its reference; int64[N], the rank of that
        reference, from 1, among all distinct references by their cosine to the caption.
    """
    embed = as_embedder(open_encoder(fetch_minilm_folder()))
    distinct = list(dict.fromkeys(references))
    is_reference = np.zeros((len(references), len(distinct)), dtype=bool)
    for row, reference in enumerate(references):
        is_reference[row, distinct.index(reference)] = True
    caption_vectors = embed([(caption or EMPTY_CAPTION,) for caption in captions], True)
    reference_vectors = embed([(reference or EMPTY_CAPTION,) for reference in distinct], True)
    cosines = caption_vectors @ reference_vectors.T
    return cosines[is_reference], first_hit_ranks(cosines, is_reference)
