"""A config decides which parameters are trained, and wrong settings are named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from helpers import runs
from vlduet import config
from vlduet.errors import ConfigError
from vlduet.model.duet import DuetModel
from vlduet.train.loader import iterate_batches
from vlduet.train.loop import train
from vlduet.train.setup import prepare_run
from vlduet.train.step import forward_backward, optimizer_step


@pytest.mark.parametrize(
    "settings",
    [{}, {"chunk_tokens": 64}, {"checkpointing": True}, {"fused": False}, {"soft_prompts": True}],
    ids=str,
)
def test_trained_parameters_change_and_all_others_stay(
    tmp_path: Path, settings: dict[str, object]
) -> None:
    path = runs.write_run_config(tmp_path, steps=3, **settings)
    run = prepare_run(config.load_run_config(path), write_files=False)
    parameters = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    buffers = {name: b.detach().clone() for name, b in run.model.named_buffers()}
    run.model.train()
    for step, (_, batches) in enumerate(iterate_batches(run, 0)):
        forward_backward(run, batches)
        if step == 1:  # B starts at zero, so A's gradient is zero in the first step only
            for name, parameter in run.model.adapter_tensors().items():
                assert parameter.grad is not None and bool(parameter.grad.abs().max() > 0), name
        optimizer_step(run, step)
    for name, parameter in run.model.named_parameters():
        has_changed = not torch.equal(parameter, parameters[name])
        assert has_changed == parameter.requires_grad, name
    for name, buffer in run.model.named_buffers():  # batch norm statistics of the vision tower
        assert torch.equal(buffer, buffers[name]), name


def test_a_fixed_temperature_stays(tmp_path: Path) -> None:
    path = runs.write_run_config(tmp_path, steps=2, temperature=0.05)
    run = prepare_run(config.load_run_config(path), write_files=False)
    for step, (_, batches) in enumerate(iterate_batches(run, 0)):
        assert forward_backward(run, batches)["temperature"] == pytest.approx(0.05)
        optimizer_step(run, step)
    assert all(p is not run.model.logit_scale for p in run.trainable_parameters())


def test_soft_prompts_of_a_trained_model_are_trained_further(tmp_path: Path) -> None:
    path = runs.write_run_config(tmp_path, steps=1, soft_prompts=True)
    folder = train(config.load_run_config(path))
    overrides = [f"model.path={folder}", f"out={tmp_path / 'second'}"]
    with pytest.raises(ConfigError, match="the model brings learned prompts"):
        prepare_run(config.load_run_config(path, overrides), write_files=False)
    second = config.load_run_config(path, [*overrides, "model.prompts={}"])
    model = prepare_run(second, write_files=False).model
    saved = DuetModel.from_pretrained(folder)
    assert isinstance(model, DuetModel) and model.prompts == saved.prompts
    assert model.soft_prompts is not None and saved.soft_prompts is not None
    assert model.soft_prompts.rows.requires_grad
    assert torch.equal(model.soft_prompts.rows, saved.soft_prompts.rows)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("recipe.name=vladav", "Did you mean 'vladva'"),
        ("recipe.language_onn=any", "Did you mean 'language_on'"),
        ("objectives.contrastve=1", "Did you mean 'contrastive'"),
        ("objectives={contrastive: 0}", "no loss has a weight"),
        ("model.prompts.imagee=x", "Did you mean 'image'"),
    ],
)
def test_unknown_names_are_answered_with_the_closest(
    tmp_path: Path, override: str, message: str
) -> None:
    run_config = config.load_run_config(runs.write_run_config(tmp_path), [override])
    with pytest.raises(ConfigError, match=message):
        prepare_run(run_config, write_files=False)
