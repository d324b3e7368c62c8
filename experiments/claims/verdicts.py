"""Verdicts: what the runs say about a claim, by rules that are fixed before the runs.

A comparison claims that a number of a row exceeds that of another row by more than a margin, in the
claimed direction. With `low` and `high` of its interval, corrected by Holm within the claim:

    holds                      low > margin
    does not hold here         high < margin, and the minimum detectable difference is small enough
    cannot be decided here     otherwise, and with fewer seeds than the protocol's minimum

A claim holds if all its comparisons hold, does not hold here if one of them does not, and cannot be
decided here otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from inference import ALPHA, Difference, holm_levels


class Verdict(StrEnum):
    """Verdict on a comparison or a claim."""

    HOLDS = "holds"
    DOES_NOT_HOLD = "does not hold here"
    UNDECIDED = "cannot be decided here"


@dataclass(frozen=True)
class ComparisonRule:
    """When a comparison holds."""

    margin: float
    """Difference in the claimed direction that must be exceeded; below 0 for "not worse"."""
    detectable: float
    """Largest minimum detectable difference with which a claim may be rejected."""
    min_seeds: int
    """Number of seeds below which nothing is decided."""


@dataclass(frozen=True)
class Decision:
    """A decided comparison."""

    verdict: Verdict
    low: float
    """Lower bound of the corrected interval, in the claimed direction."""
    high: float
    """Upper bound of the corrected interval, in the claimed direction."""
    p_value: float
    """Bootstrap p-value of a difference equal to the margin, not corrected."""
    level: float
    """Level of the interval after Holm's correction."""


def decide_interval(
    low: float, high: float, *, rule: ComparisonRule, num_seeds: int, mde: float | None
) -> Verdict:
    """Return the verdict of one comparison.

    Args:
        low: lower bound of the corrected interval of the difference in the claimed direction.
        high: upper bound.
        rule: margin, largest MDE and number of seeds.
        num_seeds: seeds of the row with the most seeds; a comparison of rows that are not trained
            must pass `rule.min_seeds`.
        mde: minimum detectable difference; with None, where there is no estimate, nothing is
            rejected.
    """
    if num_seeds < rule.min_seeds:
        return Verdict.UNDECIDED
    if low > rule.margin:
        return Verdict.HOLDS
    if high < rule.margin and mde is not None and mde <= rule.detectable:
        return Verdict.DOES_NOT_HOLD
    return Verdict.UNDECIDED


def decide_comparisons(
    differences: Sequence[Difference],
    rules: Sequence[ComparisonRule],
    mdes: Sequence[float | None],
    *,
    num_planned: int,
) -> list[Decision]:
    """Decide the comparisons of one claim, with Holm's correction.

    Args:
        differences: differences in the claimed direction (positive for the claim).
        rules: rule of each comparison.
        mdes: minimum detectable difference of each, or None.
        num_planned: number of comparisons of the claim; those without runs count as p-value 1.
    """
    p_values = [
        difference.p_value(rule.margin) for difference, rule in zip(differences, rules, strict=True)
    ]
    levels = holm_levels([*p_values, *[1.0] * (num_planned - len(p_values))], alpha=ALPHA)
    decisions = []
    for index, (difference, rule) in enumerate(zip(differences, rules, strict=True)):
        low, high = difference.interval(levels[index])
        verdict = decide_interval(
            low, high, rule=rule, num_seeds=difference.num_seeds, mde=mdes[index]
        )
        decisions.append(Decision(verdict, low, high, p_values[index], levels[index]))
    return decisions


def combine_verdicts(verdicts: Sequence[Verdict | None]) -> Verdict:
    """Return the verdict of a claim; None stands for a comparison whose runs do not exist.

    No comparisons cannot be decided.
    """
    if any(verdict is Verdict.DOES_NOT_HOLD for verdict in verdicts):
        return Verdict.DOES_NOT_HOLD
    if verdicts and all(verdict is Verdict.HOLDS for verdict in verdicts):
        return Verdict.HOLDS
    return Verdict.UNDECIDED
