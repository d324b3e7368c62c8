"""Analyse the results of the rows: every comparison of every claim, and what is still needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from inference import (
    ALPHA,
    Difference,
    RowValues,
    Terms,
    bootstrap_difference,
    detectable_difference,
    estimate_variances,
    required_seeds,
)
from protocol import Claim, Comparison, Protocol
from results import RowResult, read_result, result_path, stack_seeds
from verdicts import Decision, Verdict, combine_verdicts, decide_comparisons

PILOT_SEEDS = 2
"""Number of seeds, the first ones, from which the minimum detectable difference is estimated."""

SeedResults = Mapping[str, Mapping[int, RowResult]]
"""Results of every seed by the name of the row."""


@dataclass(frozen=True)
class MeasuredComparison:
    """A comparison whose runs exist."""

    difference: Difference
    """Difference in the claimed direction, positive for the claim."""
    mde: float | None
    """Minimum detectable difference with these seeds; None with fewer than two."""
    num_seeds_needed: int | None
    """Seeds with which `Comparison.detectable` could be found; None without an estimate, or where
    the test items are too few."""


@dataclass(frozen=True)
class ComparisonReport:
    """A comparison with what is known about it."""

    comparison: Comparison
    measured: MeasuredComparison | None
    """None where runs or numbers are missing."""
    decision: Decision | None
    """None where runs or numbers are missing."""


@dataclass(frozen=True)
class ClaimReport:
    """A claim with its verdict."""

    claim: Claim
    verdict: Verdict
    comparisons: list[ComparisonReport]
    missing: dict[str, list[int]]
    """Seeds without the numbers of the claim, by the name of the row."""
    minutes: float
    """Estimated minutes of one core for the missing runs."""


def read_results(protocol: Protocol, folder: Path) -> dict[str, dict[int, RowResult]]:
    """Return the results that exist, by row and seed; ConfigError for a broken file."""
    results: dict[str, dict[int, RowResult]] = {}
    for name, row in protocol.rows.items():
        results[name] = {}
        for seed in protocol.get_seeds(row):
            result = read_result(result_path(folder, name, seed))
            if result is not None:
                results[name][seed] = result
    return results


def analyse_claims(protocol: Protocol, results: SeedResults) -> list[ClaimReport]:
    """Return the report of every claim, in the order of the protocol.

    Raises ValueError for rows with different items.
    """
    return [_analyse_claim(protocol, claim, results) for claim in protocol.claims]


def _analyse_claim(protocol: Protocol, claim: Claim, results: SeedResults) -> ClaimReport:
    """Return the report of one claim."""
    num_planned = len(claim.comparisons)
    measured = [
        measure_comparison(protocol, comparison, results, level=ALPHA / num_planned)
        for comparison in claim.comparisons
    ]
    pairs = [
        (comparison, item)
        for comparison, item in zip(claim.comparisons, measured, strict=True)
        if item is not None
    ]
    decided = iter(
        decide_comparisons(
            [item.difference for _, item in pairs],
            [protocol.get_rule(comparison) for comparison, _ in pairs],
            [item.mde for _, item in pairs],
            num_planned=num_planned,
        )
    )
    reports = [
        ComparisonReport(comparison, item, None if item is None else next(decided))
        for comparison, item in zip(claim.comparisons, measured, strict=True)
    ]
    missing = list_missing_seeds(protocol, claim, results)
    return ClaimReport(
        claim,
        combine_verdicts(
            [None if report.decision is None else report.decision.verdict for report in reports]
        ),
        reports,
        missing,
        sum(protocol.rows[name].minutes * len(seeds) for name, seeds in missing.items()),
    )


def measure_comparison(
    protocol: Protocol, comparison: Comparison, results: SeedResults, *, level: float
) -> MeasuredComparison | None:
    """Return the difference of a comparison with its power, None where results are missing.

    Seeded rows are compared on the seeds that all of them have.

    Args:
        level: level of the test for which the power is computed.

    Raises:
        ValueError: the rows have different items.
    """
    terms = collect_terms(protocol, comparison, results)
    if terms is None:
        return None
    difference = bootstrap_difference(terms)
    is_seeded = any(protocol.rows[row].is_seeded for _, row, _ in comparison.signed_terms)
    pilot = [(factor, take_seeds(values, PILOT_SEEDS)) for factor, values in terms]
    variances = estimate_variances(pilot, is_seeded=is_seeded)
    if variances is None:
        return MeasuredComparison(difference, None, None)
    num_items = difference.num_items
    mde = detectable_difference(
        variances, num_seeds=difference.num_seeds, num_items=num_items, alpha=level
    )
    needed = required_seeds(
        variances, detectable=comparison.detectable, num_items=num_items, alpha=level
    )
    return MeasuredComparison(difference, mde, needed)


def collect_terms(protocol: Protocol, comparison: Comparison, results: SeedResults) -> Terms | None:
    """Return the terms of a comparison with the values of common seeds, None where any is missing.

    Terms of the same row and number are added up.
    """
    factors: dict[tuple[str, str], float] = {}
    for factor, row, number in comparison.signed_terms:
        factors[row, number] = factors.get((row, number), 0.0) + factor
    seeds = set(protocol.seeds)
    for row, _ in factors:
        if protocol.rows[row].is_seeded:
            seeds &= results.get(row, {}).keys()
    terms: list[tuple[float, RowValues]] = []
    for (row, number), factor in factors.items():
        row_seeds = sorted(seeds) if protocol.rows[row].is_seeded else protocol.seeds[:1]
        row_results = [results[row][seed] for seed in row_seeds if seed in results.get(row, {})]
        values = stack_seeds(row_results, number)
        if values is None:
            return None
        terms.append((factor, values))
    return terms


def take_seeds(row: RowValues, count: int) -> RowValues:
    """Return the values of the first `count` seeds, fewer where there are fewer."""
    return RowValues(row.values[:count], row.weights[:count])


def list_missing_seeds(
    protocol: Protocol, claim: Claim, results: SeedResults
) -> dict[str, list[int]]:
    """Return the seeds of a claim's rows that lack a number that the claim compares, by row."""
    numbers: dict[str, set[str]] = {}
    for comparison in claim.comparisons:
        for _, row, number in comparison.signed_terms:
            numbers.setdefault(row, set()).add(number)
    missing = {}
    for name in protocol.list_claim_rows(claim):
        seeds = []
        for seed in protocol.get_seeds(protocol.rows[name]):
            result = results.get(name, {}).get(seed)
            if result is None or numbers[name] - result.numbers.keys():
                seeds.append(seed)
        if seeds:
            missing[name] = seeds
    return missing


