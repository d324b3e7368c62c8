"""Numbers over items: weights, groups, sums and intervals."""

from __future__ import annotations

import numpy as np
import pytest

from vlduet.eval.benchmarks.scores import average, average_by_tag, combine_samples


def test_combined_samples_count_equally_whatever_their_size() -> None:
    small, large = average([1.0, 0.0]), average([1.0] * 4)
    assert combine_samples([small, large]).mean == 75.0
    assert combine_samples([small, large], sum_groups=True).mean == 150.0
    assert combine_samples([small, large]).estimate().n == 6


def test_average_is_weighted() -> None:
    assert average([1.0, 0.5], [1.0, 3.0]).mean == pytest.approx(62.5)


def test_average_without_any_weight_is_zero() -> None:
    estimate = average([1.0, 1.0], [0.0, 0.0]).estimate()
    assert (estimate.mean, estimate.low, estimate.high) == (0.0, 0.0, 0.0)


def test_average_of_nothing_is_refused() -> None:
    with pytest.raises(AssertionError, match="no values"):
        average([])


def test_interval_contains_the_mean_and_has_the_expected_width() -> None:
    values = np.random.default_rng(0).integers(0, 2, 400)
    estimate = average(values).estimate(seed=1)
    assert estimate.low < estimate.mean < estimate.high
    assert estimate.n == 400
    # 2 x 1.96 standard errors of a coin are 9.8 percentage points.
    assert 8 < estimate.high - estimate.low < 12


def test_tags_keep_the_order_of_first_occurrence() -> None:
    samples = average_by_tag([1.0, 0.0, 0.0], ["b", "a", "b"], prefix="x/")
    assert {name: sample.mean for name, sample in samples.items()} == {"x/b": 50.0, "x/a": 0.0}
    assert list(samples) == ["x/b", "x/a"]
