"""Captions against references, by a sentence encoder that has nothing to do with the model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vlduet.demo.encoders import fetch_minilm_folder
from vlduet.encoders.loading import open_encoder
from vlduet.eval.metrics import first_hit_ranks
from vlduet.harness.builtin import as_embedder


def nearness(captions: Sequence[str], references: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """A caption's cosine to its reference, and the reference's rank among all distinct ones: float[N], int64[N]."""
    judge = as_embedder(open_encoder(fetch_minilm_folder()))
    distinct = list(dict.fromkeys(references))
    own = np.array([[text == other for other in distinct] for text in references])
    asked, known = (
        judge([(text or "nothing",) for text in texts], True) for texts in (captions, distinct)
    )
    cosines = asked @ known.T
    return cosines[own], first_hit_ranks(cosines, own)
