"""The memory of a step is estimated from a few tokens, and equals what autograd keeps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from helpers import family_checks, runs, tiny
from vlduet import config
from vlduet.data.batches import Batch
from vlduet.model.adapters import LoraSettings
from vlduet.model.duet import DuetModel
from vlduet.train.loader import iterate_batches
from vlduet.train.memory import (
    ActivationProfile,
    BatchSize,
    count_batch,
    count_state_bytes,
    measure_activations,
    measure_saved_bytes,
)
from vlduet.train.plan import plan_run
from vlduet.train.setup import prepare_run


def build_batch(model: DuetModel, *, pack_to: int | None = None, num_captions: int = 4) -> Batch:
    """Return captions, mixed sequences and a text, much longer than what is measured."""
    renderer = model.renderer
    sequences = family_checks.render_mixed_sequences(model)
    for i in range(num_captions):
        caption = "some words " * (i + 1)
        sequences.append(renderer.render_caption(tiny.random_image(i), caption))
    sequences.append(renderer.render_embedding(("a text " * 20,)))
    return model.collate(sequences, pack_to=pack_to)


def assert_estimate_is_measured(model: DuetModel, batch: Batch, profile: ActivationProfile) -> None:
    """Compare the estimate of a batch with what its own forward pass keeps."""
    model.train()
    measured = measure_saved_bytes(lambda: model(batch), model)
    estimate = profile.count_saved_bytes(count_batch(model, batch))
    assert measured > 0 and estimate == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize("family", sorted(tiny.FAMILY_BUILDERS))
def test_the_estimate_holds_for_every_family(tmp_path: Path, family: str) -> None:
    model = tiny.build_duet_model(tmp_path / "base", family=family)
    model.make_trainable(lora=LoraSettings(rank=8), projector=True)
    batch = build_batch(model)
    assert_estimate_is_measured(model, batch, measure_activations(model, [batch]))


@pytest.mark.parametrize(
    ("dtype", "recomputed", "lora", "projector", "soft_prompts", "pack_to"),
    [
        (torch.float32, False, None, True, True, None),
        (torch.float32, True, LoraSettings(rank=1, targets="qv"), False, False, 300),
        (torch.float32, False, LoraSettings(rank=64, dropout=0.1), True, False, None),
        (torch.bfloat16, False, LoraSettings(rank=16), False, True, 300),
        (torch.bfloat16, True, LoraSettings(rank=16, dropout=0.1), True, True, None),
        (torch.bfloat16, False, LoraSettings(rank=128, targets="qv"), False, False, None),
    ],
)
def test_the_estimate_holds_for_what_is_trained(
    tmp_path: Path,
    dtype: torch.dtype,
    recomputed: bool,
    lora: LoraSettings | None,
    projector: bool,
    soft_prompts: bool,
    pack_to: int | None,
) -> None:
    tiny.FAMILY_BUILDERS["llava"](tmp_path / "base")
    model = DuetModel.from_pretrained(tmp_path / "base", dtype=dtype)
    model.set_prompts(family_checks.PROMPTS)
    model.make_trainable(lora=lora, projector=projector, soft_prompts=soft_prompts)
    if recomputed:
        model.backbone.enable_gradient_checkpointing()
    batch = build_batch(model, pack_to=pack_to)
    profile = measure_activations(model, [batch])
    assert profile.is_recomputed is recomputed and not model.training
    assert_estimate_is_measured(model, batch, profile)
    # Measuring changes neither the model nor what it recomputes.
    assert measure_activations(model, [batch]) == profile


def test_logits_of_many_labels_are_not_kept(tmp_path: Path) -> None:
    model = tiny.build_duet_model(tmp_path / "base")
    model.make_trainable(lora=LoraSettings(rank=8), projector=False)
    few, many = build_batch(model), build_batch(model, num_captions=20)
    assert few.num_supervised_tokens < 1024 < many.num_supervised_tokens
    profile = measure_activations(model, [few, many])
    for batch in (few, many):
        assert_estimate_is_measured(model, batch, profile)


def test_the_backward_pass_needs_the_logits_or_a_layer(tmp_path: Path) -> None:
    model = tiny.build_duet_model(tmp_path / "base")
    model.make_trainable(lora=LoraSettings(rank=8), projector=False)
    batch = build_batch(model)
    profile = measure_activations(model, [batch])
    model.backbone.enable_gradient_checkpointing()
    recomputed = measure_activations(model, [batch])
    assert recomputed.saved.tokens < profile.saved.tokens / 4
    assert recomputed.layer.tokens == pytest.approx(profile.layer.tokens, rel=0.05)
    tokens = BatchSize(tokens=1000)
    assert profile.count_backward_bytes(tokens) == 1000 * profile.layer.tokens
    assert recomputed.count_backward_bytes(tokens) == 2 * 1000 * recomputed.layer.tokens
    num_logits = 500 * len(model.lm_head_weight)
    assert profile.count_backward_bytes(BatchSize(labels=500)) == 2 * 4 * num_logits
    assert profile.count_backward_bytes(BatchSize(labels=1e6)) == 2 * 4 * num_logits / 500 * 1024


def test_sizes_of_larger_batches_are_multiples() -> None:
    size = BatchSize(1, 20, 400, 8, 3, 2)
    assert size.scale(10) == BatchSize(1, 200, 4000, 80, 30, 20)


def test_weights_gradients_and_moments_count(tmp_path: Path) -> None:
    model = tiny.build_duet_model(tmp_path / "base")
    model.make_trainable(lora=None, projector=False)
    frozen = sum(4 * p.numel() for p in model.parameters())
    trained = sum(4 * p.numel() for p in model.parameters() if p.requires_grad)
    assert trained and count_state_bytes(model) == frozen + 3 * trained


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["train.chunk_tokens=100"],
        ["train.chunk_tokens=60", "train.pack=60", "train.checkpointing=true"],
        ["train.fused=false"],
        runs.FROMAGE_OVERRIDES,
    ],
)
def test_a_dry_run_tells_what_a_step_keeps(tmp_path: Path, overrides: list[str]) -> None:
    run_config = config.load_run_config(
        runs.write_run_config(tmp_path, batch_size=12, steps=1), overrides
    )
    plan = plan_run(run_config)
    run = prepare_run(run_config, write_files=False)
    assert isinstance(run.model, DuetModel)
    ((_, batches),) = iterate_batches(run, 0)
    run.model.train()
    measured = [measure_saved_bytes(lambda b=batch: run.model(b), run.model) for batch in batches]
    activations = max(measured) if run_config.train.chunk_tokens else sum(measured)
    assert len(measured) > 1 or not overrides or "fromage" in overrides[0]
    assert plan["activations (GB)"] == pytest.approx(activations / 1e9, rel=0.03)
    state = count_state_bytes(run.model)
    assert plan["weights and optimizer (GB)"] == pytest.approx(state / 1e9, rel=0.01)
    profile = measure_activations(run.model, batches)
    backward = max(profile.count_backward_bytes(count_batch(run.model, b)) for b in batches)
    total = (state + activations + backward) / 1e9
    assert plan["estimated memory (GB)"] == pytest.approx(total, rel=0.03)
