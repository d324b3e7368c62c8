"""Splits of groups by the hash of their names."""

from __future__ import annotations

from collections import Counter

import pytest

from vlduet.corpora.build import assign_group_splits, assign_split
from vlduet.data.tools.duplicates import UnionFind

NAMES = [f"group {i}" for i in range(4000)]


@pytest.mark.parametrize(("test", "val"), [(0.2, 0.1), (0.05, 0.3), (0.0, 0.5), (0.5, 0.0)])
def test_splits_have_their_shares(test: float, val: float) -> None:
    counts = Counter(assign_split(name, test=test, val=val) for name in NAMES)
    assert counts["test"] / len(NAMES) == pytest.approx(test, abs=0.03)
    assert counts["val"] / len(NAMES) == pytest.approx(val, abs=0.03)
    assert counts["train"] / len(NAMES) == pytest.approx(1 - test - val, abs=0.03)


def test_a_group_has_the_split_of_its_smallest_name() -> None:
    names = NAMES[:60]
    alone = assign_group_splits(UnionFind(60), names, corpus="c", test=0.3, val=0.3)
    assert len(set(alone)) == 3
    groups = UnionFind(60)
    for item in range(40, 60):
        groups.union(item, item - 40)
    splits = assign_group_splits(groups, names, corpus="c", test=0.3, val=0.3)
    for item in range(40, 60):
        first = item - 40 if names[item - 40] < names[item] else item
        assert splits[item] == splits[item - 40] == alone[first]
    assert splits[20:40] == alone[20:40]
    other = assign_group_splits(UnionFind(60), names, corpus="d", test=0.3, val=0.3)
    assert other != alone
