"""A comparison trains every run once, resumes stopped ones, and tabulates their metrics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from helpers import runs
from vlduet import config
from vlduet.config import ComparisonConfig, RunConfig
from vlduet.errors import ConfigError, VLDuetError
from vlduet.eval.benchmarks.scores import BenchmarkScore, average
from vlduet.eval.run import SAMPLES_FILE, SCORES_FILE, write_samples
from vlduet.workflows import compare, comparison_measures
from vlduet.workflows.comparison_measures import ComparisonMeasures

RUN_NAMES = ("joint", "generative")


@pytest.fixture
def settings(tmp_path: Path) -> ComparisonConfig:
    tree = {
        "base": str(runs.write_run_config(tmp_path, steps=2, log_every=1)),
        "out": str(tmp_path / "compared"),
        "seeds": [0, 1],
        "overrides": ["train.batch_size=3"],
        "runs": {"joint": [], "generative": ["objectives={language: 1}"]},
    }
    path = tmp_path / "compare.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return config.load_comparison_config(path)


class RecordedTraining:
    """Replacement of `train` that trains and records the folders of the runs.

    After `max_runs` runs, the next one raises KeyboardInterrupt.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folders: list[Path] = []
        self.max_runs: int | None = None
        self._train = compare.train
        monkeypatch.setattr(compare, "train", self)

    def __call__(self, run: RunConfig, **options: Any) -> Path:
        if len(self.folders) == self.max_runs:
            raise KeyboardInterrupt
        self.folders.append(run.out)
        return self._train(run, **options)


