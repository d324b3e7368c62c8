"""Scores of benchmarks: numbers that remember the items they are averaged over.

A `MetricSample` keeps the value of every item, so that a number has a bootstrap interval and two
models can be compared item by item.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vlduet.eval.metrics import INTERVAL_PERCENTILES, bootstrap_means

Values = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class MetricValue:
    """A number in the unit in which papers print it, with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float
    n: int
    """Number of items."""


@dataclass(frozen=True, slots=True)
class MetricSample:
    """The items behind one number: the mean, or the sum, of the weighted means of its groups."""

    groups: tuple[tuple[Values, Values], ...]
    """One (values float[N], weights float[N]) pair per group. All weights 0 give a mean of 0."""
    scale: float = 100.0
    """Factor that turns the values into the unit of the papers, such as percent."""
    sum_groups: bool = False
    """Add the means of the groups instead of averaging them."""

    @property
    def mean(self) -> float:
        """The number itself, scaled."""
        means = [_safe_ratio((v * w).sum(), w.sum()) for v, w in self.groups]
        return self.scale * float(self._combine_groups(means))

    def estimate(self, seed: int = 0) -> MetricValue:
        """Return the number with its 95 % percentile bootstrap interval; `seed` draws the items."""
        low, high = np.percentile(self.bootstrap_values(seed), INTERVAL_PERCENTILES)
        num_items = sum(len(values) for values, _ in self.groups)
        return MetricValue(self.mean, float(low), float(high), num_items)

    def bootstrap_values(self, seed: int = 0) -> Values:
        """Return float[NUM_RESAMPLES]: the scaled number on items redrawn within each group.

        The draws depend only on `seed` and the sizes of the groups. An empty group raises
        ValueError.
        """
        means = []
        for i, (values, weights) in enumerate(self.groups):
            weighted_sums = bootstrap_means(values * weights, seed + i)
            means.append(_safe_ratio(weighted_sums, bootstrap_means(weights, seed + i)))
        return np.asarray(self.scale * self._combine_groups(means), dtype=np.float64)

    def _combine_groups(self, means: Sequence[Any]) -> Any:
        """Return the sum or the mean over groups of equally shaped numbers or arrays."""
        return np.sum(means, axis=0) if self.sum_groups else np.mean(means, axis=0)


def _safe_ratio(numerator: Any, denominator: Any) -> Any:
    """Return numerator / denominator elementwise, and 0 where the denominator is not positive."""
    denominator = np.asarray(denominator, dtype=np.float64)
    zeros = np.zeros_like(denominator)
    return np.divide(numerator, denominator, out=zeros, where=denominator > 0)


def average(
    values: ArrayLike, weights: ArrayLike | None = None, *, scale: float = 100.0
) -> MetricSample:
    """Return the sample of a plain or weighted mean.

    Args:
        values: one number per item, float[N] with N >= 1; anything else raises AssertionError.
        weights: float[N], or another length raises AssertionError; None for equal weights.
        scale: factor to the unit of the papers; the default turns shares into percent.
    """
    value_array = np.asarray(values, dtype=np.float64)
    weight_array = np.ones_like(value_array)
    if weights is not None:
        weight_array = np.asarray(weights, dtype=np.float64)
    assert value_array.ndim == 1, value_array.shape
    assert len(value_array), "no values to average"
    assert value_array.shape == weight_array.shape, (value_array.shape, weight_array.shape)
    return MetricSample(((value_array, weight_array),), scale=scale)


def average_per_token(total_nats: ArrayLike, num_tokens: ArrayLike) -> MetricSample:
    """Return the mean nats per token of texts, in which each counts by its number of tokens.

    Args:
        total_nats: nats of every text, float[N] with N >= 1.
        num_tokens: number of tokens of every text, float[N]; a text without any counts nothing.
    """
    counts = np.asarray(num_tokens, dtype=np.float64)
    return average(np.asarray(total_nats) / np.maximum(counts, 1), counts, scale=1.0)


def average_by_tag(
    values: Sequence[float], tags: Sequence[str], *, prefix: str = ""
) -> dict[str, MetricSample]:
    """Return one mean x 100 per distinct tag, keyed ``PREFIX + TAG`` in order of first occurrence.

    No values give {}; another number of tags than of values raises ValueError.
    """
    groups: dict[str, list[float]] = {}
    for value, tag in zip(values, tags, strict=True):
        groups.setdefault(tag, []).append(value)
    return {f"{prefix}{tag}": average(group) for tag, group in groups.items()}


def combine_samples(samples: Sequence[MetricSample], *, sum_groups: bool = False) -> MetricSample:
    """Return the macro average of several numbers of one scale, or their sum.

    Every group of every sample counts equally. No samples, or different scales, raise
    AssertionError.
    """
    assert samples, "no samples to combine"
    scale = samples[0].scale
    assert all(sample.scale == scale for sample in samples)
    groups = tuple(group for sample in samples for group in sample.groups)
    return MetricSample(groups, scale=scale, sum_groups=sum_groups)


def paired_difference(
    first: MetricSample, second: MetricSample, *, seed: int = 0
) -> MetricValue | None:
    """Return first - second with its paired interval: the same items are drawn on both sides.

    None is returned where group sizes, scales or the way of combining groups differ.
    """
    sizes = [len(values) for values, _ in first.groups]
    other_sizes = [len(values) for values, _ in second.groups]
    same_form = (first.scale, first.sum_groups) == (second.scale, second.sum_groups)
    if sizes != other_sizes or not same_form:
        return None
    # Draws depend on the seed and the sizes alone, so equal sizes mean equal draws.
    differences = first.bootstrap_values(seed) - second.bootstrap_values(seed)
    low, high = np.percentile(differences, INTERVAL_PERCENTILES)
    return MetricValue(first.mean - second.mean, float(low), float(high), sum(sizes))


@dataclass(frozen=True, slots=True)
class BenchmarkScore:
    """The outcome of one benchmark."""

    samples: Mapping[str, MetricSample]
    """Number name -> sample; the number that papers report comes first."""
    num_missing: int = 0
    """Items without a prediction; they count as wrong unless the official rule differs."""
    num_unparsed: int = 0
    """Predictions in which the official rule finds no answer."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """Facts beside the numbers, such as gallery size, ties, and why something is not scored."""
