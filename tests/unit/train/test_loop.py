"""The training loop on a tiny model: it learns, stops on NaN with the batch saved, and resumes."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from helpers import runs
from vlduet import config
from vlduet.config import RunConfig, TrainSection
from vlduet.data.formats import read_records
from vlduet.errors import TrainingError
from vlduet.logs import read_metrics
from vlduet.model.duet import DuetModel
from vlduet.model.pooling import Readout
from vlduet.recipes.recipe import BoundRecipe
from vlduet.train import loop, setup
from vlduet.train.checkpointing import load_state
from vlduet.train.loop import train
from vlduet.train.run import TrainingRun, count_steps
from vlduet.train.step import optimizer_step
from vlduet.workflows.validation import make_config_validator


def test_a_run_learns_validates_and_saves(tmp_path: Path) -> None:
    run_config = config.load_run_config(runs.write_run_config(tmp_path, steps=60, eval_every=30))
    validator = make_config_validator(run_config, seed=0)
    folder = train(run_config, evaluate=validator, calibrate=validator.calibrate)
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
    # The trained model, and not the one before, is what its statistics of scores describe.
    assert model.score_statistics == validator.calibrate(model)
    assert model.score_statistics is not None and len(model.score_statistics.distributions) == 9
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


def write_control_run(folder: Path, *overrides: str) -> RunConfig:
    """Write a run on the language loss alone, with a chat beside a source of eight queries."""
    rows: list[dict[str, Any]] = [
        {"id": f"q{i}", "query": [{"text": f"q {i}"}], "positive": [[{"text": f"a {i}"}]]}
        for i in range(8)
    ]
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    queries = runs.write_rows(folder / "queries.jsonl", rows)
    chats = runs.write_rows(folder / "chats.jsonl", [{"id": "c", "messages": turns}])
    path = runs.write_run_config(folder, batch_size=2, steps=8, lora={"rank": 2, "alpha": 2})
    sources = f"data.train=[{{path: {queries}, weight: 3}}, {{path: {chats}}}]"
    overrides = (sources, "objectives={language: 1}", "data.validation=null", *overrides)
    return config.load_run_config(path, overrides)


@pytest.mark.parametrize("chunk_tokens", ["null", "64"])
def test_a_step_without_anything_for_the_only_loss_has_no_loss(
    tmp_path: Path, chunk_tokens: str, caplog: pytest.LogCaptureFixture
) -> None:
    """In a control run, a source for another loss keeps its share of the steps."""
    run_config = write_control_run(tmp_path, f"train.chunk_tokens={chunk_tokens}")
    with caplog.at_level(logging.WARNING, logger="vlduet"):
        train(run_config)
    assert "75% of every batch stay empty" in caplog.text
    rows = read_metrics(run_config.out / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(8))
    empty = [row for row in rows if not row["tokens"]]
    assert empty and not any({"loss", "language"} & row.keys() for row in empty)
    losses = [row["loss"] for row in rows if row["tokens"]]
    assert losses and min(losses) > 0


def test_a_loss_that_has_nothing_in_a_step_is_left_out_of_its_row(tmp_path: Path) -> None:
    overrides = ["objectives={language: 1, contrastive: 1}", "train.batch_size=2"]
    run_config = write_control_run(tmp_path, *overrides)
    train(run_config)
    rows = read_metrics(run_config.out / "metrics.jsonl")
    assert {frozenset(row.keys() & {"loss", "language", "contrastive"}) for row in rows} >= {
        frozenset({"loss", "contrastive"}),
        frozenset({"loss", "language", "contrastive"}),
    }


# --------------------------------------------------------------------- epochs


def test_epochs_decide_the_steps_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Also for a run that is resumed on other records: state and schedule keep the number."""
    path = runs.write_run_config(tmp_path, save_every=2)  # 12 records, 4 of them in a batch
    run_config = config.load_run_config(path, ["train.epochs=1.5"])

    def stop(run: TrainingRun, step: int) -> None:
        if step == 3:
            raise KeyboardInterrupt
        optimizer_step(run, step)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "optimizer_step", stop)
        train(run_config)
    assert json.loads((run_config.out / "state" / "state.json").read_text())["num_steps"] == 5
    text = (run_config.out / "config.yaml").read_text()
    assert text.startswith("# 5 steps, 1.67 epochs of 12 records\n")
    saved_config = config.load_run_config(run_config.out / "config.yaml")
    assert saved_config.train.epochs == 1.5 and saved_config == run_config

    records = (tmp_path / "train.jsonl").read_text()
    longer = records + json.dumps({"id": "new", "image": "0.png", "short": "new"}) + "\n"
    (tmp_path / "train.jsonl").write_text(longer)
    with caplog.at_level(logging.WARNING, logger="vlduet"):
        folder = train(run_config, resume=True)
    assert "the training records have changed" in caplog.text
    rows = read_metrics(run_config.out / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    provenance = json.loads((folder / "vlduet.json").read_text())["provenance"]
    assert (provenance["steps"], provenance["records"]) == (5, [13])


def test_a_run_of_epochs_resumes_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = runs.write_run_config(tmp_path, save_every=2)
    losses = {}
    for name in ("straight", "stopped"):
        run_config = config.load_run_config(path, ["train.epochs=2", f"out={tmp_path / name}"])
        if name == "stopped":
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(loop, "all_finite", _interrupt_after(4))
                train(run_config)
        train(run_config, resume=name == "stopped")
        rows = read_metrics(run_config.out / "metrics.jsonl")
        losses[name] = [row["loss"] for row in rows]
    assert len(losses["straight"]) == 6 and losses["straight"] == losses["stopped"]


def test_a_run_that_was_killed_between_two_renames_is_kept_and_resumed(tmp_path: Path) -> None:
    run_config = config.load_run_config(runs.write_run_config(tmp_path, steps=4, save_every=2))
    train(run_config, resume="auto")  # starts, because there is no run
    state = run_config.out / "state"
    metrics = (run_config.out / "metrics.jsonl").read_bytes()
    state.rename(run_config.out / ".state.old")
    with pytest.raises(TrainingError, match="this folder holds a run already"):
        train(run_config)
    assert (run_config.out / "metrics.jsonl").read_bytes() == metrics
    assert state.exists()
    state.rename(run_config.out / ".state.old")
    train(run_config, resume="auto")
    steps = [row["step"] for row in read_metrics(run_config.out / "metrics.jsonl")]
    assert steps == [0, 1, 2, 3]
    assert not list(run_config.out.glob(".*"))


def _interrupt_after(num_steps: int) -> Callable[[object], bool]:
    """Return a function that is True `num_steps` times, and then raises KeyboardInterrupt."""
    calls: list[object] = []

    def check(values: object) -> bool:
        calls.append(values)
        if len(calls) > num_steps:
            raise KeyboardInterrupt
        return True

    return check


@pytest.mark.parametrize(
    ("epochs", "num_records", "batch_size", "num_steps"),
    [(1, 10, 5, 2), (1, 11, 5, 3), (0.1, 3000, 100, 3), (0.001, 10, 5, 1), (2.5, 521, 32, 41)],
)
def test_epochs_are_rounded_up_to_whole_steps(
    epochs: float, num_records: int, batch_size: int, num_steps: int
) -> None:
    settings = TrainSection(epochs=epochs, batch_size=batch_size)
    assert count_steps(settings, num_records) == num_steps


# --------------------------------------------------------------------- files


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
@pytest.mark.parametrize("damage", ["missing", "incomplete", "empty", "flipped"])
def test_a_broken_state_is_named(tmp_path: Path, name: str, damage: str) -> None:
    run_config = config.load_run_config(runs.write_run_config(tmp_path, steps=2))
    train(run_config)
    file = run_config.out / "state" / name
    content = file.read_bytes()
    file.unlink()
    if damage == "flipped":  # a digit of the step, or a value
        position = content.find(b'"step": ') + 8 if name == "state.json" else len(content) // 2
        flipped = bytes([content[position] ^ 1])
        file.write_bytes(content[:position] + flipped + content[position + 1 :])
    elif damage != "missing":
        file.write_bytes(content[: len(content) // 2] if damage == "incomplete" else b"")
    if name == "state.json" and damage == "missing":
        message = "state: nothing to resume"
    else:
        message = f"state/{name}: (broken JSON|is missing|has )"
    with pytest.raises(TrainingError, match=message):
        train(run_config, resume=True)


def test_a_state_of_an_earlier_version_resumes(tmp_path: Path) -> None:
    """It has no list of files."""
    run_config = config.load_run_config(runs.write_run_config(tmp_path, steps=2))
    train(run_config)
    path = run_config.out / "state" / "state.json"
    facts = json.loads(path.read_text())
    assert set(facts.pop("files")) == {"optimizer.pt", "trained.safetensors"}
    del facts["manifest_sha256"]
    path.write_text(json.dumps(facts))
    assert load_state(setup.prepare_run(run_config, write_files=False)) == 2
