"""LoRA adapters: which layers they cover, and when an existing one is trained further."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from helpers import tiny
from vlduet.errors import ConfigError
from vlduet.model.adapters import LoraSettings
from vlduet.model.duet import DuetModel

ITEMS = [tiny.random_image(1), "a red apple"]
LAYERS_BY_TARGETS = {
    "qv": {"q_proj", "v_proj"},
    "all": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
}
"""Names of the linear layers in every decoder layer of the tiny checkpoints, by `targets`."""


@pytest.mark.parametrize("targets", sorted(LAYERS_BY_TARGETS))
@pytest.mark.parametrize("family", ["fast_vlm", "gemma3", "qwen3_vl"])
def test_lora_is_trained_in_the_target_layers_of_the_language_model_alone(
    tmp_path: Path, family: str, targets: str
) -> None:
    model = tiny.build_duet_model(tmp_path / "base", family=family)
    layers = model.backbone.language_model.layers
    model.make_trainable(lora=LoraSettings(rank=2, targets=targets), projector=False, head=False)
    names = set()
    for number, layer in enumerate(layers):
        modules = {name.split(".")[-1] for name, m in layer.named_modules() if hasattr(m, "lora_A")}
        assert modules == LAYERS_BY_TARGETS[targets], number
        names |= {id(p) for name, p in layer.named_parameters() if "lora_" in name}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained and {id(p) for p in trained.values()} == names
    assert len(trained) == 2 * len(layers) * len(LAYERS_BY_TARGETS[targets])


def test_a_saved_adapter_is_trained_further(trained_model: DuetModel, saved_folder: Path) -> None:
    loaded = DuetModel.from_pretrained(saved_folder)
    loaded.make_trainable(lora=LoraSettings(rank=2, alpha=4), projector=False)
    expected = trained_model.adapter_tensors()
    for name, parameter in loaded.adapter_tensors().items():
        assert parameter.requires_grad and torch.equal(parameter, expected[name]), name


@pytest.mark.parametrize(
    ("lora", "field"),
    [
        (LoraSettings(rank=3, alpha=4), "rank"),
        (LoraSettings(rank=2, alpha=4, targets="qv"), "targets"),
    ],
)
def test_an_adapter_with_other_settings_is_refused(
    saved_folder: Path, lora: LoraSettings, field: str
) -> None:
    loaded = DuetModel.from_pretrained(saved_folder)
    with pytest.raises(ConfigError, match=rf"train\.lora\.{field}.*merge"):
        loaded.make_trainable(lora=lora, projector=False)


def test_an_adapter_is_known_by_its_layers_not_by_its_pattern(saved_folder: Path) -> None:
    """Earlier versions knew fewer layer names; the families here have none of the new ones."""
    loaded = DuetModel.from_pretrained(saved_folder)
    config = loaded.peft_model.peft_config["default"]
    config.target_modules = config.target_modules.replace("|gate_up_proj", "")
    loaded.make_trainable(lora=LoraSettings(rank=2, alpha=4), projector=False)
    assert all(parameter.requires_grad for parameter in loaded.adapter_tensors().values())


def test_a_fused_gate_and_up_projection_gets_lora(tmp_path: Path) -> None:
    model = tiny.build_duet_model(tmp_path / "base", family="glm4v")
    model.make_trainable(lora=LoraSettings(rank=2), projector=False)
    layers = {name.split(".lora_")[0] for name in model.adapter_tensors()}
    assert {layer.split(".")[-1] for layer in layers} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"
    }  # fmt: skip
    assert len(layers) == 2 * 6 and not any("visual" in layer for layer in layers)
    with torch.no_grad():
        for tensor in model.adapter_tensors().values():
            tensor.normal_(std=0.1)
    expected = model.encode(ITEMS)
    model.save_pretrained(tmp_path / "model")
    assert_close(DuetModel.from_pretrained(tmp_path / "model").encode(ITEMS), expected)
    model.save_merged(tmp_path / "merged")
    merged = DuetModel.from_pretrained(tmp_path / "merged")
    assert_close(merged.encode(ITEMS), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("training", [True, False])
def test_new_lora_layers_are_in_the_mode_of_their_model(tmp_path: Path, training: bool) -> None:
    """Dropout that is active in evaluation would give one text two embeddings."""
    model = tiny.build_duet_model(tmp_path / "base").train(training)
    model.make_trainable(lora=LoraSettings(rank=2, alpha=4, dropout=0.5), projector=False)
    dropouts = [m for name, m in model.named_modules() if "lora_dropout.default" in name]
    assert dropouts and all(module.training is training for module in dropouts)
