"""LoRA adapters: which layers they cover, and when an existing one is trained further."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.testing import assert_close

from helpers import tiny
from vlduet.errors import ConfigError
from vlduet.model import adapters, machine_memory
from vlduet.model.adapters import LoraSettings
from vlduet.model.duet import DuetModel
from vlduet.train.memory import measure_saved_bytes

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


def test_a_rank_that_does_not_fit_the_memory_is_refused_before_it_is_allocated(
    tmp_path: Path,
) -> None:
    """Each factor fits, but not all of them: the system would end the process."""
    model = tiny.build_duet_model(tmp_path / "base")
    names = {name for name, _ in model.named_parameters()}
    with pytest.raises(ConfigError, match=r"^train\.lora\.rank: too little memory for rank .* GiB"):
        model.make_trainable(lora=LoraSettings(rank=10**9), projector=False)
    assert {name for name, _ in model.named_parameters()} == names


def test_the_memory_of_a_container_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    machine = machine_memory.measure_memory(cpu)
    assert 2**28 < machine < 2**50
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(machine_memory, "CGROUP_FILES", (limit, tmp_path / "none"))
    limit.write_text("1000000\n")
    assert machine_memory.measure_memory(cpu) == 1_000_000
    limit.write_text("max\n")
    assert machine_memory.measure_memory(cpu) >= machine


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


# ------------------------------------------------------------------ dtype of the products


def train_layer(
    dtype: torch.dtype,
    *,
    adapter_dtype: torch.dtype = torch.float32,
    casts_factors: bool,
    rank: int = 8,
) -> tuple[Tensor, dict[str, Tensor], int]:
    """Run a LoRA layer with fixed weights forward and backward.

    Args:
        dtype: dtype of the frozen weights and of the input, whose values are those of bfloat16.
        adapter_dtype: dtype of the factors.
        casts_factors: multiply in the dtype of the input, as the models of this package do; else
            in that of the factors, as PEFT does.
        rank: of the adapter.

    Returns:
        The output, the gradients of the factors and of the input, and the bytes kept for backward.
    """
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    config = LoraConfig(r=rank, lora_alpha=4, target_modules=["0"])
    model = get_peft_model(nn.Sequential(nn.Linear(64, 48, dtype=dtype)), config)
    if casts_factors:
        adapters._multiply_in_input_dtype(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(draw(*parameter.shape) / 8)
    factors = {n.split(".")[-3]: p for n, p in model.named_parameters() if "lora_" in n}
    for factor in factors.values():
        factor.data = factor.data.to(adapter_dtype)
    x = draw(2, 50, 64).to(dtype).requires_grad_()
    outputs: list[Tensor] = []
    saved = measure_saved_bytes(lambda: outputs.append(model(x)), model)
    (outputs[0] * draw(2, 50, 48).to(dtype)).sum().backward()
    gradients = {name: factor.grad for name, factor in factors.items()} | {"input": x.grad}
    assert all(gradient is not None for gradient in gradients.values())
    return outputs[0].detach(), gradients, saved  # type: ignore[return-value]


def relative_error(value: Tensor, reference: Tensor) -> float:
    """Return the norm of the difference over that of the reference."""
    return float((value.double() - reference).norm() / reference.norm())


def test_adapters_of_a_float32_model_compute_what_those_of_peft_compute() -> None:
    output, gradients, _ = train_layer(torch.float32, casts_factors=True)
    expected, expected_gradients, _ = train_layer(torch.float32, casts_factors=False)
    assert torch.equal(output, expected)
    for name, gradient in gradients.items():
        assert torch.equal(gradient, expected_gradients[name]), name


@pytest.mark.parametrize("rank", [1, 8, 128])
def test_adapters_of_a_bfloat16_model_round_to_bfloat16_alone(rank: int) -> None:
    double = torch.float64
    reference, reference_gradients, _ = train_layer(
        double, adapter_dtype=double, casts_factors=False, rank=rank
    )
    output, gradients, saved = train_layer(torch.bfloat16, casts_factors=True, rank=rank)
    assert output.dtype == torch.bfloat16 and relative_error(output, reference) < 2**-7
    for name, gradient in gradients.items():
        assert gradient.dtype == (torch.bfloat16 if name == "input" else torch.float32)
        assert relative_error(gradient, reference_gradients[name]) < 2**-6, name
    # The input and its product with the first factor for each of 100 tokens, and both factors.
    assert saved == 2 * (100 * (64 + rank) + rank * (64 + 48))
    assert train_layer(torch.bfloat16, casts_factors=False, rank=rank)[2] == 4 * 100 * (64 + rank)


def test_adapters_of_a_bfloat16_model_are_saved_in_float32(tmp_path: Path) -> None:
    tiny.FAMILY_BUILDERS["llava"](tmp_path / "base")
    model = DuetModel.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    model.make_trainable(lora=LoraSettings(rank=2), projector=False)
    with torch.no_grad():
        for tensor in model.adapter_tensors().values():
            tensor.normal_(std=0.1)
    expected = model.encode(["a red apple"])
    model.save_pretrained(tmp_path / "model")
    (path,) = (tmp_path / "model").rglob("adapter_model.safetensors")
    saved = load_file(path)
    trained = {name: p for name, p in model.named_parameters() if "lora_" in name}
    assert len(saved) == len(trained)
    assert {tensor.dtype for tensor in (*saved.values(), *trained.values())} == {torch.float32}
    loaded = DuetModel.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    assert_close(loaded.encode(["a red apple"]), expected, atol=0, rtol=0)
    layers = [m for m in loaded.modules() if isinstance(m, adapters.MixedPrecisionLinear)]
    assert len(layers) == len(trained)
