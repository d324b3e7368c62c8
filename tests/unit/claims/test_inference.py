"""Bootstrap, Holm's correction, power and verdicts, against slow references and known cases."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from helpers.claims import claims

inference, verdicts = claims.inference, claims.verdicts
RANDOM = np.random.default_rng(5)


def make_row(num_seeds: int = 3, num_items: int = 7, *, is_weighted: bool = False) -> Any:
    """Return random values, with weights of 1 to 9 on request."""
    weights = np.ones((num_seeds, num_items))
    if is_weighted:
        weights = RANDOM.integers(1, 10, size=(1, num_items)).repeat(num_seeds, 0).astype(float)
    return inference.RowValues(RANDOM.normal(size=(num_seeds, num_items)), weights)


def resample_slowly(terms: Any, num_resamples: int, seed: int) -> list[float]:
    """Return the bootstrap draws of a weighted sum by loops over seeds and items."""
    num_seeds, num_items = terms[0][1].values.shape
    counts = np.random.default_rng(seed).multinomial(
        num_items, [1 / num_items] * num_items, size=num_resamples
    )
    seeds = np.random.default_rng(seed + 1).integers(num_seeds, size=(num_resamples, num_seeds))
    draws = []
    for index in range(num_resamples):
        by_seed = []
        for seed_index in range(num_seeds):
            total = 0.0
            for factor, row in terms:
                values, weights = row.values[seed_index], row.weights[seed_index]
                top = sum(c * v * w for c, v, w in zip(counts[index], values, weights, strict=True))
                bottom = sum(c * w for c, w in zip(counts[index], weights, strict=True))
                total += factor * top / bottom
            by_seed.append(total)
        center = sum(by_seed) / num_seeds
        drawn = sum(by_seed[i] for i in seeds[index]) / num_seeds
        draws.append(center + (num_seeds / (num_seeds - 1)) ** 0.5 * (drawn - center))
    return draws


@pytest.mark.parametrize("is_weighted", [False, True])
def test_the_bootstrap_equals_loops_over_seeds_and_items(is_weighted: bool) -> None:
    terms = [(factor, make_row(is_weighted=is_weighted)) for factor in (2.0, -1.0, -1.0)]
    difference = inference.bootstrap_difference(terms, num_resamples=30, seed=9)
    np.testing.assert_allclose(difference.draws, resample_slowly(terms, 30, 9), atol=1e-12)
    expected = 0.0
    for factor, row in terms:
        pairs = zip(row.values, row.weights, strict=True)
        expected += factor * np.mean([np.average(values, weights=w) for values, w in pairs])
    assert difference.mean == pytest.approx(expected)
    assert (difference.num_seeds, difference.num_items) == (3, 7)


def test_the_spread_between_seeds_is_that_of_their_mean() -> None:
    effects = np.array([1.0, 4.0, 2.0, 9.0])
    row = inference.RowValues(np.repeat(effects[:, None], 6, 1), np.ones((4, 6)))
    draws = inference.bootstrap_difference([(1.0, row)], num_resamples=8000).draws
    assert draws.std() == pytest.approx(effects.std(ddof=1) / 2, rel=0.04)


def test_a_row_of_one_seed_is_compared_with_every_seed() -> None:
    many, single = make_row(3), make_row(1)
    difference = inference.bootstrap_difference([(1.0, many), (-1.0, single)], num_resamples=5)
    assert difference.num_seeds == 3
    assert difference.mean == pytest.approx(many.mean - single.mean)


def test_other_numbers_of_items_or_seeds_are_refused() -> None:
    for other in (make_row(3, 6), make_row(2)):
        with pytest.raises(ValueError, match="cannot be paired"):
            inference.bootstrap_difference([(1.0, make_row(3)), (-1.0, other)])


def test_intervals_and_p_values_agree() -> None:
    row = make_row(3, 40)
    difference = inference.bootstrap_difference([(1.0, row)], num_resamples=999)
    for alpha in (0.05, 0.2):
        low, high = difference.interval(alpha)
        assert difference.p_value(low - 1e-6) <= alpha + 0.003
        assert difference.p_value((low + high) / 2) > alpha
        assert difference.p_value(high + 1e-6) <= alpha + 0.003


def adjust_slowly(p_values: list[float]) -> list[float]:
    """Return Holm's adjusted p-values by their definition."""
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(np.argsort(p_values, kind="stable")):
        largest = max(largest, (len(p_values) - rank) * p_values[index])
        adjusted[index] = min(1.0, largest)
    return adjusted


def test_holm_levels_reject_what_adjusted_p_values_reject() -> None:
    num_rejected = 0
    for _ in range(300):
        p_values = list(RANDOM.uniform(size=RANDOM.integers(1, 7)) ** 4)
        levels = inference.holm_levels(p_values)
        rejected = [p <= level for p, level in zip(p_values, levels, strict=True)]
        assert rejected == [p <= 0.05 for p in adjust_slowly(p_values)]
        num_rejected += sum(rejected)
    assert num_rejected > 100
    assert inference.holm_levels([]) == []


