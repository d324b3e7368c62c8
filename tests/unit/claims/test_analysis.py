"""Reports of claims from results that are written by hand."""

from __future__ import annotations

from typing import Any

import pytest

from helpers.claims import claims

analysis, verdicts = claims.analysis, claims.verdicts
COMPARISON = {"name": "c", "row": "a", "against": "b", "number": "n", "detectable": 5}
CLAIM = {"id": 1, "title": "T", "statement": "S", "paper": "P", "protocol": "Q"}


def make_protocol(**changes: Any) -> Any:
    """Return a protocol with two trained rows, one without training, and one comparison."""
    row = {"about": "x", "track": "t", "minutes": 3}
    tree = {
        "seeds": [0, 1, 2, 3],
        "min_seeds": 3,
        "core_minutes": 100,
        "pilots": {},
        "tracks": {"t": {"about": "", "preset": "p", "steps": 1, "overrides": [], "measures": []}},
        "rows": {"a": row, "b": row, "start": {**row, "kind": "start"}},
        "claims": [{**CLAIM, "comparisons": [{**COMPARISON, **changes}]}],
    }
    return claims.protocol.Protocol.model_validate(tree)


def make_results(means: dict[str, float], seeds: range, *, spread: float = 1.0) -> Any:
    """Return results with 40 items around a mean per row; seeds differ by 0.1."""
    results: dict[str, dict[int, Any]] = {}
    for row, mean in means.items():
        results[row] = {}
        for seed in seeds if row != "start" else range(1):
            values = [mean + 0.1 * seed + spread * (n % 5 - 2) for n in range(40)]
            number = {"scale": 1.0, "values": values}
            results[row][seed] = claims.results.RowResult({}, [], {}, {"n": number})
    return results


@pytest.mark.parametrize(
    ("means", "changes", "expected"),
    [
        ({"a": 9, "b": 2}, {}, "holds"),
        ({"a": 9, "b": 2}, {"margin": 8}, "does not hold here"),
        ({"a": 2, "b": 9}, {"direction": "lower"}, "holds"),
        ({"a": 2, "b": 9}, {}, "does not hold here"),
        ({"a": 2, "start": 1}, {"against": "start"}, "holds"),
        ({"start": 5}, {"row": "start", "against": ""}, "holds"),
        ({"a": 5}, {"terms": [(2, "a", "n"), (-1, "a", "n")], "row": "", "margin": 4.5}, "holds"),
    ],
)
def test_the_verdict_is_that_of_the_means(
    means: dict[str, float], changes: dict[str, Any], expected: str
) -> None:
    protocol = make_protocol(**changes)
    results = make_results(means, range(4))
    (report,) = analysis.analyse_claims(protocol, results)
    assert report.verdict == expected
    assert not report.missing


def test_missing_seeds_are_named_with_minutes_and_command() -> None:
    protocol = make_protocol()
    (report,) = analysis.analyse_claims(protocol, make_results({"a": 9, "b": 2}, range(2)))
    assert report.verdict is verdicts.Verdict.UNDECIDED
    assert report.missing == {"a": [2, 3], "b": [2, 3]}
    needs = analysis.describe_needs(protocol, report)
    assert len(needs) == 1
    assert "about 12 minutes of one core: a (seeds 2, 3); b (seeds 2, 3)" in needs[0]
    assert "--claims 1" in needs[0]


def test_rows_are_compared_on_their_common_seeds() -> None:
    protocol = make_protocol()
    results = make_results({"a": 9, "b": 2}, range(4))
    del results["b"][1]
    (report,) = analysis.analyse_claims(protocol, results)
    measured = report.comparisons[0].measured
    assert measured.difference.num_seeds == 3
    assert measured.difference.mean == pytest.approx(7)
    assert claims.report.format_verdict(protocol, report) == "*holds* (preliminary)"


def test_an_effect_near_the_margin_needs_more_items_or_nothing_that_helps() -> None:
    protocol = make_protocol(detectable=0.01)
    results = make_results({"a": 2, "b": 2}, range(4))
    for seed, result in results["a"].items():
        values = result.numbers["n"]["values"]
        result.numbers["n"]["values"] = [v + (n * 7 + seed) % 11 - 5 for n, v in enumerate(values)]
    (report,) = analysis.analyse_claims(protocol, results)
    assert report.verdict is verdicts.Verdict.UNDECIDED
    (need,) = analysis.describe_needs(protocol, report)
    assert "a difference of 0.01 needs" in need
