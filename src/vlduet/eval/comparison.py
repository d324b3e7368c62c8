"""Read the scores of evaluation runs, and compare a model before and after joint training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlduet.errors import ConfigError
from vlduet.eval.benchmarks.registry import BENCHMARKS
from vlduet.eval.benchmarks.scores import MetricSample, MetricValue, paired_difference
from vlduet.eval.paper_rows import Training
from vlduet.eval.run import SCORES_FILE, read_samples
from vlduet.logs import logger
from vlduet.structured_files import read_json_object


@dataclass(frozen=True, slots=True)
class RunScores:
    """All scores of one model, as `vlduet eval --to` wrote them."""

    name: str
    scores: dict[str, dict[str, Any]]
    """Benchmark -> content of its ``scores.json``."""
    samples: dict[str, dict[str, MetricSample]]
    """Benchmark -> number -> its values item by item; empty where they were not stored."""
    training: Training | None = None
    """How the model was trained; None where its scores do not say it, or not all the same."""

    def find_value(self, benchmark: str, name: str) -> MetricValue | None:
        """Return one number of a benchmark, or None where it was not measured."""
        value = self.scores.get(benchmark, {}).get("values", {}).get(name)
        return None if value is None else MetricValue(**value)


def read_run_scores(folder: Path) -> RunScores:
    """Read the scores and samples in the sub-folders of a folder that `vlduet eval --to` wrote.

    The run is named after the folder.

    Raises:
        ConfigError: no sub-folder contains scores.
            A scores.json is broken.
    """
    scores = {}
    samples = {}
    trainings: list[Training | None] = []
    for path in sorted(folder.glob(f"*/{SCORES_FILE}")):
        fields = {"benchmark": str}
        fix = "Score the predictions again"
        score = read_json_object(path, fields, error_class=ConfigError, fix=fix)
        scores[score["benchmark"]] = score
        samples[score["benchmark"]] = read_samples(path.parent)
        trainings.append(_read_training(score, place=path))
    if not scores:
        fix = "Name a folder that 'vlduet eval --to' wrote"
        raise ConfigError("no scores here", place=folder, fix=fix)
    is_equal = all(training == trainings[0] for training in trainings)
    return RunScores(folder.name, scores, samples, trainings[0] if is_equal else None)


def _read_training(score: dict[str, Any], *, place: Path) -> Training | None:
    """Return how the model of a scores.json was trained, or None where the file does not say it.

    A training that this version does not understand is None, too, and a warning names `place`.
    """
    facts = score.get("made_by", {}).get("training")
    if facts is None:
        return None
    try:
        return Training.from_json(facts, place=place)
    except ConfigError as error:
        logger.warning(f"warning: the run is compared with no row of a paper: {error}")
        return None


@dataclass(frozen=True, slots=True)
class BenchmarkChange:
    """The main number of one benchmark before and after joint training."""

    benchmark: str
    number: str
    """Name of the number that papers report."""
    before: MetricValue
    after: MetricValue
    change: MetricValue | None
    """after - before, paired over items; None where the runs did not score the same items."""

    @property
    def verdict(self) -> str:
        """Outcome that the paired interval resolves.

        One of ``better``, ``level``, ``worse``, or ``not comparable`` without a paired change.
        """
        if self.change is None:
            return "not comparable"
        if self.change.low > 0:
            return "better"
        return "worse" if self.change.high < 0 else "level"


def before_and_after(before: RunScores, after: RunScores) -> list[BenchmarkChange]:
    """Return the change of every registered benchmark that both runs have.

    They are in the order of `BENCHMARKS`, but those of the protocols ``retrieval`` and ``pairs``
    come last. The compared number is the first one in `after`, which papers report; a benchmark
    that lacks it in either run is left out.
    """
    discriminative = ("retrieval", "pairs")
    names = sorted(BENCHMARKS, key=lambda name: BENCHMARKS[name].protocol in discriminative)
    changes = []
    for name in names:
        if name not in before.scores or name not in after.scores:
            continue
        number = next(iter(after.scores[name]["values"]), "")
        old = before.find_value(name, number)
        new = after.find_value(name, number)
        if old is None or new is None:
            continue
        change = _paired_change(before, after, benchmark=name, number=number)
        changes.append(BenchmarkChange(name, number, old, new, change))
    return changes


def _paired_change(
    before: RunScores, after: RunScores, *, benchmark: str, number: str
) -> MetricValue | None:
    """Return after - before of one number with its interval, paired over items.

    None is returned where the runs differ in official files, seed or number of items, or lack
    values per item. Both runs must have the benchmark; otherwise KeyError is raised.
    """
    old = before.scores[benchmark]
    new = after.scores[benchmark]
    if new["files"] != old["files"] or new["seed"] != old["seed"]:
        return None
    new_sample = after.samples[benchmark].get(number)
    old_sample = before.samples[benchmark].get(number)
    if new_sample is None or old_sample is None:
        return None
    return paired_difference(new_sample, old_sample, seed=new["seed"])