def test_variances_of_an_additive_table_are_those_of_its_effects() -> None:
    seeds, items = RANDOM.normal(size=4), RANDOM.normal(size=9)
    row = inference.RowValues(seeds[:, None] + items, np.ones((4, 9)))
    variances = inference.estimate_variances([(2.0, row)])
    assert variances.seed == pytest.approx(4 * seeds.var(ddof=1))
    assert variances.item == pytest.approx(4 * items.var(ddof=1))
    assert variances.residual == pytest.approx(0, abs=1e-12)


def test_without_two_seeds_there_are_variances_of_unseeded_rows_alone() -> None:
    row = make_row(1)
    assert inference.estimate_variances([(1.0, row)]) is None
    variances = inference.estimate_variances([(1.0, row)], is_seeded=False)
    assert variances == inference.VarianceComponents(0.0, row.values[0].var(ddof=1), 0.0)


def test_the_detectable_difference_is_found_with_the_stated_power() -> None:
    variances = inference.VarianceComponents(0.5, 2.0, 4.0)
    mde = inference.detectable_difference(variances, num_seeds=5, num_items=50)
    error = (0.5 / 5 + 2.0 / 50 + 4.0 / 250) ** 0.5
    estimates = RANDOM.normal(mde, error, size=200_000)
    assert (estimates > 1.959964 * error).mean() == pytest.approx(0.8, abs=0.005)


def test_the_required_seeds_are_the_fewest() -> None:
    variances = inference.VarianceComponents(3.0, 2.0, 4.0)
    needed = inference.required_seeds(variances, detectable=1.5, num_items=100)
    mdes = [
        inference.detectable_difference(variances, num_seeds=seeds, num_items=100)
        for seeds in (needed - 1, needed)
    ]
    assert mdes[0] > 1.5 >= mdes[1]
    few_items = inference.VarianceComponents(0.0, 90.0, 0.0)
    assert inference.required_seeds(few_items, detectable=1.0, num_items=10) is None


HOLDS, FAILS, OPEN = verdicts.Verdict


@pytest.mark.parametrize(
    ("low", "high", "num_seeds", "mde", "expected"),
    [
        (2.1, 9.0, 5, 4.0, HOLDS),
        (2.1, 9.0, 5, None, HOLDS),
        (2.0, 9.0, 5, 4.0, OPEN),  # the margin itself is not exceeded
        (-5.0, 1.9, 5, 4.0, FAILS),
        (-5.0, 1.9, 5, 4.1, OPEN),  # too little power
        (-5.0, 1.9, 5, None, OPEN),
        (-5.0, 2.0, 5, 1.0, OPEN),
        (1.0, 3.0, 5, 1.0, OPEN),
        (2.1, 9.0, 2, 1.0, OPEN),  # too few seeds
        (-5.0, 1.9, 2, 1.0, OPEN),
    ],
)
def test_a_verdict_follows_from_interval_power_and_seeds(
    low: float, high: float, num_seeds: int, mde: float | None, expected: str
) -> None:
    rule = verdicts.ComparisonRule(margin=2.0, detectable=4.0, min_seeds=3)
    verdict = verdicts.decide_interval(low, high, rule=rule, num_seeds=num_seeds, mde=mde)
    assert verdict is expected


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([HOLDS, HOLDS], HOLDS),
        ([HOLDS, OPEN], OPEN),
        ([HOLDS, None], OPEN),
        ([None, OPEN, FAILS], FAILS),
        ([], OPEN),
    ],
)
def test_a_claim_holds_if_all_its_comparisons_do(parts: list[str | None], expected: str) -> None:
    assert verdicts.combine_verdicts(parts) is expected


def make_difference(center: float, spread: float) -> Any:
    """Return a difference whose draws are evenly spaced around a center."""
    draws = center + spread * np.linspace(-1, 1, 10_001)
    return inference.Difference(center, draws, 5, 50)


def test_comparisons_without_runs_count_in_holms_correction() -> None:
    rule = verdicts.ComparisonRule(margin=0.0, detectable=1.0, min_seeds=3)
    difference = make_difference(0.98, 1.0)  # 1 % of its draws lie below 0
    (alone,) = verdicts.decide_comparisons([difference], [rule], [0.5], num_planned=1)
    (corrected,) = verdicts.decide_comparisons([difference], [rule], [0.5], num_planned=4)
    assert (alone.verdict, corrected.verdict) == (HOLDS, OPEN)
    assert (alone.level, corrected.level) == (0.05, 0.0125)
    assert corrected.low < alone.low
