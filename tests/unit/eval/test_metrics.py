"""Every metric against a slow loop, and cases in which careless scoring goes wrong."""

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
def retrieval_problems(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Draw a small similarity matrix with many ties, NaN and infinities, and its relevance.

    Every query has at least one relevant item.
    """
    num_queries = draw(st.integers(1, 5))
    num_gallery = draw(st.integers(1, 7))
    scores = st.lists(SCORES, min_size=num_gallery, max_size=num_gallery)
    flags = st.lists(st.booleans(), min_size=num_gallery, max_size=num_gallery).filter(any)
    similarity = [draw(scores) for _ in range(num_queries)]
    relevant = [draw(flags) for _ in range(num_queries)]
    return np.array(similarity), np.array(relevant)


def most_pessimistic_order(scores: list[float], relevant: list[bool]) -> list[bool]:
    """Return the gallery's relevance in the worst order that the scores allow."""

    def sort_key(i: int) -> tuple[float, bool]:
        score = scores[i]
        if math.isnan(score):
            score = -math.inf if relevant[i] else math.inf
        return (-score, relevant[i])

    return [relevant[i] for i in sorted(range(len(scores)), key=sort_key)]


@given(retrieval_problems())
@settings(max_examples=300, deadline=None)
def test_ranks_and_hit_rates_equal_the_slow_loop(
    problem: tuple[np.ndarray, np.ndarray],
) -> None:
    similarity, relevant = problem
    orders = []
    for scores, flags in zip(similarity.tolist(), relevant.tolist(), strict=True):
        orders.append(most_pessimistic_order(scores, flags))
    ranks = metrics.first_hit_ranks(similarity, relevant)
    assert ranks.tolist() == [order.index(True) + 1 for order in orders]
    for k in (1, 2, 5, 10):
        expected = sum(any(order[:k]) for order in orders) / len(orders)
        assert metrics.hit_at_k(similarity, relevant, [k])[f"hit@{k}"] == pytest.approx(expected)


@pytest.mark.parametrize("value", [0.0, 1.0, math.nan, math.inf, -math.inf])
def test_constant_encoder_scores_zero(value: float) -> None:
    similarity = np.full((20, 20), value, dtype=np.float32)
    relevant = np.eye(20, dtype=bool)
    assert metrics.hit_at_k(similarity, relevant) == {"hit@1": 0.0, "hit@5": 0.0, "hit@10": 0.0}


def test_one_of_several_relevant_items_is_a_hit() -> None:
    relevant = np.array([[True, True, False, False]])
    similarity = np.array([[0.9, 0.1, 0.5, 0.3]])
    assert metrics.hit_at_k(similarity, relevant, [1]) == {"hit@1": 1.0}


def test_nan_never_helps() -> None:
    relevant = np.array([[True, False, False]])
    similarity = np.array([[0.5, 0.4, math.nan]])
    assert metrics.first_hit_ranks(similarity, relevant).tolist() == [2]
    similarity = np.array([[math.nan, 0.4, 0.3]])
    assert metrics.first_hit_ranks(similarity, relevant).tolist() == [3]
    # Another relevant item that has a score still counts.
    relevant = np.array([[True, True, False]])
    assert metrics.first_hit_ranks(similarity, relevant).tolist() == [1]


def test_query_without_a_relevant_item_is_refused() -> None:
    with pytest.raises(AssertionError, match="without a positive"):
        metrics.hit_at_k(np.zeros((1, 2)), np.zeros((1, 2), dtype=bool))


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_chance_equals_the_mean_over_all_draws(num_positives: list[int], k: int) -> None:
    num_gallery = 5
    relevant = np.arange(num_gallery)[None] < np.array(num_positives)[:, None]
    hits = []
    for draw in itertools.combinations(range(num_gallery), min(k, num_gallery)):
        hits += [min(draw) < p for p in num_positives]
    chance = metrics.chance_hit_at_k(relevant, [k])[f"hit@{k}"]
    assert chance == pytest.approx(float(np.mean(hits)))


def test_random_scores_come_near_chance() -> None:
    random = np.random.default_rng(0)
    relevant = np.arange(100)[:, None] % 50 == np.arange(100) % 50  # two relevant items per query
    rates = [
        metrics.hit_at_k(random.normal(size=(100, 100)), relevant)["hit@10"] for _ in range(30)
    ]
    chance = metrics.chance_hit_at_k(relevant)["hit@10"]
    assert np.mean(rates) == pytest.approx(chance, abs=0.02)


def test_intervals_contain_the_mean_and_repeat() -> None:
    hits = np.repeat([0.0, 1.0], [60, 40])
    interval = metrics.bootstrap_interval(hits, seed=1)
    assert interval == metrics.bootstrap_interval(hits, seed=1)
    assert interval != metrics.bootstrap_interval(hits, seed=2)
    assert interval.mean == 0.4 and interval.low < 0.4 < interval.high
    # The normal approximation of a fraction, to about a tenth of its width.
    width = 2 * 1.96 * math.sqrt(0.4 * 0.6 / 100)
    assert interval.high - interval.low == pytest.approx(width, rel=0.1)
    assert metrics.bootstrap_interval(np.ones(5)) == metrics.Interval(1.0, 1.0, 1.0)


def test_weighted_mean_is_a_ratio_of_sums() -> None:
    nats = np.array([2.0, 9.0, 4.0])
    tokens = np.array([1.0, 3.0, 2.0])
    interval = metrics.bootstrap_interval(nats / tokens, weights=tokens)
    assert interval.mean == pytest.approx(15 / 6)
    assert 2.0 <= interval.low <= interval.high <= 3.0


def test_pairing_resolves_what_two_intervals_cannot() -> None:
    random = np.random.default_rng(0)
    reference = random.normal(size=200)
    values = reference + 0.05 + 0.01 * random.normal(size=200)
    interval = metrics.bootstrap_interval(values)
    reference_interval = metrics.bootstrap_interval(reference)
    assert interval.low < reference_interval.high, "unpaired, the intervals overlap"
    assert metrics.paired_bootstrap(values, reference).low > 0


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(0.01, 0.1, "above"), (-0.1, 0.1, "level"), (-0.2, -0.1, "below"), (0.0, 0.1, "level")],
)
def test_verdict_says_what_the_interval_resolves(low: float, high: float, verdict: str) -> None:
    assert metrics.Interval((low + high) / 2, low, high).verdict == verdict


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
def test_caption_scores(prediction: str, references: list[str], exact: float, f1: float) -> None:
    assert metrics.exact_match(prediction, references) == exact
    assert metrics.token_f1(prediction, references) == pytest.approx(f1)
