"""Certification of the scorers: released predictions of others, scored by our rules, must give the published numbers.

The numbers and where their predictions lie are data (``certification.json``); the official files and the predictions are
the user's. A target whose files are not there is named and left out: only those that were compared count.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlduet.errors import ConfigError, VLDuetError
from vlduet.eval.benchmarks.source import Source
from vlduet.eval.benchmarks.table import known
from vlduet.eval.predictions import ModelFunctions
from vlduet.eval.run import evaluate, import_predictions, import_reviews

TARGETS_FILE = Path(__file__).parent / "certification.json"


@dataclass(frozen=True, slots=True)
class CertificationTarget:
    """One published number."""

    model: str
    benchmark: str
    value: str
    """Name of the number in scores.json."""
    target: float
    tolerance: float
    predictions: str
    """Pattern of the file below the folder of predictions."""
    questions: str = ""
    reviews: str = ""


@dataclass(frozen=True, slots=True)
class CertificationOutcome:
    """What a target came to."""

    target: CertificationTarget
    found: float | None
    """The number by our rules; None where it could not be computed."""
    why: str = ""
    """Why it could not."""

    @property
    def verdict(self) -> str:
        """agrees, differs, or left out."""
        if self.found is None:
            return "left out"
        return (
            "agrees" if abs(self.found - self.target.target) <= self.target.tolerance else "differs"
        )


def load_targets(file: Path = TARGETS_FILE) -> list[CertificationTarget]:
    """All published numbers that are known."""
    return [
        CertificationTarget(**row)
        for row in json.loads(file.read_text(encoding="utf-8"))["targets"]
    ]


def certify(
    answers: Path, *, data: Path, runs: Path, targets: list[CertificationTarget]
) -> list[CertificationOutcome]:
    """Score the predictions of every target and compare.

    Args:
        answers: the folder of released predictions.
        data: the official files, as `vlduet eval --list` says.
        runs: gets a folder a model and benchmark.
    """
    found = []
    for target in targets:
        try:
            found.append(CertificationOutcome(target, _scored(target, answers, data, runs)))
        except VLDuetError as error:
            found.append(CertificationOutcome(target, None, str(error)))
    return found


def _scored(target: CertificationTarget, answers: Path, data: Path, runs: Path) -> float:
    benchmark, source, to = known(target.benchmark), Source(data), runs / target.model
    questions = _file(answers, target.questions) if target.questions else None
    import_predictions(
        benchmark, _file(answers, target.predictions), source=source, runs=to, questions=questions
    )
    if target.reviews:
        import_reviews(benchmark, _file(answers, target.reviews), runs=to)
    result: dict[str, Any] = evaluate(
        benchmark, ModelFunctions(), source=source, runs=to, provenance={}
    )
    if result["missing"]:
        what = f"{result['missing']} of {result['facts'].get('items')} items have no prediction"
        raise ConfigError(
            what,
            place=answers / target.predictions,
            fix="Take the whole file, and the official split",
        )
    return float(result["values"][target.value]["mean"])


def _file(folder: Path, pattern: str) -> Path:
    """The one file that matches. Raises ConfigError for none or several."""
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "nothing"
        fix = "Put exactly one file there, under such a name"
        raise ConfigError(
            f"'{pattern}' should name one file, it names {names}", place=folder, fix=fix
        )
    return found[0]
