"""The model that is measured, and helpers of all groups of measures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlduet.data.formats import read_jsonl
from vlduet.data.records import Record
from vlduet.errors import ConfigError
from vlduet.eval.benchmarks.scores import MetricSample, average
from vlduet.model.duet import DuetModel

Measurements = dict[str, MetricSample]
"""Samples by the name of the number."""
Embed = Callable[[Sequence[Any]], NDArray[np.float32]]
"""Images, texts or tuples of both -> float[N, E]."""


@dataclass(frozen=True)
class Subject:
    """A model to measure, with what its measurements need."""

    embed_document: Embed
    """Function that embeds what is searched."""
    embed_query: Embed
    """Function that embeds what is searched for."""
    model: DuetModel | None
    """The model, unless it only embeds."""
    data: Path
    """Folder of the corpora, as `vlduet data fetch` writes it."""
    run: Path | None = None
    """Folder of the training run; None for a row without training."""
    batch_size: int = 32
    """Number of records of a training step."""
    retriever: Embed | None = None
    """Function of the external retriever, which embeds items of several parts."""

    @property
    def generator(self) -> DuetModel:
        """The model; ConfigError for one that only embeds."""
        if self.model is None:
            raise ConfigError("this row only embeds", fix="Remove the group from its measures")
        return self.model

    @cached_property
    def stamps(self) -> list[Record]:
        """Test stamps with an image and a caption."""
        return read_pairs(self.data / "stamps" / "test.jsonl")


def read_pairs(path: Path) -> list[Record]:
    """Return the records of a file with an image and a short caption; DataError if it is broken."""
    return [record for record in read_jsonl(path) if record.image is not None and record.short]


def percent(values: NDArray[np.bool_]) -> MetricSample:
    """Return the share of True in percent."""
    return average(np.asarray(values, dtype=np.float64))
