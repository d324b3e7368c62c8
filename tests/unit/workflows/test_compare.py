"""`vlduet compare`: every run is made once, a stopped comparison goes on, and the table tells what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers import runs
from vlduet import config
from vlduet.config import ComparisonConfig
from vlduet.errors import ConfigError, VLDuetError
from vlduet.workflows import compare


@pytest.fixture
def settings(tmp_path: Path) -> ComparisonConfig:
    path = tmp_path / "compare.yaml"
    tree = {
        "base": str(runs.write_run_config(tmp_path, steps=2, log_every=1)),
        "out": str(tmp_path / "compared"),
        "seeds": [0, 1],
        "overrides": ["train.batch_size=3"],
        "runs": {"joint": [], "generative": ["objectives={language: 1}"]},
    }
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return config.load_comparison_config(path)


def test_it_goes_on_where_it_was_stopped_and_tells(
    settings: ComparisonConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, made = compare.train, []

    def stopping(plan: Any, **rest: Any) -> Path:
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(plan.out)
        return real(plan, **rest)

    monkeypatch.setattr(compare, "train", stopping)
    with pytest.raises(KeyboardInterrupt):
        compare.run_comparison(settings)
    monkeypatch.setattr(
        compare, "train", lambda plan, **rest: made.append(plan.out) or real(plan, **rest)
    )
    found = compare.run_comparison(settings)
    out = settings.out
    assert made == [
        out / name / f"seed-{seed}" for name in ("joint", "generative") for seed in (0, 1)
    ]
    assert found == json.loads((out / "table.json").read_text())
    assert list(found["runs"]) == ["before training", "joint", "generative"]
    for name in ("joint", "generative"):
        values = found["runs"][name]["values"]
        for seed in (0, 1):
            last = json.loads(
                (out / name / f"seed-{seed}" / "metrics.jsonl").read_text().splitlines()[-1]
            )
            assert values["caption_cross_entropy"][seed] == last["validation/caption_cross_entropy"]
        assert all(len(each) == 2 for each in values.values()) and values["seconds a step"][0] > 0
    assert (
        sorted(p.name for p in (out / "features").glob("*/*.npy"))
        and not (made[0] / "features").exists()
    )

    compare.run_comparison(settings)
    assert len(made) == 4, "everything is finished"
    lines = (out / "table.md").read_text().splitlines()
    assert lines[0].startswith("| run | text_to_image/hit@1 |") and lines[3].startswith("| joint |")
    assert "±" in lines[3] and "- **generative**: `objectives={language: 1}`" in lines

    other = settings.model_copy(update={"overrides": ["train.batch_size=4"]})
    with pytest.raises(ConfigError, match=r"seed-0: train.batch_size was 3, is 4\. .*remove"):
        compare.run_comparison(other)


def test_a_mistake_in_the_last_run_costs_nothing(settings: ComparisonConfig) -> None:
    for wrong, message in (
        ("train.stepz=1", "Did you mean 'steps'"),
        ("data.validation=null", "same records"),
        ("objectives.contrastve=1", "Did you mean 'contrastive'"),
        ("data.train=[{path: nope.jsonl}]", "no such file"),
        ("model.path=nope", "Name a model folder"),
    ):
        bad = settings.model_copy(update={"runs": {"joint": [], "bad": [wrong]}})
        with pytest.raises(VLDuetError, match=message):
            compare.run_comparison(bad)
    assert not settings.out.exists()


def test_the_spread_is_over_seeds() -> None:
    values = {"text_to_image/hit@1": [0.5, 0.7], "caption_cross_entropy": [2.0, 2.5]}
    runs_of = {
        "one": {"overrides": [], "values": values},
        "two": {"overrides": ["a=1"], "values": {}},
    }
    told = compare.format_table(
        {"base": "b.yaml", "overrides": [], "seeds": [0, 1], "runs": runs_of}
    )
    assert "| one | 60.0 ± 14.1 % | 2.250 ± 0.354 |" in told and "| two |  |  |" in told


def test_an_unknown_key_of_a_comparison_is_named(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("base: b.yaml\nout: o\nruns: {a: []}\nseed: [0]\n")
    with pytest.raises(ConfigError, match=r"unknown key 'seed'.*Did you mean 'seeds'"):
        config.load_comparison_config(tmp_path / "c.yaml")


def test_a_dual_encoder_is_finished_too(tmp_path: Path) -> None:
    plan = config.load_run_config(runs.write_run_config(tmp_path))
    plan.out.mkdir(parents=True)
    config.save_run_config(plan, plan.out / "config.yaml")
    assert not compare._is_finished(plan)
    (plan.out / "model").mkdir()
    (plan.out / "model" / "dual.json").write_text("{}")
    assert compare._is_finished(plan)
