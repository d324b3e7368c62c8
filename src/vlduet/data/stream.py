"""Order of training records as a pure function of (seed, position): a resume needs no saved state.

Position p = step * batch_size + i names the p-th sample that a run trains on.

1. schedule   the source of a position; every block of positions has each source's exact share
2. order      the record within the source: a new permutation of the source in every epoch
3. ranks      each takes a contiguous share of a step's positions; together they see what one would
"""

from __future__ import annotations

import hashlib
import random
from collections import abc
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from vlduet.data.records import Record
from vlduet.errors import DataError

SCHEDULE_BLOCK_SIZE = 1000
"""Number of positions in which every source has its exact share; weights are rounded to
thousandths."""


@dataclass(frozen=True)
class Sample:
    """A record at a position of the training order."""

    record: Record
    """The record itself."""
    position: int
    """Position in the training order, from 0."""
    seed: int
    """Seed of the run."""
    origin: str = ""
    """Number of the source and index of the record in it, as `0.17`; empty outside of training."""

    @property
    def record_name(self) -> str:
        """Name of the record, unique in the mixture even if two sources have equal ids."""
        return f"{self.origin}:{self.record.id}"

    def rng(self) -> random.Random:
        """Return a new random generator that depends on seed and position only."""
        return random.Random(f"{self.seed}:{self.position}")


class Mixture:
    """Endless sequence of samples from several sources, mixed by weight."""

    def __init__(
        self,
        sources: abc.Sequence[abc.Sequence[Record]],
        weights: abc.Sequence[float],
        *,
        seed: int,
    ):
        """Compute each source's share of a block of `SCHEDULE_BLOCK_SIZE` positions.

        Args:
            sources: records of every source, at least one source; they are not copied.
            weights: positive weight of every source; only their ratios matter.
            seed: seed of the order. Global random generators are not used.

        Raises:
            DataError: a source has no records, or its share rounds to less than 1/1000.
        """
        self.sources = sources
        self.seed = seed
        for i, records in enumerate(sources):
            if not records:
                raise DataError(
                    "the source has no records",
                    place=f"data.train[{i}]",
                    fix="Check the file with `vlduet data check`",
                )
        exact_counts = np.array(weights) / sum(weights) * SCHEDULE_BLOCK_SIZE
        counts = np.floor(exact_counts).astype(int)
        # The positions that rounding down left over go to the largest remainders.
        by_remainder = np.argsort(counts - exact_counts, kind="stable")
        for i in by_remainder[: SCHEDULE_BLOCK_SIZE - counts.sum()]:
            counts[i] += 1
        if counts.min() == 0:
            raise DataError(
                "a source's share is below 1/1000", place="data.train", fix="Raise its weight"
            )
        self.counts = counts
        self._schedule = lru_cache(maxsize=4)(self._build_schedule)
        self._order = lru_cache(maxsize=2 * len(sources))(self._build_order)

    @property
    def num_records(self) -> int:
        """Number of records of all sources, whatever their weights."""
        return sum(map(len, self.sources))

    def __getitem__(self, position: int) -> Sample:
        """Return the sample at a position, from 0 without an upper bound.

        It depends on the sources, the weights and the seed alone, not on earlier calls. The last
        permutations are cached.
        """
        block, offset = divmod(position, SCHEDULE_BLOCK_SIZE)
        schedule, occurrences = self._schedule(block)
        source = int(schedule[offset])
        num_earlier_draws = block * int(self.counts[source]) + int(occurrences[offset])
        epoch, i = divmod(num_earlier_draws, len(self.sources[source]))
        index = int(self._order(source, epoch)[i])
        return Sample(self.sources[source][index], position, self.seed, f"{source}.{index}")

    def step_samples(
        self, step: int, batch_size: int, *, rank: int = 0, world_size: int = 1
    ) -> list[Sample]:
        """Return one rank's samples of a step: a contiguous share of its `batch_size` positions."""
        begin = step * batch_size + rank * batch_size // world_size
        end = step * batch_size + (rank + 1) * batch_size // world_size
        return [self[position] for position in range(begin, end)]

    def _build_schedule(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Return two int[SCHEDULE_BLOCK_SIZE] arrays for the positions of a block.

        First: the source of every position. Second: how often that source occurs earlier in the
        block.
        """
        sources = np.repeat(np.arange(len(self.counts)), self.counts)
        _create_generator(self.seed, "schedule", block).shuffle(sources)
        occurrences = np.empty(SCHEDULE_BLOCK_SIZE, dtype=int)
        for source, count in enumerate(self.counts):
            occurrences[sources == source] = np.arange(count)
        return sources, occurrences

    def _build_order(self, source: int, epoch: int) -> np.ndarray:
        """Return the permutation of a source's record indices in an epoch."""
        generator = _create_generator(self.seed, "order", source, epoch)
        return generator.permutation(len(self.sources[source]))


def _create_generator(*key: object) -> np.random.Generator:
    """Return a generator whose numbers depend on the key alone, equal on every platform.

    Philox keyed by a hash gives independent streams for neighbouring seeds.
    """
    digest = hashlib.sha256(":".join(map(str, key)).encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "big")))
