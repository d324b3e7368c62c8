"""Counts of what training makes of its records: used, dropped or cut, by cause."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Many
from dataclasses import dataclass, field

from vlduet.data.quarantine import generalize_cause
from vlduet.data.sequences import Sequence
from vlduet.errors import DataError

NOTHING_TO_LEARN = "nothing for the losses"
"""Cause of a record whose sequences have no output that a loss with a weight needs."""
CUT_TEXT = "a text cut to the limit of tokens"
"""Cause of a record that is used without a part of its texts."""

MAX_PLACES = 20
"""Number of places that are remembered for a cause."""


@dataclass
class UsageCounts:
    """Counts of records that were laid out, and of those that were dropped or cut, by cause."""

    num_records: int = 0
    """Number of records that were laid out, repeated ones included."""
    num_labels: int = 0
    """Number of their tokens that have a label."""
    num_anchors: int = 0
    """Number of their embeddings."""
    causes: Counter[str] = field(default_factory=Counter)
    """Number of records that were dropped or cut, by cause; a record counts once."""
    remedies: dict[str, str] = field(default_factory=dict)
    """Remedy of a cause, as an imperative sentence; not every cause has one."""
    places: dict[str, list[str]] = field(default_factory=dict)
    """First places of the errors of a cause, up to MAX_PLACES."""
    num_reported: int = 0
    """Value of `num_problems` when `has_news` was last called."""

    @property
    def num_problems(self) -> int:
        """Number of records that were dropped or cut."""
        return self.causes.total()

    def has_news(self) -> bool:
        """Return whether a record was dropped or cut since the last call, which is remembered."""
        num_reported, self.num_reported = self.num_reported, self.num_problems
        return self.num_problems > num_reported

    def add_drop(self, error: DataError) -> None:
        """Count a record that cannot be laid out."""
        cause = generalize_cause(error.message)
        self.num_records += 1
        self.causes[cause] += 1
        if error.fix:
            self.remedies.setdefault(cause, error.fix)
        places = self.places.setdefault(cause, [])
        if error.place and len(places) < MAX_PLACES:
            places.append(error.place)

    def add_sequences(self, sequences: Many[Sequence], *, labels: bool, anchors: bool) -> None:
        """Count a record by its sequences; `labels` and `anchors` say which the losses need."""
        num_labels = sum(sequence.num_labels for sequence in sequences) if labels else 0
        num_anchors = sum(len(sequence.anchors) for sequence in sequences) if anchors else 0
        self.num_records += 1
        self.num_labels += num_labels
        self.num_anchors += num_anchors
        if not num_labels and not num_anchors:
            self.causes[NOTHING_TO_LEARN] += 1
        elif any(sequence.num_cut_tokens for sequence in sequences):
            self.causes[CUT_TEXT] += 1
            self.remedies[CUT_TEXT] = "Raise data.max_tokens"

    def __str__(self) -> str:
        """Return ``3 of 1,000 records dropped or cut (0.3 %): 2 x CAUSE, 1 x CAUSE``."""
        share = self.num_problems / max(1, self.num_records)
        text = f"{self.num_problems:,} of {self.num_records:,} records dropped or cut ({share:.1%})"
        return f"{text}: {format_causes(self.causes)}" if self.causes else text


def format_causes(causes: Counter[str]) -> str:
    """Return causes with their counts, the most frequent first: ``2 x CAUSE, 1 x CAUSE``."""
    return ", ".join(f"{count:,} x {cause}" for cause, count in causes.most_common())
