"""The order is a pure function of (seed, position)."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlduet.data.records import Record
from vlduet.data.stream import SCHEDULE_BLOCK_SIZE, Mixture
from vlduet.errors import DataError


def source(name: str, count: int) -> list[Record]:
    return [Record(f"{name}{i}", parts=("x",)) for i in range(count)]


def ids(mixture: Mixture, begin: int, end: int) -> list[str]:
    return [mixture[p].record.id for p in range(begin, end)]


@settings(max_examples=20, deadline=None)
@given(
    st.integers(0, 3),
    st.lists(st.tuples(st.integers(1, 40), st.floats(0.1, 10)), min_size=1, max_size=3),
)
def test_random_access_equals_reading_in_order(seed, sources):
    records = [source(str(i), count) for i, (count, _) in enumerate(sources)]
    weights = [w for _, w in sources]
    whole = ids(Mixture(records, weights, seed=seed), 0, 2500)
    fresh = Mixture(records, weights, seed=seed)
    assert [fresh[p].record.id for p in (2400, 17, 1999, 0)] == [
        whole[p] for p in (2400, 17, 1999, 0)
    ]
    # Every source is read epoch after epoch: each record once before any comes again.
    for name, rows in zip("012", records, strict=False):
        drawn = [i for i in whole if i[0] == name]
        for begin in range(0, len(drawn) - len(rows) + 1, len(rows)):
            assert len(set(drawn[begin : begin + len(rows)])) == len(rows)


def test_weights_hold_exactly_in_every_block():
    mixture = Mixture([source("a", 7), source("b", 5)], [3, 1], seed=0)
    for block in range(3):
        drawn = Counter(
            i[0]
            for i in ids(mixture, block * SCHEDULE_BLOCK_SIZE, (block + 1) * SCHEDULE_BLOCK_SIZE)
        )
        assert drawn == {"a": 750, "b": 250}


def test_ranks_share_what_one_process_sees():
    mixture = Mixture([source("a", 50)], [1], seed=4)
    one = [s.record.id for s in mixture.step_samples(3, 10)]
    many = [
        s.record.id
        for rank in range(3)
        for s in mixture.step_samples(3, 10, rank=rank, world_size=3)
    ]
    assert one == many


def test_epochs_and_seeds_differ():
    mixture = Mixture([source("a", 50)], [1], seed=0)
    assert ids(mixture, 0, 50) != ids(mixture, 50, 100)
    assert ids(mixture, 0, 50) != ids(Mixture([source("a", 50)], [1], seed=1), 0, 50)


def test_a_sample_has_randomness_of_its_own():
    mixture = Mixture([source("a", 5)], [1], seed=0)
    assert mixture[3].rng().random() == mixture[3].rng().random() != mixture[4].rng().random()


def test_an_empty_source_is_named():
    with pytest.raises(DataError, match=r"data.train\[1\]"):
        Mixture([source("a", 1), []], [1, 1], seed=0)


def test_records_of_two_files_with_equal_ids_have_two_names():
    mixture = Mixture([source("", 2), source("", 2)], [1, 1], seed=0)
    samples = [mixture[position] for position in range(8)]
    assert len({sample.record.id for sample in samples}) == 2
    assert len({sample.record_name for sample in samples}) == 4, "and one drawn again has the same"
