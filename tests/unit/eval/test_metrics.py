"""Every metric against a slow loop that says what it means, and the cases in which judges go wrong."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlduet.eval import metrics

SCORES = st.one_of(
    st.integers(-2, 2).map(float), st.sampled_from([math.nan, math.inf, -math.inf, 0.5])
)


@st.composite
def problems(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """A small similarity matrix full of ties, with NaN and infinities, and at least one positive a query."""
    num_queries, num_gallery = draw(st.integers(1, 5)), draw(st.integers(1, 7))
    cells = st.lists(SCORES, min_size=num_gallery, max_size=num_gallery)
    flags = st.lists(st.booleans(), min_size=num_gallery, max_size=num_gallery).filter(any)
    similarity = [draw(cells) for _ in range(num_queries)]
    return np.array(similarity), np.array([draw(flags) for _ in range(num_queries)])


def slow_order(scores: list[float], relevant: list[bool]) -> list[bool]:
    """The gallery's relevance in the most pessimistic order that the scores allow."""

    def worst(i: int) -> tuple[float, bool]:
        score = scores[i]
        if math.isnan(score):
            score = -math.inf if relevant[i] else math.inf
        return (-score, relevant[i])

    return [relevant[i] for i in sorted(range(len(scores)), key=worst)]


@given(problems())
@settings(max_examples=300, deadline=None)
def test_hit_and_recall_equal_the_slow_loop(problem: tuple[np.ndarray, np.ndarray]) -> None:
    similarity, relevant = problem
    orders = [slow_order(s, r) for s, r in zip(similarity.tolist(), relevant.tolist(), strict=True)]
    assert metrics.first_hit_ranks(similarity, relevant).tolist() == [
        o.index(True) + 1 for o in orders
    ]
    for k in (1, 2, 5, 10):
        hit = sum(any(o[:k]) for o in orders) / len(orders)
        recall = sum(sum(o[:k]) / sum(o) for o in orders) / len(orders)
        assert metrics.hit_at_k(similarity, relevant, [k])[f"hit@{k}"] == pytest.approx(hit)
        assert metrics.recall_at_k(similarity, relevant, [k])[f"recall@{k}"] == pytest.approx(
            recall
        )


@pytest.mark.parametrize("value", [0.0, 1.0, math.nan, math.inf, -math.inf])
def test_a_constant_encoder_scores_zero(value: float) -> None:
    similarity = np.full((20, 20), value, dtype=np.float32)
    relevant = np.eye(20, dtype=bool)
    assert metrics.hit_at_k(similarity, relevant) == {"hit@1": 0.0, "hit@5": 0.0, "hit@10": 0.0}
    assert metrics.recall_at_k(similarity, relevant) == {
        "recall@1": 0.0,
        "recall@5": 0.0,
        "recall@10": 0.0,
    }


def test_the_perfect_encoder_scores_one_and_several_positives_tell_hit_from_recall() -> None:
    relevant = np.array([[True, True, False, False]])
    similarity = np.array([[0.9, 0.1, 0.5, 0.3]])
    assert metrics.hit_at_k(similarity, relevant, [1]) == {"hit@1": 1.0}
    assert metrics.recall_at_k(similarity, relevant, [1, 4]) == {"recall@1": 0.5, "recall@4": 1.0}


def test_one_nan_never_helps() -> None:
    relevant = np.array([[True, False, False]])
    assert metrics.first_hit_ranks(np.array([[0.5, 0.4, math.nan]]), relevant).tolist() == [2]
    assert metrics.first_hit_ranks(np.array([[math.nan, 0.4, 0.3]]), relevant).tolist() == [3]
    # Another positive that has a score still counts.
    both = np.array([[True, True, False]])
    assert metrics.first_hit_ranks(np.array([[math.nan, 0.4, 0.3]]), both).tolist() == [1]


def test_a_query_without_a_positive_is_refused() -> None:
    with pytest.raises(AssertionError, match="without a positive"):
        metrics.hit_at_k(np.zeros((1, 2)), np.zeros((1, 2), dtype=bool))


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_chance_is_exact(positives: list[int], k: int) -> None:
    num_gallery = 5
    relevant = np.array([[i < p for i in range(num_gallery)] for p in positives])
    draws = list(itertools.combinations(range(num_gallery), min(k, num_gallery)))
    slow = np.mean([[any(i < p for i in draw) for draw in draws] for p in positives])
    assert metrics.chance_hit_at_k(relevant, [k])[f"hit@{k}"] == pytest.approx(float(slow))


def test_random_scores_come_near_chance() -> None:
    random = np.random.default_rng(0)
    relevant = np.arange(100)[:, None] % 50 == np.arange(100) % 50  # two positives a query
    found = [
        metrics.hit_at_k(random.normal(size=(100, 100)), relevant)["hit@10"] for _ in range(30)
    ]
    assert np.mean(found) == pytest.approx(metrics.chance_hit_at_k(relevant)["hit@10"], abs=0.02)


def test_intervals_hold_the_mean_and_repeat() -> None:
    hits = np.repeat([0.0, 1.0], [60, 40])
    found = metrics.bootstrap_interval(hits, seed=1)
    assert found == metrics.bootstrap_interval(hits, seed=1)
    assert found.mean == 0.4 and found.low < 0.4 < found.high
    # The normal approximation of a fraction, to about a tenth of its width.
    assert found.high - found.low == pytest.approx(2 * 1.96 * math.sqrt(0.4 * 0.6 / 100), rel=0.1)
    assert metrics.bootstrap_interval(np.ones(5)) == metrics.Interval(1.0, 1.0, 1.0)


def test_a_weighted_mean_is_a_ratio_of_sums() -> None:
    nats, tokens = np.array([2.0, 9.0, 4.0]), np.array([1.0, 3.0, 2.0])
    found = metrics.bootstrap_interval(nats / tokens, weights=tokens)
    assert found.mean == pytest.approx(15 / 6)
    assert 2.0 <= found.low <= found.high <= 3.0


def test_pairing_resolves_what_two_intervals_cannot() -> None:
    random = np.random.default_rng(0)
    hard = random.normal(size=200)
    ours, theirs = hard + 0.05 + 0.01 * random.normal(size=200), hard
    alone = [metrics.bootstrap_interval(v) for v in (ours, theirs)]
    assert alone[0].low < alone[1].high, "unpaired, the intervals overlap"
    assert metrics.paired_bootstrap(ours, theirs).low > 0


@pytest.mark.parametrize(
    ("prediction", "references", "exact", "f1"),
    [
        ("A red apple.", ["a red apple"], 1.0, 1.0),
        ("The apple", ["red apple"], 0.0, 2 / 3),
        ("", ["red apple"], 0.0, 0.0),
        ("", [""], 1.0, 1.0),
        ("pear", ["apple", "Pear!"], 1.0, 1.0),
        ("apple apple", ["apple"], 0.0, 2 / 3),
    ],
)
def test_captions(prediction: str, references: list[str], exact: float, f1: float) -> None:
    assert metrics.exact_match(prediction, references) == exact
    assert metrics.token_f1(prediction, references) == pytest.approx(f1)