def test_a_stopped_comparison_continues_and_tabulates_all_runs(
    settings: ComparisonConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = RecordedTraining(monkeypatch)
    training.max_runs = 3
    with pytest.raises(KeyboardInterrupt):
        compare.run_comparison(settings)
    training.max_runs = None
    table = compare.run_comparison(settings)
    out = settings.out
    folders = [out / name / f"seed-{seed}" for name in RUN_NAMES for seed in (0, 1)]
    assert training.folders == folders
    assert table == json.loads((out / "table.json").read_text())
    assert list(table["runs"]) == ["before training", *RUN_NAMES]
    for name in RUN_NAMES:
        values = table["runs"][name]["values"]
        assert all(len(seeds) == 2 for seeds in values.values())
        assert values["seconds a step"][0] > 0
        for seed in (0, 1):
            metrics = (out / name / f"seed-{seed}" / "metrics.jsonl").read_text().splitlines()
            last = json.loads(metrics[-1])
            assert values["caption_cross_entropy"][seed] == last["validation/caption_cross_entropy"]
    assert list((out / "features").glob("*/*.npy")), "all runs share one feature cache"
    assert not (folders[0] / "features").exists()

    compare.run_comparison(settings)
    assert training.folders == folders, "finished runs are not trained again"
    lines = (out / "table.md").read_text().splitlines()
    assert lines[0].startswith("| run | text_to_image/hit@1 |")
    assert lines[3].startswith("| joint |") and "±" in lines[3]
    assert "- **generative**: `objectives={language: 1}`" in lines

    other = settings.model_copy(update={"overrides": ["train.batch_size=4"]})
    with pytest.raises(ConfigError, match=r"seed-0: train.batch_size was 3, is 4\. .*remove"):
        compare.run_comparison(other)


def write_benchmark_scores(model: Path, folder: Path) -> None:
    """Write scores of a benchmark that the run `joint` solves and the other does not."""
    values = [float(model.parts[-3] == "joint")] * 5
    score = BenchmarkScore({"R@1": average(values), "R@5": average(values)})
    (folder / "stamps").mkdir(parents=True, exist_ok=True)
    with (folder / "stamps" / SAMPLES_FILE).open("wb") as file:
        write_samples(file, score)
    (folder / "stamps" / SCORES_FILE).write_text('{"benchmark": "builtin_stamps"}')


def test_the_reference_is_compared_item_by_item(
    settings: ComparisonConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = {"reference": "joint", "benchmarks": ["builtin_stamps"]}
    settings = settings.model_copy(update=update)
    questions = (("what is it?", "a cat"), ("is it red?", "no"))
    measures = ComparisonMeasures(questions, write_benchmark_scores)
    table = compare.run_comparison(settings, measures=measures)
    values = {name: table["runs"][name]["values"] for name in RUN_NAMES}
    names = {
        "text_to_image/hit@10": "text_to_image/hit@10",
        "caption": "caption_cross_entropy",
        "caption, wrong image": "caption_cross_entropy_wrong_image",
        "chat": "chat",
        "builtin_stamps R@1": "builtin_stamps R@1",
    }
    differences = table["differences"]["generative"]
    assert "builtin_stamps R@5" not in differences
    for measure, metric in names.items():
        means = [np.mean(values[name][metric]) for name in RUN_NAMES]
        assert differences[measure]["mean"] == pytest.approx(means[0] - means[1], abs=1e-5)
        assert differences[measure]["low"] <= differences[measure]["mean"] + 1e-5
        assert len(values["joint"][metric]) == 2, "one value for each seed"
    assert differences["builtin_stamps R@1"]["low"] == 100
    lines = (settings.out / "table.md").read_text().splitlines()
    header = next(line for line in lines if line.startswith("| joint minus |"))
    row = next(line for line in lines[lines.index(header) :] if line.startswith("| generative"))
    assert row.endswith("| +100.000 [+100.000, +100.000] |")

    monkeypatch.setattr(comparison_measures, "measure_model", None)
    assert compare.run_comparison(settings, measures=measures) == table, "nothing is measured again"


@pytest.mark.parametrize(
    ("update", "message"),
    [
        ({"reference": "joined"}, r"no run 'joined'.*Did you mean 'joint'"),
        ({"benchmarks": ["builtin_stamp"]}, "builtin_stamps"),
    ],
)
def test_an_unknown_reference_or_benchmark_is_refused(
    settings: ComparisonConfig, update: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        compare.run_comparison(settings.model_copy(update=update))
    assert not settings.out.exists() or not list(settings.out.rglob("config.yaml"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stepz=1", "Did you mean 'steps'"),
        ("data.validation=null", "same records"),
        ("objectives.contrastve=1", "Did you mean 'contrastive'"),
        ("data.train=[{path: nope.jsonl}]", "no such file"),
        ("model.path=nope", "no such folder"),
    ],
)
def test_a_mistake_in_the_last_run_is_found_before_the_first_one_starts(
    settings: ComparisonConfig, override: str, message: str
) -> None:
    wrong = settings.model_copy(update={"runs": {"joint": [], "bad": [override]}})
    with pytest.raises(VLDuetError, match=message):
        compare.run_comparison(wrong)
    assert not settings.out.exists()


def test_runs_of_epochs_must_have_the_same_number_of_steps(
    settings: ComparisonConfig, tmp_path: Path
) -> None:
    """A run that cannot use all records has shorter epochs."""
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write('{"id": "new", "image": "0.png", "long": "a long text alone"}\n')
    shared = ["train.epochs=1", "train.batch_size=4", "data.max_dropped=1"]
    names = {"joint": [], "contrastive": ["objectives={contrastive: 1}"]}
    changed = settings.model_copy(update={"overrides": shared, "runs": names})
    with pytest.raises(ConfigError, match=r"joint 4, contrastive 3\. Set train\.steps"):
        compare.run_comparison(changed)
    assert not settings.out.exists()


def test_runs_on_other_sources_hold_out_other_records(settings: ComparisonConfig) -> None:
    names = {"joint": [], "weighted": ["data.train.0.weight=2"], "other": ["data.train.0.root=x"]}
    changed = settings.model_copy(update={"overrides": ["data.validation=0.2"], "runs": names})
    with pytest.raises(ConfigError, match="same records"):
        compare.run_comparison(changed)


def test_table_cells_hold_mean_and_spread_over_the_seeds() -> None:
    values = {"text_to_image/hit@1": [0.5, 0.7], "caption_cross_entropy": [2.0, 2.5]}
    table = {
        "base": "b.yaml",
        "overrides": [],
        "seeds": [0, 1],
        "runs": {
            "one": {"overrides": [], "values": values},
            "two": {"overrides": ["a=1"], "values": {}},
        },
    }
    text = compare.format_table(table)
    assert "| one | 60.0 ± 14.1 % | 2.250 ± 0.354 |" in text and "| two |  |  |" in text
    assert "Base `b.yaml`; seeds 0, 1; mean ±" in text and text.endswith("- **two**: `a=1`\n")


def test_an_unknown_key_of_a_comparison_is_named(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("base: b.yaml\nout: o\nruns: {a: []}\nseed: [0]\n")
    with pytest.raises(ConfigError, match=r"unknown key 'seed'.*Did you mean 'seeds'"):
        config.load_comparison_config(tmp_path / "c.yaml")


def test_a_run_is_finished_when_its_model_folder_exists(tmp_path: Path) -> None:
    run = config.load_run_config(runs.write_run_config(tmp_path))
    run.out.mkdir(parents=True)
    config.save_run_config(run, run.out / "config.yaml")
    assert not compare._is_finished(run)
    (run.out / "model").mkdir()
    (run.out / "model" / "dual.json").write_text("{}")  # a dual encoder counts too
    assert compare._is_finished(run)
