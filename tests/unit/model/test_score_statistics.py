"""Distributions of the scores of unrelated pairs: their shares, and what a damaged file gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers import tiny
from vlduet.errors import ModelError
from vlduet.model.checkpoint import format_manifest, write_score_statistics
from vlduet.model.duet import DuetModel
from vlduet.model.score_statistics import NUM_QUANTILES, ScoreDistribution, ScoreStatistics

SCORES = np.tanh(np.random.default_rng(0).normal(0.1, 0.2, 20_000)).astype(np.float32)
DISTRIBUTION = ScoreDistribution.from_scores(SCORES)


@pytest.mark.parametrize("score", [-0.5, -0.1, 0.0, 0.1, 0.3, 0.5, 0.6, 0.65])
def test_the_share_is_that_of_the_scores(score: float) -> None:
    share = (score <= SCORES).mean()
    assert DISTRIBUTION.share_at_least(score) == pytest.approx(share, rel=0.02, abs=2e-4)


def test_shares_fall_with_the_score_and_are_never_zero() -> None:
    shares = [DISTRIBUTION.share_at_least(score) for score in np.linspace(-1, 1, 501)]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] == 1 and shares[-1] == 1 / 20_001
    assert DISTRIBUTION.share_at_least(DISTRIBUTION.quantiles[-1]) == 1 / 20_001


def test_shares_of_scores_of_the_same_distribution_are_uniform() -> None:
    others = np.tanh(np.random.default_rng(1).normal(0.1, 0.2, 5_000))
    shares = np.sort([DISTRIBUTION.share_at_least(float(score)) for score in others])
    assert np.abs(shares - np.arange(1, 5_001) / 5_000).max() < 0.03


def test_equal_scores_count_as_reached() -> None:
    distribution = ScoreDistribution.from_scores(np.array([0.25] * 9 + [0.75]))
    assert distribution.share_at_least(0.25) == 1
    assert distribution.share_at_least(0.26) == pytest.approx(2 / 11, abs=0.01)
    assert distribution.share_at_least(0.76) == 1 / 11
    constant = ScoreDistribution.from_scores(np.full(3, 0.5))
    assert [constant.share_at_least(score) for score in (0.4, 0.5, 0.6)] == [1, 1, 0.25]


def test_statistics_survive_their_file() -> None:
    other = ScoreDistribution.from_scores(np.array([1.0000001, -0.3]))
    assert other.quantiles[-1] == 1 and other.num_pairs == 2
    keys: Any = {("text", "image"): DISTRIBUTION, ("both", "both"): other}
    statistics = ScoreStatistics(12, keys)
    entry = json.loads(json.dumps(statistics.to_manifest()))
    assert set(entry) == {"records", "text", "both"} and entry["text"]["image"]["pairs"] == 20_000
    assert ScoreStatistics.from_manifest(entry, place="x") == statistics
    assert statistics.share_at_least(0.7, query="text", document="text") is None
    share = statistics.share_at_least(0.3, query="text", document="image")
    assert share == DISTRIBUTION.share_at_least(0.3)
    assert ScoreStatistics.from_manifest(None, place="x") is None


def damaged(**changes: Any) -> dict[str, Any]:
    entry: dict[str, Any] = {"pairs": 5, "quantiles": np.linspace(-1, 1, NUM_QUANTILES).tolist()}
    return {"records": 3, "text": {"image": entry | changes}}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "an object is needed"),
        ({"text": {}}, "'records' is missing"),
        ({"records": 1, "sound": {}}, "'sound' is not one of text, image, both"),
        ({"records": 1, "text": []}, r"score_statistics\.text: an object is needed"),
        ({"records": 1, "text": {"sound": {}}}, "'sound' is not one of"),
        ({"records": 1, "text": {"image": 3}}, r"text\.image: an object is needed"),
        (damaged(pairs=0), "'pairs' is 0"),
        (damaged(pairs=1.5), "'pairs' is 1.5"),
        (damaged(quantiles=[0.1] * (NUM_QUANTILES - 1)), "not 257 numbers"),
        (damaged(quantiles=[0.2, 0.1] + [0.3] * (NUM_QUANTILES - 2)), "ascending order"),
        (damaged(quantiles=[float("nan")] * NUM_QUANTILES), "no number from -1 to 1"),
        (damaged(quantiles=[1.5] * NUM_QUANTILES), "has 1.5"),
        (damaged(quantiles=[True] * NUM_QUANTILES), "no number from -1 to 1"),
        (damaged(quantiles=["0.5"] * NUM_QUANTILES), "no number from -1 to 1"),
        (damaged(quantiles=[10**400] * NUM_QUANTILES), "no number from -1 to 1"),
    ],
)
def test_a_damaged_entry_is_named(value: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message) as raised:
        ScoreStatistics.from_manifest(value, place="vlduet.json")
    assert str(raised.value.place).startswith("vlduet.json: score_statistics")


def test_statistics_of_scores_travel_with_a_model_until_it_changes(
    tmp_path: Path,
) -> None:
    trained_model = tiny.build_duet_model(tmp_path / "base")
    fingerprint = trained_model.fingerprint
    scores = ScoreDistribution.from_scores(np.linspace(-0.2, 0.6, 90))
    statistics = ScoreStatistics(10, {("text", "image"): scores})
    trained_model.score_statistics = statistics
    trained_model.save_pretrained(tmp_path / "model")
    model = DuetModel.from_pretrained(tmp_path / "model")
    assert model.score_statistics == statistics
    assert model.fingerprint == fingerprint
    model.save_merged(tmp_path / "merged")
    assert DuetModel.from_pretrained(tmp_path / "merged").score_statistics == statistics
    limited = DuetModel.from_pretrained(tmp_path / "model", max_tokens=50)
    assert limited.score_statistics == statistics
    model.set_prompts(model.prompts)
    assert model.score_statistics is None
    limited.make_trainable(lora=None, projector=True)
    assert limited.score_statistics is None


def test_texts_of_a_manifest_stay_as_they_are() -> None:
    manifest = {"prompt": "[1,   2] and [   ]", "dims": [1, -2.5, 1e-07], "names": ["a", "b"]}
    text = format_manifest(manifest)
    assert json.loads(text) == manifest
    assert ' "dims": [ 1, -2.5, 1e-07 ],\n' in text and len(text.splitlines()) == 8


def test_statistics_of_scores_are_added_to_a_folder_and_checked(tmp_path: Path) -> None:
    model = tiny.build_duet_model(tmp_path / "base")
    saved_folder = tmp_path / "model"
    model.save_pretrained(saved_folder)
    before = {path.name: path.read_bytes() for path in saved_folder.iterdir()}
    scores = ScoreDistribution.from_scores(np.linspace(-0.2, 0.6, 90))
    write_score_statistics(saved_folder, ScoreStatistics(10, {("both", "text"): scores}))
    after = {path.name: path.read_bytes() for path in saved_folder.iterdir()}
    assert {name for name in after if after[name] != before[name]} == {"vlduet.json"}
    reopened = DuetModel.from_pretrained(saved_folder)
    assert reopened.fingerprint == model.fingerprint
    assert reopened.score_statistics == ScoreStatistics(10, {("both", "text"): scores})
    # One line for each list of numbers, so that people can read the file.
    assert len(after["vlduet.json"].splitlines()) < len(before["vlduet.json"].splitlines()) + 20
    manifest = json.loads(after["vlduet.json"])
    manifest["score_statistics"]["both"]["text"]["quantiles"][3] = 7
    (saved_folder / "vlduet.json").write_text(json.dumps(manifest))
    with pytest.raises(ModelError, match=r"score_statistics\.both\.text: 'quantiles' has 7"):
        DuetModel.from_pretrained(saved_folder)
    with pytest.raises(ModelError, match=r"without vlduet\.json"):
        write_score_statistics(tmp_path / "base", ScoreStatistics(1, {}))
