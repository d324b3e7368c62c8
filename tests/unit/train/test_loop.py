"""The training loop on a tiny model: it learns, stops on NaN with the batch saved, and resumes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from helpers import runs
from vlduet import config
from vlduet.config import RunConfig
from vlduet.data.formats import read_records
from vlduet.errors import TrainingError
from vlduet.logs import read_metrics
from vlduet.model.duet import DuetModel
from vlduet.model.pooling import Readout
from vlduet.recipes.recipe import BoundRecipe
from vlduet.train import setup
from vlduet.train.loop import train
from vlduet.workflows.validation import make_config_validator


def test_a_run_learns_validates_and_saves(tmp_path: Path) -> None:
    run_config = config.load_run_config(runs.write_run_config(tmp_path, steps=60, eval_every=30))
    folder = train(run_config, evaluate=make_config_validator(run_config, seed=0))
    rows = read_metrics(run_config.out / "metrics.jsonl")
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < losses[0] - 1
    validations = [row for row in rows if "validation/caption_cross_entropy" in row]
    assert [row["step"] for row in validations] == [0, 30, 60]
    assert validations[-1]["validation/text_to_image/hit@5"] > 0
    cross_entropies = [row["validation/caption_cross_entropy"] for row in validations]
    assert cross_entropies[-1] < cross_entropies[0]
    assert all(0.0 <= row["validation/captions_ended"] <= 1.0 for row in validations)
    model = DuetModel.from_pretrained(folder)
    assert model.peft_model is not None and model.prompts.image == "<s>{image}"
    assert (run_config.out / "config.yaml").is_file()
    assert list((run_config.out / "tensorboard").iterdir())


def test_nan_stops_with_the_batch_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_config = config.load_run_config(runs.write_run_config(tmp_path))
    load_recipe = setup.load_recipe

    def load_broken_recipe(run_config: RunConfig) -> BoundRecipe:
        recipe = load_recipe(run_config)
        num_losses = 0

        def objective(readout: Readout, logit_scale: Tensor) -> dict[str, Tensor]:
            nonlocal num_losses
            losses = recipe.objective(readout, logit_scale)
            for name in losses:
                if num_losses >= 8:  # two losses in each step: NaN from step 4 on
                    losses[name] = losses[name] * float("nan")
                num_losses += 1
            return losses

        return replace(recipe, objective=objective)

    monkeypatch.setattr(setup, "load_recipe", load_broken_recipe)
    with pytest.raises(TrainingError, match=r"step 4: .*not a number"):
        train(run_config)
    saved = run_config.out / "not-finite-4-rank0" / "records.jsonl"
    assert len(list(read_records(saved))) == 4
    monkeypatch.setattr(setup, "load_recipe", load_recipe)
    train(run_config, resume=True)  # step 4 has not changed the parameters
    steps = [row["step"] for row in read_metrics(run_config.out / "metrics.jsonl")]
    assert steps == list(range(12))


def test_a_step_without_anything_for_the_only_loss_passes(tmp_path: Path) -> None:
    """Without chunks, in a control run on data for another loss."""
    rows: list[dict[str, Any]] = [
        {"id": f"q{i}", "query": [{"text": f"q {i}"}], "positive": [[{"text": f"a {i}"}]]}
        for i in range(8)
    ]
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    rows.append({"id": "c", "messages": turns})
    path = runs.write_run_config(tmp_path, batch_size=2, steps=5, lora={"rank": 2, "alpha": 2})
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = ["objectives={language: 1}", "data.validation=null"]
    run_config = config.load_run_config(path, overrides)
    train(run_config)
    losses = [row["loss"] for row in read_metrics(run_config.out / "metrics.jsonl")]
    assert losses.count(0.0) >= 3 and max(losses) > 0


def test_features_are_not_saved_if_the_cache_is_off(tmp_path: Path) -> None:
    path = runs.write_run_config(tmp_path, steps=2)
    with_cache = config.load_run_config(path, [f"out={tmp_path / 'with'}"])
    without_cache = config.load_run_config(
        path, [f"out={tmp_path / 'without'}", "data.cache=false"]
    )
    train(with_cache)
    train(without_cache)
    assert list((with_cache.out / "features").rglob("*.npy"))
    assert not (without_cache.out / "features").exists()


def test_validation_leaves_out_an_image_that_cannot_be_decoded(tmp_path: Path) -> None:
    run_config = config.load_run_config(runs.write_run_config(tmp_path))
    content = (tmp_path / "2.png").read_bytes()
    (tmp_path / "2.png").write_bytes(content[: len(content) // 2])
    model = setup.prepare_run(run_config, write_files=False).model
    values = make_config_validator(run_config, seed=0)(model)
    assert 0 <= values["text_to_image/hit@5"] <= 1


@pytest.mark.parametrize("name", ["state.json", "trained.safetensors", "optimizer.pt"])
@pytest.mark.parametrize("damage", ["missing", "incomplete", "empty"])
def test_a_broken_state_is_named(tmp_path: Path, name: str, damage: str) -> None:
    run_config = config.load_run_config(runs.write_run_config(tmp_path, steps=2))
    train(run_config)
    file = run_config.out / "state" / name
    content = file.read_bytes()
    file.unlink()
    if damage != "missing":
        file.write_bytes(content[: len(content) // 2] if damage == "incomplete" else b"")
    message = f"{run_config.out}/state: (broken state|nothing to resume)"
    with pytest.raises(TrainingError, match=message):
        train(run_config, resume=True)
