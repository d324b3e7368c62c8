"""Runs before and after training are compared item by item."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from vlduet.config import load_run_config
from vlduet.errors import ConfigError
from vlduet.eval.benchmarks.scores import MetricSample, average, paired_difference
from vlduet.eval.comparison import BenchmarkChange, RunScores, before_and_after, read_run_scores
from vlduet.eval.run import SCORES_FILE


def make_run(name: str, *, accuracy: list[float], files: str = "hash", seed: int = 0) -> RunScores:
    """Return a run with one number of two benchmarks, retrieval stored first."""
    samples: dict[str, dict[str, MetricSample]] = {
        "winoground": {"text": average(accuracy)},
        "pope": {"F1": average(accuracy), "accuracy": average(accuracy)},
    }
    scores = {}
    for benchmark, numbers in samples.items():
        values = {}
        for number, sample in numbers.items():
            value = sample.estimate(seed)
            values[number] = {"mean": value.mean, "low": value.low, "high": value.high}
            values[number]["n"] = value.n
        scores[benchmark] = {"values": values, "files": {"x": files}, "seed": seed}
    return RunScores(name, scores, samples)


def test_changes_are_paired_and_generation_comes_first() -> None:
    before = make_run("before", accuracy=[1, 1, 0, 0])
    after = make_run("after", accuracy=[1, 0, 0, 0])
    changes = before_and_after(before, after)
    assert [(change.benchmark, change.number) for change in changes] == [
        ("pope", "F1"),
        ("winoground", "text"),
    ]
    pope = changes[0]
    assert (pope.before.mean, pope.after.mean) == (50.0, 25.0)
    assert pope.change is not None and pope.change.mean == -25.0 and pope.change.n == 4
    assert pope.change.high == 0.0, "no item got better"


def test_equal_predictions_are_level_with_an_empty_interval() -> None:
    run = make_run("model", accuracy=[1, 0, 1, 1])
    for change in before_and_after(run, replace(run, name="copy")):
        assert change.change is not None
        assert (change.change.low, change.change.high, change.verdict) == (0.0, 0.0, "level")


@pytest.mark.parametrize(
    "after",
    [
        make_run("other files", accuracy=[1, 0], files="other"),
        make_run("other seed", accuracy=[1, 0], seed=1),
        replace(make_run("without items", accuracy=[1, 0]), samples={"pope": {}, "winoground": {}}),
        make_run("other items", accuracy=[1, 0, 0]),
    ],
    ids=lambda run: run.name,
)
def test_runs_on_other_items_are_not_comparable(after: RunScores) -> None:
    changes = before_and_after(make_run("before", accuracy=[1, 1]), after)
    assert [change.verdict for change in changes] == ["not comparable"] * 2


@pytest.mark.parametrize(
    ("low", "high", "verdict"), [(1.0, 2.0, "better"), (-1.0, 1.0, "level"), (-2.0, -1.0, "worse")]
)
def test_verdict_says_what_the_interval_resolves(low: float, high: float, verdict: str) -> None:
    value = average([1.0, 0.0]).estimate()
    change = replace(value, low=low, high=high)
    assert BenchmarkChange("pope", "F1", value, value, change).verdict == verdict


def test_benchmarks_of_one_run_alone_are_left_out() -> None:
    before = make_run("before", accuracy=[1, 0])
    after = make_run("after", accuracy=[1, 0])
    del after.scores["winoground"]
    before.scores["pope"]["values"] = {}
    assert before_and_after(before, after) == []


def test_paired_interval_is_narrower_than_that_of_one_run() -> None:
    difficulty = np.random.default_rng(0).random(300)
    better = average((difficulty + 0.05 > 0.5).astype(float))
    worse = average((difficulty > 0.5).astype(float))
    difference = paired_difference(better, worse)
    assert difference is not None and difference.low > 0
    unpaired = better.estimate()
    assert difference.high - difference.low < (unpaired.high - unpaired.low) / 2
    assert paired_difference(better, average([1.0, 0.0])) is None


def test_folder_without_scores_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no scores here"):
        read_run_scores(tmp_path)


def test_a_run_has_a_training_if_all_of_its_scores_have_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tree = load_run_config("vladva-nano").model_dump(mode="json")
    facts = {"config": tree, "options": {}, "steps": 3, "records": [4]}

    def read(*trainings: object) -> RunScores:
        for i, training in enumerate(trainings):
            path = tmp_path / str(i) / SCORES_FILE
            path.parent.mkdir(exist_ok=True)
            made_by = {} if training is None else {"training": training}
            path.write_text(json.dumps({"benchmark": str(i), "made_by": made_by}))
        return read_run_scores(tmp_path)

    training = read(facts, facts).training
    assert training is not None and training.config.preset == "vladva-nano"
    assert read(facts, {**facts, "steps": 5}).training is None
    assert read(facts, None).training is None
    assert not caplog.records
    assert read(facts, {**facts, "config": {**tree, "key of a later version": 1}}).training is None
    (record,) = caplog.records
    assert "key of a later version" in record.message and "no row of a paper" in record.message
