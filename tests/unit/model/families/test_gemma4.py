"""Gemma 4: per-layer embeddings, softcapped logits, images in their own proportions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from helpers import tiny
from helpers.family_checks import (
    CLOSE,
    ODD,
    PROMPTS,
    SMALL,
    TALL,
    WIDE,
    assert_beams_equal_transformers,
    assert_logits_equal_transformers,
    assert_packed_embeddings_equal_single,
    render_mixed_sequences,
    render_prompts,
    transformers_inputs_of,
)
from vlduet.data import images
from vlduet.errors import ModelError
from vlduet.model.adapters import LoraSettings
from vlduet.model.duet import DuetModel
from vlduet.model.generation.continuous import ContinuousBatcher, Request
from vlduet.model.generation.offline import generate_texts


@pytest.fixture(params=["gemma4", "gemma4_large"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> DuetModel:
    return tiny.scale_up_weights(
        tiny.build_duet_model(tmp_path / "base", family=request.param, prompts=PROMPTS, head="none")
    )


def test_number_of_tokens_equals_the_processor_s_count(model: DuetModel) -> None:
    refs = (WIDE, TALL, SMALL, ODD)
    prepared = [model.prepare_image(ref) for ref in refs]
    num_tokens = [image.num_tokens for image in prepared]
    for ref, count in zip(refs, num_tokens, strict=True):
        outputs = model.backbone.image_processor(images=images.load_image(ref))
        assert count == int(outputs["num_soft_tokens_per_image"][0])
    assert len(set(num_tokens)) > 2


def test_features_do_not_depend_on_the_batch(model: DuetModel) -> None:
    prepared = [model.prepare_image(ref) for ref in (WIDE, TALL, SMALL, ODD)]
    single = [model.backbone.compute_vision_features([image]) for image in prepared]
    assert_close(model.backbone._run_vision_tower(prepared), torch.cat(single), **CLOSE)


def test_picture_is_restored_from_its_patches(model: DuetModel) -> None:
    for ref in (WIDE, TALL, SMALL, ODD):
        prepared = model.prepare_image(ref)
        pixels = model.backbone.vision_tower_pixels(prepared)
        _, height, width = pixels.shape
        assert height * width == prepared.num_tokens * 8 * 8
        resized = images.load_image(ref).resize((width, height), 3)
        difference = pixels.permute(1, 2, 0).numpy() - np.asarray(resized) / 255
        assert np.abs(difference).max() < 0.01


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_logits_equal_transformers(
    model: DuetModel, padding_side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = model.collate(render_mixed_sequences(model), padding_side=padding_side)
    logits = assert_logits_equal_transformers(model, batch)
    assert logits.abs().max() < 2, "the logits must be softcapped"
    text_config = model.backbone.model.config.text_config
    is_large = text_config.use_bidirectional_attention == "vision"
    opposite = {"full_attention": False, "sliding_attention": not is_large}
    monkeypatch.setattr(model.backbone.family, "attention_mask_kinds", lambda: opposite)
    with torch.no_grad():
        changed = model.backbone.compute_logits(model.hidden_states(batch))
    difference = (changed - logits).abs().amax(2)[batch.segment_ids > 0]
    assert difference.max() > 1e-3, "the direction of an image's attention changes nothing"


def test_caption_loss_equals_transformers(model: DuetModel) -> None:
    sequence = model.renderer.render_caption(WIDE, "a flower of two colours")
    labels = torch.tensor([sequence.labels])
    with torch.no_grad():
        expected = model.backbone.model(
            **transformers_inputs_of(model, sequence), labels=labels
        ).loss
    ((nats, num_tokens),) = model.compute_sequence_nll([sequence])
    assert_close(nats / num_tokens, float(expected), atol=1e-5, rtol=1e-5)


def test_packed_embeddings_equal_single_ones(model: DuetModel) -> None:
    items = [ODD, "no image " * 9, (WIDE, "then", TALL), (SMALL, "so"), "a"]
    assert_packed_embeddings_equal_single(model, items, pack_to=256)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_answers_equal_transformers(model: DuetModel, num_beams: int) -> None:
    turns = [(WIDE, "what is it, and of what?"), (TALL, SMALL, "and these?")]
    assert_beams_equal_transformers(model, turns, num_beams=num_beams)


def test_requests_entering_one_by_one_get_the_answers_of_single_prompts(model: DuetModel) -> None:
    turns = [(WIDE, "what is it, and of what?"), (TALL, SMALL, "and these?"), ("no image",)]
    prompts = [model.prefill_inputs([sequence]) for sequence in render_prompts(model, turns)]
    expected = [generate_texts(model.backbone, prompt, 9)[0] for prompt in prompts]
    batcher = ContinuousBatcher(model.backbone, model.renderer.eos_token_ids)
    requests = [Request(9) for _ in prompts]
    for prompt, request in zip(prompts, requests, strict=True):  # each enters one token later
        batcher.add_requests(prompt, [request])
        batcher.step()
    while batcher.requests:
        batcher.step()
    decoded = model.backbone.tokenizer.batch_decode(
        [request.token_ids for request in requests], skip_special_tokens=True
    )
    assert [text.strip() for text in decoded] == expected


def test_soft_prompts_are_unknown_to_the_per_layer_embeddings(
    model: DuetModel, tmp_path: Path
) -> None:
    """After a change of all trained tensors, saved and merged models embed as before."""
    model.save_merged(tmp_path / "scaled")
    model = DuetModel.from_pretrained(tmp_path / "scaled")
    model.make_trainable(lora=LoraSettings(rank=2), projector=True, soft_prompts=True)
    batch = model.collate(render_mixed_sequences(model))
    gradients = compute_gradients(model, batch)
    projection = "backbone.model.model.embed_vision.embedding_projection.weight"
    assert {"soft_prompts.rows", projection} <= gradients.keys()
    model.backbone.enable_gradient_checkpointing()
    recomputed = compute_gradients(model, batch)
    assert recomputed.keys() == gradients.keys()
    for name, gradient in recomputed.items():
        assert_close(gradient, gradients[name], **CLOSE, msg=lambda m, name=name: f"{name}: {m}")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    items = [WIDE, "a text"]
    embeddings = model.eval().encode(items)
    model.save_pretrained(tmp_path / "saved")
    saved = DuetModel.from_pretrained(tmp_path / "saved")
    assert_close(saved.encode(items), embeddings, atol=1e-6, rtol=0)
    model.save_merged(tmp_path / "merged")
    merged = DuetModel.from_pretrained(tmp_path / "merged")
    assert_close(merged.encode(items), embeddings, atol=1e-5, rtol=0)
    assert_logits_equal_transformers(merged, merged.collate(render_mixed_sequences(merged)))


def compute_gradients(model: DuetModel, batch: object) -> dict[str, torch.Tensor]:
    """Return the gradients of the sum of the embeddings' first component, by parameter name."""
    model.zero_grad()
    model.train()(batch).embeddings[:, 0].sum().backward()
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.grad is not None
    }


def test_bidirectional_checkpoint_is_refused(model: DuetModel) -> None:
    model.backbone.model.config.text_config.use_bidirectional_attention = "all"
    with pytest.raises(ModelError, match="cannot write"):
        model.encode(["a"])
