"""The order of training, as a pure function of (seed, position): nothing to save, so a resume is exact.

Position p = step * batch_size + i names the p-th record that training ever sees. Its source is given by a schedule that
keeps the weights exactly in every block of positions; its record by a fresh permutation of the source in every epoch. Ranks
take equal, contiguous shares of a step's positions, so W processes see together what one would.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence as Many
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from vlduet.data.records import Record
from vlduet.errors import DataError

SCHEDULE_BLOCK_SIZE = 1000
"""Positions in which every source has its exact share; weights are rounded to thousandths."""


@dataclass(frozen=True)
class Sample:
    """A record at its place in the order."""

    record: Record
    position: int
    seed: int
    origin: str = ""
    """Its source and its place there."""

    @property
    def record_name(self) -> str:
        """Tells its record from all others, of which another file of the mixture may have one with the same id."""
        return f"{self.origin}:{self.record.id}"

    def rng(self) -> random.Random:
        """Randomness of this sample alone: the same whoever draws it, in whatever order."""
        return random.Random(f"{self.seed}:{self.position}")


class Mixture:
    """Several sets of records, mixed by weight.

    Args:
        sources: the records of every source.
        weights: of every source, any positive scale.
        seed: of the order.

    Raises:
        DataError: a source without records, or with a share below 1/1000.
    """

    def __init__(self, sources: Many[Many[Record]], weights: Many[float], *, seed: int):
        self.sources, self.seed = sources, seed
        for i, records in enumerate(sources):
            if not records:
                raise DataError(
                    "no records",
                    place=f"data.train[{i}]",
                    fix="Check the file with `vlduet data check`",
                )
        exact = np.array(weights) / sum(weights) * SCHEDULE_BLOCK_SIZE
        counts = np.floor(exact).astype(int)
        for i in np.argsort(counts - exact, kind="stable")[: SCHEDULE_BLOCK_SIZE - counts.sum()]:
            counts[i] += 1  # largest remainders first
        if counts.min() == 0:
            raise DataError(
                "a source's share is below 1/1000", place="data.train", fix="Raise its weight"
            )
        self.counts = counts
        self._schedule = lru_cache(maxsize=4)(self._make_schedule)
        self._order = lru_cache(maxsize=2 * len(sources))(self._make_order)

    def __getitem__(self, position: int) -> Sample:
        """The sample at `position`, in constant time."""
        block, within = divmod(position, SCHEDULE_BLOCK_SIZE)
        sources, ranks = self._schedule(block)
        source = int(sources[within])
        nth = block * int(self.counts[source]) + int(
            ranks[within]
        )  # how often this source was picked before
        epoch, i = divmod(nth, len(self.sources[source]))
        at = int(self._order(source, epoch)[i])
        return Sample(self.sources[source][at], position, self.seed, f"{source}.{at}")

    def step_samples(
        self, step: int, batch_size: int, *, rank: int = 0, world_size: int = 1
    ) -> list[Sample]:
        """This rank's samples of a step: a contiguous share of its `batch_size` positions."""
        begin = step * batch_size + rank * batch_size // world_size
        end = step * batch_size + (rank + 1) * batch_size // world_size
        return [self[p] for p in range(begin, end)]

    def _make_schedule(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Source of every position of a block, and how often it stood in the block before."""
        sources = np.repeat(np.arange(len(self.counts)), self.counts)
        _generator(self.seed, "schedule", block).shuffle(sources)
        ranks = np.empty(SCHEDULE_BLOCK_SIZE, dtype=int)
        for source, count in enumerate(self.counts):
            ranks[sources == source] = np.arange(count)
        return sources, ranks

    def _make_order(self, source: int, epoch: int) -> np.ndarray:
        return _generator(self.seed, "order", source, epoch).permutation(len(self.sources[source]))


def _generator(*key: object) -> np.random.Generator:
    # Philox keyed by a hash: independent streams for neighbouring seeds, the same on every platform.
    digest = hashlib.sha256(":".join(map(str, key)).encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "big")))
