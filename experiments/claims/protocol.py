"""The protocol of the claims: protocol.yaml as checked objects.

tracks    what rows share: preset, overrides, steps, groups of measures
rows      settings that are trained once and used by all claims
claims    statement and numbers of the paper, and comparisons of rows with their rules
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from verdicts import ComparisonRule

from vlduet.errors import ConfigError

PROTOCOL_FILE = Path(__file__).parent / "protocol.yaml"


class ProtocolSection(BaseModel):
    """Base class of the sections of the protocol: immutable, without unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Track(ProtocolSection):
    """Settings and measures that several rows share."""

    about: str
    """Corpora, splits and settings in words."""
    preset: str
    steps: int = Field(gt=0)
    """Number of optimizer steps of a trained row."""
    overrides: list[str]
    """Overrides of the preset; ``$data``, ``$built``, ``$model``, ``$minilm`` and ``$cross`` are
    paths."""
    measures: list[str]
    """Groups of measures (`measures.MEASURES`)."""


class Row(ProtocolSection):
    """One setting, which is trained once per seed."""

    about: str
    track: str
    kind: Literal["trained", "start", "ridge"] = "trained"
    """start: the base model without training. ridge: the ridge baseline."""
    overrides: list[str] = []
    measures: list[str] | None = None
    """Groups of measures; None: those of the track."""
    steps: int | None = None
    """Number of steps; None: that of the track."""
    minutes: float = Field(gt=0)
    """Estimated minutes of one core for a seed, training and measurement together."""

    @property
    def is_seeded(self) -> bool:
        """Whether seeds differ: only training draws random numbers."""
        return self.kind == "trained"


class Comparison(ProtocolSection):
    """A number of a row against that of another row, or a weighted sum of rows."""

    name: str
    number: str = ""
    row: str = ""
    against: str = ""
    """Row that is subtracted; empty for a number that is compared with the margin alone."""
    against_number: str = ""
    """Number of the other row; empty for the same."""
    terms: list[tuple[float, str, str]] = []
    """(factor, row, number) of every term, in place of row and against."""
    direction: Literal["higher", "lower"] = "higher"
    """Whether the claim is that the difference is higher or lower than the margin."""
    margin: float = 0.0
    """Difference in the claimed direction that must be exceeded; see `verdicts`."""
    detectable: Annotated[float, Field(gt=0)]
    """Largest minimum detectable difference with which the comparison can be rejected."""

    @model_validator(mode="after")
    def _check_terms(self) -> Comparison:
        """Raise ValueError unless either terms, or row and number are set."""
        if bool(self.terms) == bool(self.row and self.number):
            raise ValueError("set either terms, or row and number")
        return self

    @property
    def signed_terms(self) -> list[tuple[float, str, str]]:
        """(factor, row, number) of every term, positive in the claimed direction."""
        sign = 1.0 if self.direction == "higher" else -1.0
        if self.terms:
            return [(sign * factor, row, number) for factor, row, number in self.terms]
        terms = [(sign, self.row, self.number)]
        if self.against:
            terms.append((-sign, self.against, self.against_number or self.number))
        return terms


class Claim(ProtocolSection):
    """A claim of a paper, or of the issue, and how it is tested here."""

    id: int
    title: str
    statement: str
    paper: str
    """The paper's numbers with their table, or why there are none."""
    protocol: str
    """Rows and numbers that are compared, in words."""
    comparisons: list[Comparison] = Field(min_length=1)
    further_numbers: list[str] = []
    """Numbers that the table of rows shows beside those that are compared."""


class Pilot(ProtocolSection):
    """Trainings that determine the number of steps, validated on the validation split."""

    row: str
    seeds: list[int]
    lengths: list[int]
    """Numbers of steps that are tried, ascending."""
    min_hits: float
    """Gain in the mean of both hit rates at 10, in points, below which a length is enough."""
    min_nats: float
    """Gain in the cross entropy of captions, in nats per token, below which it is enough."""


class Protocol(ProtocolSection):
    """All of protocol.yaml."""

    seeds: list[int]
    """Seeds of every trained row."""
    min_seeds: int
    """Number of seeds below which nothing is decided."""
    core_minutes: float
    """Minutes of one core that all runs may take together."""
    pilots: dict[str, Pilot]
    """Pilot of a track, by its name."""
    tracks: dict[str, Track]
    rows: dict[str, Row]
    """Rows by name, in the order in which they are run."""
    claims: list[Claim]

    @model_validator(mode="after")
    def _check_references(self) -> Protocol:
        """Raise ValueError for a row, track or pilot that does not exist."""
        for name, row in self.rows.items():
            if row.track not in self.tracks:
                raise ValueError(f"row '{name}' is in no track of the protocol: {row.track}")
        for track, pilot in self.pilots.items():
            if track not in self.tracks or pilot.row not in self.rows:
                raise ValueError(f"the pilot of '{track}' names an unknown track or row")
        for claim in self.claims:
            for comparison in claim.comparisons:
                for _, row, _ in comparison.signed_terms:
                    if row not in self.rows:
                        raise ValueError(f"claim {claim.id} compares the unknown row '{row}'")
        return self

    def get_steps(self, row: Row) -> int:
        """Return the number of training steps of a row."""
        return self.tracks[row.track].steps if row.steps is None else row.steps

    def get_measures(self, row: Row) -> list[str]:
        """Return the groups of measures of a row."""
        return self.tracks[row.track].measures if row.measures is None else row.measures

    def get_seeds(self, row: Row) -> list[int]:
        """Return the seeds of a row: the first one alone where nothing is drawn."""
        return self.seeds if row.is_seeded else self.seeds[:1]

    def get_rule(self, comparison: Comparison) -> ComparisonRule:
        """Return when a comparison holds; without trained rows one seed is enough."""
        is_seeded = any(self.rows[row].is_seeded for _, row, _ in comparison.signed_terms)
        return ComparisonRule(
            comparison.margin, comparison.detectable, self.min_seeds if is_seeded else 1
        )

    def list_claim_rows(self, claim: Claim) -> list[str]:
        """Return the names of the rows that a claim compares, in the order of the protocol."""
        names = set()
        for comparison in claim.comparisons:
            names |= {row for _, row, _ in comparison.signed_terms}
        return [name for name in self.rows if name in names]


@dataclass(frozen=True)
class StudyPaths:
    """Folders of the corpora, models and results of a study."""

    data: Path
    """Corpora, as `vlduet data fetch` writes them."""
    model: Path
    """Base model, as `vlduet model nano` writes it."""
    minilm: Path
    """Sentence encoder, as `vlduet model minilm` writes it."""
    work: Path
    """Trained models, built corpora and features."""
    results: Path
    """JSON files of rows."""

    def substitutions(self) -> Mapping[str, Any]:
        """Return the values of the placeholders in overrides."""
        return {
            "data": self.data,
            "built": self.work / "corpora",
            "model": self.model,
            "minilm": self.minilm,
            "cross": self.work / "cross" / "model",
        }


CANONICAL_PATHS = {
    "data": "data",
    "built": "built",
    "model": "models/nano",
    "minilm": "models/minilm",
    "cross": "models/cross",
}
"""Values of the placeholders in stored settings, which name no folder of a machine."""


def load_protocol(path: Path = PROTOCOL_FILE) -> Protocol:
    """Return the protocol of a YAML file; ConfigError for an invalid one."""
    try:
        return Protocol.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        first = error.errors()[0]
        place = f"{path}: {'.'.join(map(str, first['loc']))}"
        raise ConfigError(first["msg"], place=place, fix="Correct the protocol") from None
