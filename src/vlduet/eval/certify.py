"""Certify the scorers: released predictions of others must give the published numbers.

The published numbers and the names of the prediction files are data (``certification.json``); the
official files and the predictions are the user's. A target whose files are missing is left out and
says why.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vlduet.errors import ConfigError, VLDuetError
from vlduet.eval.benchmarks.official_files import OfficialFiles
from vlduet.eval.benchmarks.registry import get_benchmark
from vlduet.eval.predictions import ModelFunctions
from vlduet.eval.run import evaluate, import_predictions, import_reviews
from vlduet.structured_files import read_json_object

TARGETS_FILE = Path(__file__).parent / "certification.json"


@dataclass(frozen=True, slots=True)
class CertificationTarget:
    """One published number that our scorers must reproduce."""

    model: str
    benchmark: str
    value: str
    """Name of the number in scores.json."""
    target: float
    """The published number."""
    tolerance: float
    """Largest difference that counts as agreement."""
    predictions: str
    """Glob pattern of the predictions file in the folder of released predictions."""
    questions: str = ""
    """Glob pattern of LLaVA's question file, where its ids are needed; else empty."""
    reviews: str = ""
    """Glob pattern of the file of grader reviews, where the benchmark needs them; else empty."""


@dataclass(frozen=True, slots=True)
class CertificationOutcome:
    """A target with the number that our scorers give."""

    target: CertificationTarget
    value: float | None
    """The number by our scorers; None where it could not be computed."""
    problem: str = ""
    """Why it could not be computed."""

    @property
    def verdict(self) -> str:
        """Comparison with the target: ``agrees``, ``differs`` or ``left out``."""
        if self.value is None:
            return "left out"
        distance = abs(self.value - self.target.target)
        return "agrees" if distance <= self.target.tolerance else "differs"

    def to_json(self) -> dict[str, Any]:
        """Return the outcome for `vlduet certify --json`."""
        return {
            "target": asdict(self.target),
            "found": self.value,
            "why": self.problem,
            "verdict": self.verdict,
        }


def load_targets(file: Path = TARGETS_FILE) -> list[CertificationTarget]:
    """Return all published numbers of a targets file; raise ConfigError if it is broken."""
    rows = read_json_object(file, {"targets": list}, error_class=ConfigError, fix="Correct it")[
        "targets"
    ]
    return [CertificationTarget(**row) for row in rows]


def certify(
    predictions: Path, *, data: Path, runs: Path, targets: Sequence[CertificationTarget]
) -> list[CertificationOutcome]:
    """Score the released predictions of every target and compare with the published number.

    Args:
        predictions: folder of released predictions.
        data: folder of the official files that `vlduet eval --list` names.
        runs: its folder ``MODEL/BENCHMARK`` gets the predictions and reviews, replacing those that
            are there, and the scores.
        targets: published numbers.

    Returns:
        One outcome per target, in order. Where a VLDuetError prevents the scoring, the value is
        None and the problem is its message.
    """
    outcomes = []
    for target in targets:
        try:
            value = _score_target(target, predictions, data=data, runs=runs)
            outcomes.append(CertificationOutcome(target, value))
        except VLDuetError as error:
            outcomes.append(CertificationOutcome(target, None, str(error)))
    return outcomes


def _score_target(target: CertificationTarget, folder: Path, *, data: Path, runs: Path) -> float:
    """Import the released predictions of a target, score them and return its number.

    Args:
        folder: folder of released predictions.
        data, runs: see `certify`; predictions, reviews and scores are written.

    Raises:
        VLDuetError: the benchmark is unknown, a file is missing, ambiguous or broken, or items have
            no prediction.
        KeyError: the benchmark has no number of the target's name.
    """
    benchmark = get_benchmark(target.benchmark)
    source = OfficialFiles(data)
    model_runs = runs / target.model
    file = _find_file(folder, target.predictions)
    questions = _find_file(folder, target.questions) if target.questions else None
    import_predictions(benchmark, file, source=source, runs=model_runs, questions=questions)
    if target.reviews:
        import_reviews(benchmark, _find_file(folder, target.reviews), runs=model_runs)
    result = evaluate(benchmark, ModelFunctions(), source=source, runs=model_runs, provenance={})
    if result["missing"]:
        num_items = result["facts"].get("items")
        raise ConfigError(
            f"{result['missing']} of {num_items} items have no prediction",
            place=folder / target.predictions,
            fix="Take the whole file, and the official split",
        )
    return float(result["values"][target.value]["mean"])


def _find_file(folder: Path, pattern: str) -> Path:
    """Return the one file that matches a pattern. Raises ConfigError for none or several."""
    files = sorted(folder.glob(pattern))
    if len(files) != 1:
        names = ", ".join(path.name for path in files) or "nothing"
        raise ConfigError(
            f"'{pattern}' should name one file, it names {names}",
            place=folder,
            fix="Put exactly one file there, under such a name",
        )
    return files[0]
