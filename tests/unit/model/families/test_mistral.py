"""Mistral 3: images in their own proportions, stored as cells, with a token after each row."""

from __future__ import annotations

from dataclasses import replace
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
    assert_logits_equal_transformers,
    render_mixed_sequences,
)
from vlduet.data import images
from vlduet.inspect import internals
from vlduet.model.duet import DuetModel


@pytest.fixture
def model(tmp_path: Path) -> DuetModel:
    return tiny.scale_up_weights(
        tiny.build_duet_model(tmp_path / "base", family="mistral3", prompts=PROMPTS, head="none")
    )


@pytest.mark.parametrize(
    ("ref", "rows", "columns"), [(WIDE, 2, 4), (TALL, 3, 2), (SMALL, 2, 2), (ODD, 3, 4)]
)
def test_rows_of_an_image_end_with_a_text_token(
    model: DuetModel, ref: images.ImageRef, rows: int, columns: int
) -> None:
    """As PixtralProcessor writes it, which needs torchvision. The largest size is 32 x 32."""
    row_end, image_end = tiny.PIXTRAL_TOKENS
    prepared = model.prepare_image(ref)
    expected = row_end.join(["<image>" * columns] * rows) + image_end
    assert tiny.image_as_text(model.renderer, ref) == expected
    assert prepared.num_tokens == rows * (columns + 1) - 1
    assert prepared.num_features == rows * columns
    batch = model.collate([model.renderer.render_embedding(("x", ref))])
    assert torch.equal(batch.image_mask, batch.token_ids == model.renderer.image_token_id)


def test_logits_equal_transformers(model: DuetModel) -> None:
    batch = model.collate(render_mixed_sequences(model), padding_side="left")
    assert_logits_equal_transformers(model, batch)


def test_features_of_images_of_several_sizes_do_not_depend_on_the_batch(model: DuetModel) -> None:
    prepared = [model.prepare_image(ref) for ref in (WIDE, TALL, ODD)]
    features = model.backbone._run_vision_tower(prepared)
    single = [model.backbone._run_vision_tower([image]) for image in prepared]
    assert len(features) == sum(image.num_features for image in prepared)
    assert_close(features, torch.cat(single), **CLOSE)
    items = [ODD, "no image", (WIDE, "then", TALL), (SMALL, "so")]
    embeddings = np.concatenate([model.encode([item]) for item in items])
    assert_close(model.encode(items), embeddings, atol=1e-5, rtol=0)


def test_cells_make_the_picture_of_the_processor(model: DuetModel) -> None:
    for ref in (WIDE, TALL, ODD):
        prepared = model.backbone.prepare_image(ref)
        expected = model.backbone.image_processor(
            images=images.load_image(ref), return_tensors="pt"
        )
        pixels = model.backbone.vision_tower_pixels(prepared)
        assert torch.equal(pixels, expected["pixel_values"][0])
        assert torch.equal(prepared.inputs["image_sizes"], expected["image_sizes"])


def test_vision_pooling_leaves_text_tokens_out(tmp_path: Path) -> None:
    """The embedding of the tower is the mean of an image's features, whatever else is in a row."""
    prompts = replace(PROMPTS, image_pool="vision")
    model = tiny.build_duet_model(
        tmp_path / "base", family="mistral3", prompts=prompts, head="split"
    )
    embeddings = model.encode([WIDE, "a text", TALL, ODD])
    for row, ref in ((0, WIDE), (2, TALL), (3, ODD)):
        features = model.backbone.compute_vision_features([model.prepare_image(ref)])
        expected = model.head.embed_vision_features(features.mean(0, keepdim=True))[0]
        assert_close(embeddings[row], expected.detach().numpy(), **CLOSE)


def test_attention_map_leaves_text_tokens_out(model: DuetModel) -> None:
    with internals.eager_attention(model):
        assert internals.attention_map(model, WIDE).weights.shape == (2, 4)
        assert internals.attention_map(model, TALL).weights.shape == (3, 2)
