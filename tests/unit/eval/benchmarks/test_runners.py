"""Runners: ranks with ties, baselines of multiple choice, ranking of knowledge entries."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlduet.eval.benchmarks.runners import (
    best_positive_ranks,
    invert_positives,
    rank_entries,
    run_choices,
)
from vlduet.eval.benchmarks.tasks import ChoiceTask, Question


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.integers(2, 12), st.integers(2, 20))
def test_ranks_equal_their_definition(seed: int, num_queries: int, num_documents: int) -> None:
    random = np.random.default_rng(seed)
    # Coarse values give many ties.
    queries = random.integers(1, 3, (num_queries, 3)).astype(np.float32)
    documents = random.integers(1, 3, (num_documents, 3)).astype(np.float32)
    positives = []
    excluded = []
    for _ in queries:
        indices = random.choice(num_documents, random.integers(1, 3), replace=False)
        positives.append(tuple(indices))
        excluded.append(tuple(set(range(0, num_documents, 3)) - set(indices)))
    ranks, _ = best_positive_ranks(queries, documents, positives, excluded=excluded)
    lengths = np.linalg.norm(documents, axis=1)
    for n, indices in enumerate(positives):
        cosines = (queries[n] @ documents.T) / np.linalg.norm(queries[n]) / lengths
        best = max(cosines[list(indices)])
        negatives = set(range(num_documents)) - set(indices) - set(excluded[n])
        assert ranks[n] == 1 + sum(cosines[i] >= best - 1e-6 for i in negatives)


def test_ranks_equal_success_of_trec_eval() -> None:
    trec = pytest.importorskip("pytrec_eval")
    random = np.random.default_rng(3)
    queries, documents = (random.normal(size=(n, 8)).astype(np.float32) for n in (40, 60))
    positives = [tuple(random.choice(60, 5, replace=False)) for _ in range(40)]
    ranks, num_ties = best_positive_ranks(queries, documents, positives)
    assert num_ties == 0
    unit_queries = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    cosines = unit_queries @ (documents / np.linalg.norm(documents, axis=1, keepdims=True)).T
    relevance = {}
    run = {}
    for q in range(40):
        relevance[str(q)] = {str(d): 1 for d in positives[q]}
        run[str(q)] = {str(d): float(score) for d, score in enumerate(cosines[q])}
    results = trec.RelevanceEvaluator(relevance, {"success.1,5,10"}).evaluate(run)
    for k in (1, 5, 10):
        success = [results[str(q)][f"success_{k}"] for q in range(40)]
        assert success == (ranks <= k).astype(float).tolist()


def test_tie_costs_a_rank_and_is_counted() -> None:
    documents = np.ones((3, 2), dtype=np.float32)
    ranks, num_ties = best_positive_ranks(documents[:1], documents, [(1,)])
    assert (ranks.tolist(), num_ties) == ([3], 1)


def test_positives_are_inverted_from_queries_to_documents() -> None:
    assert invert_positives([(1,), (0, 1)], 3) == [(1,), (0, 1), ()]


def test_prior_counts_only_the_answers_of_other_questions() -> None:
    answers_and_options = [
        (0, ("a", "b")),
        (1, ("b", "a")),
        (0, ("a", "c")),
        (0, ("b", "a")),
        (0, ("e", "f")),
    ]
    items = []
    for n, (answer, options) in enumerate(answers_and_options):
        items.append(Question(str(n), ("?",), answer, {"kind": "x"}, options))

    class FirstOptionPredictions:
        """Predictions of a model that prefers the first option."""

        def score_options(
            self, questions: Sequence[Question], *, name: str = ""
        ) -> list[list[tuple[float, int]]]:
            return [[(1.0, 1), (2.0, 1)] for _ in questions]

    predictions: Any = FirstOptionPredictions()
    task = ChoiceTask(tuple(items), "kind", without_images_too=True)
    score = run_choices(task, predictions)
    assert score.details["prior"] == pytest.approx(100 * (1 + 1 + 1 + 0 + 1 / 2) / 5)
    assert score.samples["accuracy"].mean == score.samples["accuracy_blind"].mean == 80.0


def test_partial_ranking_equals_sorting_all_entries() -> None:
    task: Any = SimpleNamespace(k=3, positives=((5, 11),))
    similarity = np.round(np.random.default_rng(0).random(400), 1).astype(np.float32)  # many ties
    similarity[7] = -np.inf
    allowed = [i for i in range(400) if i != 7]
    expected = sorted(allowed, key=lambda i: (-similarity[i], i in (5, 11), i))
    assert rank_entries(similarity, task, 0) == expected[:10]


def test_excluded_entries_are_not_ranked() -> None:
    task: Any = SimpleNamespace(k=3, positives=((5, 11),))
    similarity = np.array([0.1, -np.inf, 0.3], dtype=np.float32)
    assert rank_entries(similarity, task, 0) == [2, 0]
