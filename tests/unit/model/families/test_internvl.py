"""InternVL: squares of a fixed size, with and without tiles."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from helpers import tiny
from helpers.family_checks import (
    CLOSE,
    PROMPTS,
    SMALL,
    TALL,
    WIDE,
    assert_logits_equal_transformers,
    render_mixed_sequences,
    render_prompts,
)
from vlduet.inspect import internals
from vlduet.model.backbone import load_backbone
from vlduet.model.duet import DuetModel


@pytest.fixture(params=[False, True], ids=["whole", "tiles"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> DuetModel:
    tiny.build_internvl(tmp_path / "base", tiles=request.param)
    backbone = load_backbone(tmp_path / "base")
    return tiny.scale_up_weights(DuetModel(backbone, prompts=PROMPTS).eval())


def test_number_of_tokens_equals_the_processor_s_count(model: DuetModel) -> None:
    image_processor = model.backbone.image_processor
    prepared = [model.prepare_image(ref) for ref in (WIDE, TALL, SMALL)]
    num_squares = [1, 1, 1]
    if image_processor.crop_to_patches:  # a grid of tiles, followed by the whole image
        count = image_processor.get_number_of_image_patches
        num_squares = [count(16, 48, {}), count(24, 16, {}), count(16, 16, {})]
        assert num_squares[0] == 4
    num_tokens = [image.num_tokens for image in prepared]
    assert num_tokens == [4 * squares for squares in num_squares]
    in_one_batch = model.vision_features(prepared).split(num_tokens)
    for image, features in zip(prepared, in_one_batch, strict=True):
        model.feature_cache._memory.clear()
        assert_close(model.vision_features([image]), features, **CLOSE)


def test_attention_map_covers_the_whole_image_without_tiles(model: DuetModel) -> None:
    prepared = model.backbone.prepare_image(WIDE)
    assert model.backbone.vision_tower_pixels(prepared).shape == (3, 16, 16)
    overview = range(prepared.num_tokens)[model.backbone.overview_features(prepared)]
    assert list(overview) == list(range(prepared.num_tokens))[-4:]
    with internals.eager_attention(model):
        attention = internals.attention_map(model, WIDE)
    assert attention.weights.shape == (2, 2)
    tiles_have_a_share = bool(attention.weights.sum() < 0.99 * attention.share)
    assert tiles_have_a_share == (prepared.num_tokens > 4)


def test_logits_equal_transformers(model: DuetModel) -> None:
    batch = model.collate(render_mixed_sequences(model), padding_side="left")
    assert_logits_equal_transformers(model, batch)
    changed = model.renderer.render_embedding((tiny.random_image(9, 16), "then", TALL))
    with torch.no_grad():
        difference = (
            model.hidden_states(model.collate([changed]))[0, -1] - model.hidden_states(batch)[0, -1]
        )
    assert difference.abs().max() > 1e-3, "the image changes nothing"


def test_chat_equals_what_the_checkpoint_s_processor_writes(model: DuetModel) -> None:
    (chat,) = render_prompts(model, [(WIDE, "what?")])
    tokens = "<image>" * model.prepare_image(WIDE).num_tokens
    text = f"<|user|><|vision_start|>{tokens}<|vision_end|>what?</s><|assistant|>"
    expected = model.backbone.tokenizer.encode(text, add_special_tokens=False)
    assert list(chat.token_ids) == expected


def test_hub_folder_opens_without_torchvision(tmp_path: Path) -> None:
    tiny.build_internvl(tmp_path / "base")
    empty = ("crop_size", "device", "do_center_crop", "input_data_format", "return_tensors")
    settings = dict.fromkeys(empty) | {
        "image_processor_type": "GotOcr2ImageProcessorFast",
        "processor_class": "InternVLProcessor",
        "size": {"height": 16, "width": 16},
        "crop_to_patches": False,
        "data_format": "channels_first",
    }
    (tmp_path / "base" / "preprocessor_config.json").write_text(json.dumps(settings))
    prepared = load_backbone(tmp_path / "base").prepare_image(WIDE)
    assert prepared.num_tokens == 4
    assert prepared.inputs["pixel_values"].shape == (1, 3, 16, 16)
