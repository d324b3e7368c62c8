"""LLaVA-NeXT and LLaVA-OneVision: an overview, then tiles whose rows end with a learned token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from transformers import PixtralVisionConfig
from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor
from transformers.models.llava_onevision.processing_llava_onevision import (
    LlavaOnevisionProcessor,
)

from helpers import tiny
from helpers.family_checks import (
    CLOSE,
    ODD,
    PROMPTS,
    SMALL,
    TALL,
    WIDE,
    assert_logits_equal_transformers,
    render_prompts,
)
from vlduet.data import images
from vlduet.data.records import ImageRef, Message
from vlduet.errors import ModelError
from vlduet.model.duet import DuetModel
from vlduet.model.generation.offline import generate_texts


@pytest.fixture(params=["llava_next", "llava_onevision"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> DuetModel:
    model = tiny.scale_up_weights(
        tiny.build_duet_model(tmp_path / "base", family=request.param, prompts=PROMPTS, head="none")
    )
    with torch.no_grad():
        model.backbone.model.model.image_newline.normal_()
    return model


def create_transformers_processor(model: DuetModel) -> Any:
    """Return the checkpoint's processor of transformers, with only what counting tokens needs."""
    config = model.backbone.model.config
    if config.model_type == "llava_next":
        processor = LlavaNextProcessor.__new__(LlavaNextProcessor)
        processor.patch_size = 8
        processor.num_additional_image_tokens = 1
    else:
        processor = LlavaOnevisionProcessor.__new__(LlavaOnevisionProcessor)
        processor.num_image_tokens = 4
        processor.vision_aspect_ratio = "anyres_max_9"
    processor.image_processor = model.backbone.image_processor
    processor.vision_feature_select_strategy = config.vision_feature_select_strategy
    return processor


def test_number_of_tokens_equals_the_processor_s_count(model: DuetModel) -> None:
    processor = create_transformers_processor(model)
    has_class_token = model.backbone.model.config.model_type == "llava_next"
    for ref in (WIDE, TALL, SMALL, ODD):
        width, height = images.load_image(ref).size
        expected = processor._get_number_of_features(height, width, 16, 16) - has_class_token
        assert model.prepare_image(ref).num_tokens == expected


def test_features_do_not_depend_on_the_batch(model: DuetModel) -> None:
    prepared = [model.prepare_image(ref) for ref in (WIDE, ODD)]
    features = model.backbone.compute_vision_features(prepared)
    single = [model.backbone.compute_vision_features([image]) for image in prepared]
    assert len(features) == sum(image.num_tokens for image in prepared)
    assert_close(features, torch.cat(single), **CLOSE)
    assert_close(features, model.backbone._run_vision_tower(prepared), **CLOSE)


def test_logits_equal_transformers(model: DuetModel) -> None:
    """One image a prompt: of several, the processor of LLaVA-OneVision would cut none."""
    items = [(WIDE, "then"), ("before", TALL), (ODD, "so"), ("no image",)]
    sequences = [model.renderer.render_embedding(parts) for parts in items]
    batch = model.collate(sequences, padding_side="left")
    logits = assert_logits_equal_transformers(model, batch)
    with torch.no_grad():
        model.backbone.model.model.image_newline.normal_()
        changed = model.hidden_states(batch) @ model.lm_head_weight.T
    assert (changed[0, -1] - logits[0, -1]).abs().max() > 1e-3, "the newline changes nothing"


def test_batched_results_equal_those_of_single_images(model: DuetModel) -> None:
    items = [ODD, "no image", (WIDE, "then", TALL), (SMALL, "so")]
    single = np.concatenate([model.encode([item]) for item in items])
    assert_close(model.encode(items), single, atol=1e-5, rtol=0)
    turns = [(ODD, "what?"), (WIDE, "what?")]
    answers = [model.generate([Message("user", parts)], max_new_tokens=6) for parts in turns]
    prefill_inputs = model.prefill_inputs(render_prompts(model, turns))
    assert generate_texts(model.backbone, prefill_inputs, 6) == answers


def test_newline_rows_do_not_disturb_the_projector_s_gradient(
    model: DuetModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The projector also sees rows of zeros, whose outputs are dropped: no gradient, not NaN."""
    model.make_trainable(lora=None, projector=True)
    model.train()
    batch = model.collate([model.renderer.render_embedding((ODD, "x"))])
    parameters = list(model.backbone.projector.parameters())
    gradients = torch.autograd.grad(model(batch).embeddings[:, 0].sum(), parameters)
    num_newlines = []

    def project_features_only(
        transformers_model: Any, projector: torch.nn.Module, features: torch.Tensor
    ) -> torch.Tensor:
        is_newline = ~features.any(1)
        num_newlines.append(int(is_newline.sum()))
        newline = transformers_model.model.image_newline
        projected = newline.expand(len(features), -1).clone()
        projected[~is_newline] = projector(features[~is_newline])
        return projected

    monkeypatch.setattr(model.backbone.family, "project", project_features_only)
    expected = torch.autograd.grad(model(batch).embeddings[:, 0].sum(), parameters)
    assert num_newlines[0] > 0
    assert any(gradient.abs().max() > 0 for gradient in expected)
    for gradient, expected_gradient in zip(gradients, expected, strict=True):
        assert_close(gradient, expected_gradient, **CLOSE)


def test_overview_precedes_the_tiles(model: DuetModel) -> None:
    prepared = model.backbone.prepare_image(ODD)
    assert model.backbone.vision_tower_pixels(prepared).shape == (3, 16, 16)
    overview = range(prepared.num_tokens)[model.backbone.overview_features(prepared)]
    assert list(overview) == [0, 1, 2, 3]


def test_large_image_is_downscaled_before_it_is_cut(tmp_path: Path) -> None:
    """LLaVA-OneVision would downsample more than nine tiles behind the projector."""
    model = tiny.build_duet_model(tmp_path / "base", family="llava_onevision", prompts=PROMPTS)
    large = tiny.random_image(5, 90, width=120)
    picture = images.load_image(large)
    picture.thumbnail((48, 48))
    small = ImageRef(data=images.encode_png(picture))
    prepared = model.backbone.prepare_image(large)
    expected = model.backbone.prepare_image(small)
    assert prepared.inputs["pixel_values"].shape == (10, 3, 16, 16)
    assert prepared.num_tokens == expected.num_tokens
    assert torch.equal(prepared.inputs["pixel_values"], expected.inputs["pixel_values"])
    model.backbone.model.config.vision_aspect_ratio = "anyres_max_4"
    with pytest.raises(ModelError, match="vision_aspect_ratio 'anyres_max_4'"):
        model.backbone.prepare_image(large)


def test_llava_with_a_pixtral_tower_is_refused(tmp_path: Path) -> None:
    """Its images have text between their rows, which the LLaVA family does not write."""
    model = tiny.build_duet_model(tmp_path / "base", family="llava")
    model.backbone.model.config.vision_config = PixtralVisionConfig()
    with pytest.raises(ModelError, match="Pixtral tower"):
        model.backbone.prepare_image(WIDE)
