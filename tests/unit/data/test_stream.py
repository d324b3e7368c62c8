"""The order of training samples is a pure function of (seed, position)."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlduet.data.records import Record
from vlduet.data.stream import SCHEDULE_BLOCK_SIZE, Mixture
from vlduet.errors import DataError


def make_records(prefix: str, count: int) -> list[Record]:
    return [Record(f"{prefix}{i}", parts=("x",)) for i in range(count)]


def read_ids(mixture: Mixture, begin: int, end: int) -> list[str]:
    return [mixture[position].record.id for position in range(begin, end)]


@settings(max_examples=20, deadline=None)
@given(
    st.integers(0, 3),
    st.lists(st.tuples(st.integers(1, 40), st.floats(0.1, 10)), min_size=1, max_size=3),
)
def test_random_access_equals_reading_in_order(
    seed: int, counts_and_weights: list[tuple[int, float]]
) -> None:
    sources = [make_records(str(i), count) for i, (count, _) in enumerate(counts_and_weights)]
    weights = [weight for _, weight in counts_and_weights]
    in_order = read_ids(Mixture(sources, weights, seed=seed), 0, 2500)
    mixture = Mixture(sources, weights, seed=seed)
    positions = (2400, 17, 1999, 0)
    assert [mixture[p].record.id for p in positions] == [in_order[p] for p in positions]
    # Every source is read epoch after epoch: each record once before any comes again.
    for number, records in enumerate(sources):
        drawn = [record_id for record_id in in_order if record_id[0] == str(number)]
        for begin in range(0, len(drawn) - len(records) + 1, len(records)):
            assert len(set(drawn[begin : begin + len(records)])) == len(records)


def test_weights_hold_exactly_in_every_block() -> None:
    mixture = Mixture([make_records("a", 7), make_records("b", 5)], [3, 1], seed=0)
    for block in range(3):
        begin = block * SCHEDULE_BLOCK_SIZE
        drawn = Counter(i[0] for i in read_ids(mixture, begin, begin + SCHEDULE_BLOCK_SIZE))
        assert drawn == {"a": 750, "b": 250}


def test_ranks_share_the_samples_of_one_process() -> None:
    mixture = Mixture([make_records("a", 50)], [1], seed=4)
    single = [sample.record.id for sample in mixture.step_samples(3, 10)]
    shared = []
    for rank in range(3):
        shared += mixture.step_samples(3, 10, rank=rank, world_size=3)
    assert [sample.record.id for sample in shared] == single


def test_epochs_and_seeds_differ() -> None:
    mixture = Mixture([make_records("a", 50)], [1], seed=0)
    other_seed = Mixture([make_records("a", 50)], [1], seed=1)
    first_epoch = read_ids(mixture, 0, 50)
    assert first_epoch != read_ids(mixture, 50, 100)
    assert first_epoch != read_ids(other_seed, 0, 50)


def test_a_sample_has_its_own_random_numbers() -> None:
    mixture = Mixture([make_records("a", 5)], [1], seed=0)
    assert mixture[3].rng().random() == mixture[3].rng().random()
    assert mixture[3].rng().random() != mixture[4].rng().random()


def test_an_empty_source_is_named() -> None:
    with pytest.raises(DataError, match=r"data.train\[1\]"):
        Mixture([make_records("a", 1), []], [1, 1], seed=0)


def test_records_of_two_files_with_equal_ids_have_two_names() -> None:
    mixture = Mixture([make_records("", 2), make_records("", 2)], [1, 1], seed=0)
    samples = [mixture[position] for position in range(8)]
    assert len({sample.record.id for sample in samples}) == 2
    # Each of the four records is drawn twice, with the same name.
    assert len({sample.record_name for sample in samples}) == 4