def describe_needs(protocol: Protocol, report: ClaimReport) -> list[str]:
    """Return what a claim that cannot be decided needs, as sentences; [] for any other claim."""
    if report.verdict is not Verdict.UNDECIDED:
        return []
    needs = []
    if report.missing:
        runs = "; ".join(
            f"{name} (seeds {', '.join(map(str, seeds))})" for name, seeds in report.missing.items()
        )
        needs.append(
            f"Missing runs, about {report.minutes:.0f} minutes of one core: {runs}. "
            f"`python experiments/claims/run.py --work runs/claims --claims {report.claim.id}`"
        )
    for item in report.comparisons:
        is_undecided = item.decision is not None and item.decision.verdict is Verdict.UNDECIDED
        if item.measured is None or item.measured.mde is None or not is_undecided:
            continue  # its missing runs are named above
        if item.measured.difference.num_seeds < protocol.get_rule(item.comparison).min_seeds:
            continue
        needed, available = item.measured.num_seeds_needed, item.measured.difference.num_seeds
        detectable = f"a difference of {item.comparison.detectable:g}"
        if needed is None:
            needs.append(
                f"{item.comparison.name}: {detectable} needs more test items; seeds do not help."
            )
        elif needed > available:
            names = {row for _, row, _ in item.comparison.signed_terms}
            rows = [protocol.rows[name] for name in names]
            minutes = sum(row.minutes for row in rows if row.is_seeded)
            needs.append(
                f"{item.comparison.name}: {detectable} needs {needed} seeds, "
                f"{(needed - available) * minutes:.0f} more minutes."
            )
        else:
            needs.append(
                f"{item.comparison.name}: the interval contains the margin although "
                f"{detectable} could be found; the effect, if any, is near the margin."
            )
    return needs


def summarise_row(results: Sequence[RowResult], number: str) -> list[float]:
    """Return mean over seeds and standard deviation between them.

    The deviation is left out for one seed, and the list is empty where the number is missing.
    """
    values = stack_seeds(results, number)
    if values is None:
        return []
    means = values.seed_means
    summary = [float(means.mean())]
    return [*summary, float(means.std(ddof=1))] if len(means) > 1 else summary
