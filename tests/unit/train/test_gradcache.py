"""Chunks, passes and recomputed layers change memory and time, never a loss or a gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from helpers import runs, tiny
from helpers.precision import compute_in_double
from vlduet import config
from vlduet.data.batches import Batch, split_into_chunks
from vlduet.data.records import Message
from vlduet.data.sequences import Anchor, Sequence
from vlduet.model.adapters import LoraSettings
from vlduet.model.duet import DuetModel
from vlduet.model.pooling import Readout, concatenate_readouts, create_empty_readout
from vlduet.objectives.language import language_loss
from vlduet.recipes.contrast import compute_contrastive_loss
from vlduet.train.gradcache import compute_cached_losses
from vlduet.train.loader import iterate_batches
from vlduet.train.setup import prepare_run
from vlduet.train.step import forward_backward

LossesAndGradients = tuple[dict[str, Tensor], dict[str, Tensor]]
DOUBLE_TOLERANCE = {"atol": 1e-11, "rtol": 1e-9}
CHUNK_TOKENS = 90
SEED, OTHER_SEED = 11, 12


@pytest.fixture
def model(tmp_path: Path, family: str) -> DuetModel:
    """A model in training mode and double precision throughout, with dropout before LoRA."""
    model = tiny.build_duet_model(tmp_path / "base", family=family).double()
    model.make_trainable(lora=LoraSettings(rank=2, alpha=4, dropout=0.3), projector=True)
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model = model.double().train()
    compute_in_double(model.backbone)
    with torch.no_grad():
        # The cache rounds vision features to float32: fill it, so that all passes read the same.
        model(model.collate(render_sequences(model)))
    return model


def render_sequences(model: DuetModel) -> list[Sequence]:
    """Return captions of unequal length, texts, a mixture of images, and chats without anchors."""
    renderer = model.renderer
    sequences = []
    for i in range(4):
        name = f"p{i}"
        caption = "some words " * (1 + 2 * i)
        image = renderer.render_caption(tiny.random_image(i), caption, record_name=name)
        length = len(image)
        end = Anchor(length - 1, length, "query", record_name=name, content_key=f"both {i}")
        text = f"text {i % 3}"
        sequences += [
            replace(image, anchors=(*image.anchors, end)),
            renderer.render_embedding((text,), role="text", record_name=name, content_key=text),
        ]
    mixture = (tiny.random_image(7), "and", tiny.random_image(8))
    sequences += [
        renderer.render_embedding(mixture, role="query", record_name="r", content_key="q"),
        renderer.render_embedding(
            ("an answer",), role="positive", record_name="r", content_key="a"
        ),
    ]
    for i in range(3):
        turns = (Message("user", ("hello",)), Message("assistant", ("good day " * (i + 1),)))
        sequences.append(renderer.render_chat(turns, add_generation_prompt=False))
    return sequences


def collate_chunks(model: DuetModel) -> list[Batch]:
    chunks = split_into_chunks(render_sequences(model), CHUNK_TOKENS)
    return [model.collate(chunk) for chunk in chunks]


def make_objective(model: DuetModel) -> Callable[[Readout], dict[str, Tensor]]:
    def compute_losses(readout: Readout) -> dict[str, Tensor]:
        contrastive = compute_contrastive_loss(readout, model.logit_scale, min_temperature=0.01)
        language = language_loss(readout.nll, global_token_count=len(readout.nll))
        loss = contrastive + 0.7 * language
        return {"loss": loss, "contrastive": contrastive, "language": language}

    return compute_losses


def run_in_one_pass(model: DuetModel, batches: list[Batch]) -> LossesAndGradients:
    """Compute the slow reference: the graphs of all batches exist until the one backward pass."""
    readouts = [model(batch) for batch in batches]
    losses = make_objective(model)(concatenate_readouts(readouts))
    losses["loss"].backward()
    return collect(model, losses)


def run_gradcache(model: DuetModel, chunks: list[Batch]) -> LossesAndGradients:
    empty = create_empty_readout(model.dim, like=model.logit_scale.detach())
    losses = compute_cached_losses(model, chunks, compute_losses=make_objective(model), empty=empty)
    return collect(model, losses)


def collect(model: DuetModel, losses: dict[str, Tensor]) -> LossesAndGradients:
    """Return detached losses and the gradients of all parameters, and clear the gradients."""
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return {name: loss.detach() for name, loss in losses.items()}, gradients


def check_equal(actual: LossesAndGradients, expected: LossesAndGradients) -> None:
    assert actual[1].keys() == expected[1].keys() and "logit_scale" in actual[1]
    for actual_values, expected_values in zip(actual, expected, strict=True):
        for name, value in actual_values.items():

            def explain(message: str, name: str = name) -> str:
                return f"{name}: {message}"

            assert_close(value, expected_values[name], msg=explain, **DOUBLE_TOLERANCE)


def test_chunks_with_dropout_have_the_gradients_of_one_pass(model: DuetModel) -> None:
    chunks = collate_chunks(model)
    assert len(chunks) > 4
    torch.manual_seed(SEED)
    expected = run_in_one_pass(model, chunks)
    random_state = torch.get_rng_state()
    torch.manual_seed(SEED)
    check_equal(run_gradcache(model, chunks), expected)
    assert torch.equal(torch.get_rng_state(), random_state), (
        "random numbers after the step must not repeat those of the step"
    )
    torch.manual_seed(OTHER_SEED)
    # Otherwise there were no dropout, and this test would prove nothing.
    with pytest.raises(AssertionError):
        check_equal(run_gradcache(model, chunks), expected)


@pytest.mark.parametrize("pack_to", [None, 70])
def test_chunks_without_dropout_have_the_gradients_of_one_batch(
    model: DuetModel, pack_to: int | None
) -> None:
    model.eval()
    sequences = render_sequences(model)
    chunks = [
        model.collate(chunk, pack_to=pack_to)
        for chunk in split_into_chunks(sequences, 140, pack_to=pack_to)
    ]
    assert len(chunks) > 2
    check_equal(run_gradcache(model, chunks), run_in_one_pass(model, [model.collate(sequences)]))


def test_the_first_pass_has_no_labels_and_skips_chunks_without_anchors(model: DuetModel) -> None:
    first_pass: list[Batch] = []
    second_pass: list[Batch] = []

    def record(batch: Batch) -> Readout:
        (second_pass if torch.is_grad_enabled() else first_pass).append(batch)
        return model(batch)

    chunks = collate_chunks(model)
    empty = create_empty_readout(model.dim, like=model.logit_scale.detach())
    compute_cached_losses(record, chunks, compute_losses=make_objective(model), empty=empty)
    anchor_counts = [len(chunk.anchors) for chunk in chunks if chunk.anchors]
    assert [len(batch.anchors) for batch in first_pass] == anchor_counts
    assert not any(batch.num_supervised_tokens for batch in first_pass)
    assert len(second_pass) == len(chunks) > len(first_pass)


def test_recomputed_layers_have_the_same_gradients(model: DuetModel) -> None:
    batches = [model.collate(render_sequences(model))]
    calls: list[int] = []
    layer = model.backbone.language_model.layers[0].self_attn  # type: ignore[union-attr, index]
    layer.register_forward_hook(lambda *_: calls.append(1))  # type: ignore[operator, union-attr]
    torch.manual_seed(SEED)
    expected = run_in_one_pass(model, batches)
    assert len(calls) == 1
    model.backbone.enable_gradient_checkpointing()
    torch.manual_seed(SEED)
    recomputed = run_in_one_pass(model, batches)
    assert len(calls) == 3, "once more in the forward pass and once in the backward pass"
    check_equal(recomputed, expected)
    for name, gradient in recomputed[1].items():
        assert "lora_" not in name or bool(gradient.abs().max() > 0), name
    torch.manual_seed(SEED)
    check_equal(run_gradcache(model, batches), expected)


@pytest.mark.parametrize(
    "settings",
    [{"chunk_tokens": 100}, {"fused": False}, {"fused": False, "chunk_tokens": 100}],
    ids=str,
)
def test_chunks_and_separate_passes_of_a_run_equal_a_plain_step(
    tmp_path: Path, settings: dict[str, object]
) -> None:
    """`fused: false` has one pass for each loss, as most joint trainers do."""
    lora = {"rank": 2, "alpha": 2, "dropout": 0.0}
    path = runs.write_run_config(tmp_path, steps=1, batch_size=8, lora=lora)
    values, gradients, steps = [], [], []
    for changes in ({}, settings):
        overrides = [f"train.{key}={value}" for key, value in changes.items()]
        overrides.append(f"data.cache={tmp_path / 'features'}")
        run = prepare_run(config.load_run_config(path, overrides), write_files=False)
        for name, parameter in run.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.constant_(parameter, 0.1)
        ((_, batches),) = iterate_batches(run, 0)
        values.append(forward_backward(run, batches))
        gradients.append([p.grad for p in run.trainable_parameters()])
        steps.append(batches)
    assert values[1] == pytest.approx(values[0], rel=1e-4)
    assert_close(gradients[1], gradients[0], atol=2e-5, rtol=1e-3)
    assert len(steps[0]) == 1 < len(steps[1])
    num_images = []
    for batches in steps:
        num_images.append(sum(len(batch.images) for batch in batches))
    if "fused" in settings:
        assert num_images[1] > num_images[0]
    else:
        assert num_images[1] == num_images[0]
