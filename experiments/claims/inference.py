"""Statistics of a comparison: paired bootstrap over items and seeds, Holm's correction, power.

Values are float[S, N]: one row per seed, one column per item. Two rows of a study are paired by
seed (the same records in the same order) and by item (the same questions). A row without training
has one seed and is compared with every seed of the other.

    bootstrap    D* = mean over drawn items + sqrt(S / (S - 1)) * (mean over drawn seeds
                 - mean over all seeds), both of the drawn items
    Holm         the i-th smallest of m p-values is compared with alpha / (m - i + 1)
    power        MDE = (z(1 - alpha / 2) + z(power)) * sqrt(var_seed / S + var_item / N
                 + var_rest / (S N)), variances of the differences by analysis of variance
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

ALPHA = 0.05
POWER = 0.8
NUM_RESAMPLES = 10_000


@dataclass(frozen=True)
class RowValues:
    """The values of one number in one row of the study."""

    values: Floats
    """float[S, N], in the unit of the papers."""
    weights: Floats
    """float[S, N], such as numbers of tokens; ones for a plain mean."""

    @property
    def seed_means(self) -> Floats:
        """float[S], the weighted mean over the items of every seed."""
        return np.asarray((self.values * self.weights).sum(1) / self.weights.sum(1))

    @property
    def mean(self) -> float:
        """Mean over seeds of the weighted means over items."""
        return float(self.seed_means.mean())


@dataclass(frozen=True)
class VarianceComponents:
    """Variances of paired differences, estimated by a two-way analysis of variance."""

    seed: float
    """Variance between seeds, at least 0."""
    item: float
    """Variance between items, at least 0."""
    residual: float
    """Variance of what neither seed nor item explains."""


@dataclass(frozen=True)
class Difference:
    """A weighted sum of rows, such as a row minus another one."""

    mean: float
    draws: Floats
    """float[NUM_RESAMPLES], the bootstrap distribution."""
    num_seeds: int
    num_items: int

    def interval(self, alpha: float) -> tuple[float, float]:
        """Return the percentile interval of coverage 1 - alpha."""
        low, high = np.percentile(self.draws, (100 * alpha / 2, 100 * (1 - alpha / 2)))
        return float(low), float(high)

    def p_value(self, threshold: float) -> float:
        """Return the two-sided bootstrap p-value of a difference equal to `threshold`."""
        tail = min((self.draws <= threshold).sum(), (self.draws >= threshold).sum())
        return float(min(1.0, 2 * (1 + tail) / (1 + len(self.draws))))


Terms = Sequence[tuple[float, RowValues]]
"""(factor, values) of the rows of a weighted sum, such as (1, a) and (-1, b) for a - b."""


def pair_seeds(rows: Sequence[RowValues]) -> list[RowValues]:
    """Return rows with equal numbers of seeds: a row of one seed is repeated.

    Raises ValueError where the numbers of items, or of seeds above one, differ.
    """
    num_seeds = max(len(row.values) for row in rows)
    num_items = rows[0].values.shape[1]
    paired = []
    for row in rows:
        if row.values.shape[1] != num_items:
            raise ValueError(f"{num_items} and {row.values.shape[1]} items cannot be paired")
        if len(row.values) not in (1, num_seeds):
            raise ValueError(f"{num_seeds} and {len(row.values)} seeds cannot be paired")
        repeats = num_seeds // len(row.values)
        values, weights = (np.repeat(array, repeats, 0) for array in (row.values, row.weights))
        paired.append(RowValues(values, weights))
    return paired


def bootstrap_difference(
    terms: Terms, *, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> Difference:
    """Return a weighted sum of rows with its paired bootstrap distribution over items and seeds.

    Every resample draws S seeds and N items with replacement, the same for all rows. The deviation
    of the drawn seeds is scaled by sqrt(S / (S - 1)), without which the variance of so few seeds
    would be too small by (S - 1) / S. With one seed only items are drawn.

    Args:
        terms: at least one term; see `Terms`.

    Raises:
        ValueError: as `pair_seeds`.
    """
    factors = [factor for factor, _ in terms]
    rows = pair_seeds([row for _, row in terms])
    num_seeds, num_items = rows[0].values.shape
    counts = draw_item_counts(num_items, num_resamples, seed)  # [R, N]
    by_seed = np.zeros((num_resamples, num_seeds))
    for factor, row in zip(factors, rows, strict=True):
        by_seed += factor * (counts @ (row.values * row.weights).T) / (counts @ row.weights.T)
    # Another generator than that of the items, which may come from the cache.
    seeds = np.random.default_rng(seed + 1).integers(num_seeds, size=(num_resamples, num_seeds))
    scale = np.sqrt(num_seeds / (num_seeds - 1)) if num_seeds > 1 else 0.0
    center = by_seed.mean(1)
    draws = center + scale * (np.take_along_axis(by_seed, seeds, 1).mean(1) - center)
    mean = sum(factor * row.mean for factor, row in zip(factors, rows, strict=True))
    return Difference(float(mean), draws, num_seeds, num_items)


@lru_cache(maxsize=4)
def draw_item_counts(num_items: int, num_resamples: int, seed: int) -> Floats:
    """Return how often every item is drawn, float[num_resamples, num_items].

    Equal arguments give the same array, which must not be modified: comparisons with equally many
    items share it.
    """
    random = np.random.default_rng(seed)
    probabilities = np.full(num_items, 1 / num_items)
    return random.multinomial(num_items, probabilities, size=num_resamples).astype(np.float64)


def holm_levels(p_values: Sequence[float], *, alpha: float = ALPHA) -> list[float]:
    """Return for every p-value the level that Holm's procedure compares it with.

    From the first one that is not below its level on, all larger p-values have that level too, so
    that none of them is below it. No p-values give [].
    """
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    levels = [0.0] * len(p_values)
    level = 0.0
    is_stopped = False
    for rank, index in enumerate(order):
        if not is_stopped:
            level = alpha / (len(p_values) - rank)
        levels[index] = level
        is_stopped = is_stopped or p_values[index] > level
    return levels


def estimate_variances(terms: Terms, *, is_seeded: bool = True) -> VarianceComponents | None:
    """Return the variance components of a weighted sum of rows.

    Weighted values are linearised: an item counts by its weight over the mean weight, so that the
    mean over items is the weighted mean of the row.

    Args:
        terms: see `Terms`.
        is_seeded: False for rows that no seed changes: the variance is that of the items alone.

    Returns:
        None with fewer than two items, or fewer than two seeds of seeded rows.

    Raises:
        ValueError: as `pair_seeds`.
    """
    rows = pair_seeds([row for _, row in terms])
    num_seeds, num_items = rows[0].values.shape
    if num_items < 2 or (is_seeded and num_seeds < 2):
        return None
    differences = np.zeros((num_seeds, num_items))
    for (factor, _), row in zip(terms, rows, strict=True):
        differences += factor * _linearise(row)
    if not is_seeded:
        return VarianceComponents(0.0, float(differences[0].var(ddof=1)), 0.0)
    grand = differences.mean()
    seed_means, item_means = differences.mean(1), differences.mean(0)
    residuals = differences - seed_means[:, None] - item_means + grand
    residual = float((residuals**2).sum() / ((num_seeds - 1) * (num_items - 1)))
    seed_square = num_items * float(seed_means.var(ddof=1))
    item_square = num_seeds * float(item_means.var(ddof=1))
    return VarianceComponents(
        max(0.0, (seed_square - residual) / num_items),
        max(0.0, (item_square - residual) / num_seeds),
        residual,
    )


def _linearise(row: RowValues) -> Floats:
    """Return mean + weight / mean weight * (value - mean) of every item, float[S, N]."""
    means = row.seed_means[:, None]
    relative_weights = row.weights / row.weights.mean(1, keepdims=True)
    return np.asarray(means + relative_weights * (row.values - means))


def detectable_difference(
    variances: VarianceComponents,
    *,
    num_seeds: int,
    num_items: int,
    alpha: float = ALPHA,
    power: float = POWER,
) -> float:
    """Return the smallest true difference that a two-sided test finds with the given power."""
    variance = (
        variances.seed / num_seeds
        + variances.item / num_items
        + variances.residual / (num_seeds * num_items)
    )
    normal = NormalDist()
    return float((normal.inv_cdf(1 - alpha / 2) + normal.inv_cdf(power)) * np.sqrt(variance))


def required_seeds(
    variances: VarianceComponents, *, detectable: float, num_items: int, alpha: float = ALPHA
) -> int | None:
    """Return the number of seeds that make `detectable` detectable; None where none is enough.

    None means that even with unlimited seeds the items alone vary too much.
    """
    normal = NormalDist()
    factor = normal.inv_cdf(1 - alpha / 2) + normal.inv_cdf(POWER)
    remaining = (detectable / factor) ** 2 - variances.item / num_items
    if remaining <= 0:
        return None
    return max(2, int(np.ceil((variances.seed + variances.residual / num_items) / remaining)))
