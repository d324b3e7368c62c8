"""Ranking of knowledge entries: only the first ones are sorted, and ties help nobody."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from vlduet.eval.benchmarks import runners


def test_partial_ranking_equals_sorting_all_entries() -> None:
    task: Any = SimpleNamespace(k=3, positives=((5, 11),))
    row = np.round(np.random.default_rng(0).random(400), 1).astype(np.float32)  # many ties
    row[7] = -np.inf
    allowed = [i for i in range(400) if i != 7]
    expected = sorted(allowed, key=lambda i: (-row[i], i in (5, 11), i))
    assert runners._best(row, task, 0) == expected[:10]


def test_excluded_entries_are_not_ranked() -> None:
    task: Any = SimpleNamespace(k=3, positives=((5, 11),))
    row = np.array([0.1, -np.inf, 0.3], dtype=np.float32)
    assert runners._best(row, task, 0) == [2, 0]
