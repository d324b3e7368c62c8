"""Idefics3 and SmolVLM: tiles with text between them, followed by the whole image."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from transformers import AutoImageProcessor, AutoTokenizer
from transformers.models.idefics3 import Idefics3Processor
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.smolvlm.processing_smolvlm import DEFAULT_CHAT_TEMPLATE

from helpers import tiny
from helpers.family_checks import (
    ODD,
    PROMPTS,
    SMALL,
    TALL,
    WIDE,
    assert_logits_equal_transformers,
    render_prompts,
)
from vlduet.data import images
from vlduet.data.records import Message
from vlduet.inspect import internals
from vlduet.model.adapters import LoraSettings
from vlduet.model.backbone import load_backbone
from vlduet.model.duet import DuetModel
from vlduet.model.generation.offline import generate_texts


@pytest.fixture(params=["smolvlm", "idefics3"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> DuetModel:
    return tiny.scale_up_weights(
        tiny.build_duet_model(tmp_path / "base", family=request.param, prompts=PROMPTS, head="none")
    )


def load_without_splitting(folder: Path) -> DuetModel:
    """Return the model of a folder after its processor is set to leave images whole."""
    path = folder / "preprocessor_config.json"
    settings = json.loads(path.read_text()) | {"do_image_splitting": False}
    path.write_text(json.dumps(settings))
    return DuetModel(load_backbone(folder), prompts=PROMPTS).eval()


def load_transformers_processor(folder: Path) -> Idefics3Processor:
    """Return Idefics3's processor: SmolVLM's writes the same but needs one more package."""
    image_processor = Idefics3ImageProcessorPil.from_pretrained(folder)
    return Idefics3Processor(
        image_processor, AutoTokenizer.from_pretrained(folder), image_seq_len=4
    )


def test_image_is_cut_into_tiles_as_its_processor_says(model: DuetModel) -> None:
    refs = (WIDE, TALL, ODD)  # resized to 32 x 16, 32 x 32 and 32 x 32 pixels
    prepared = [model.prepare_image(ref) for ref in refs]
    assert [image.num_features for image in prepared] == [3 * 4, 5 * 4, 5 * 4]
    num_text_tokens = [len(image.interleaved_tokens) for image in prepared]
    # Two per square, one after the last square, and the line ends.
    assert num_text_tokens == [3 * 2 + 2 + 1, 5 * 2 + 3 + 1, 5 * 2 + 3 + 1]
    pixels = [model.backbone.vision_tower_pixels(image) for image in prepared]
    assert [picture.shape for picture in pixels] == [(3, 16, 16)] * 3
    assert len(model.vision_features(prepared)) == 52
    assert [image.feature_span for image in prepared] == [(2, 20), (2, 33), (2, 33)]
    without_tiles = load_without_splitting(model.backbone.folder)
    for ref in refs:
        image = without_tiles.prepare_image(ref)
        assert (image.num_features, image.num_tokens) == (4, 7)


@pytest.mark.parametrize("split", [True, False])
def test_logits_equal_transformers(model: DuetModel, split: bool) -> None:
    if not split:
        model = tiny.scale_up_weights(load_without_splitting(model.backbone.folder))
    items = [(WIDE, "then", ODD), ("before", TALL), (SMALL, "so")]
    sequences = [model.renderer.render_embedding(parts) for parts in items]
    assert_logits_equal_transformers(model, model.collate(sequences, padding_side="left"))
    changed = model.renderer.render_embedding((tiny.random_image(9, 16), "then", ODD))
    with torch.no_grad():
        difference = (
            model.hidden_states(model.collate([changed]))[0, -1]
            - model.hidden_states(model.collate(sequences[:1]))[0, -1]
        )
    assert difference.abs().max() > 1e-3, "the image changes nothing"


def test_batched_results_equal_those_of_single_images(model: DuetModel) -> None:
    items = [ODD, "no image", (WIDE, "then", TALL), (SMALL, "so"), (ODD, WIDE)]
    single = np.concatenate([model.encode([item]) for item in items])
    assert_close(model.encode(items), single, atol=1e-5, rtol=0)
    turns = [(ODD, "what?"), (WIDE, "what?")]
    answers = [model.generate([Message("user", parts)], max_new_tokens=6) for parts in turns]
    prefill_inputs = model.prefill_inputs(render_prompts(model, turns))
    assert generate_texts(model.backbone, prefill_inputs, 6) == answers


def test_attention_map_covers_the_whole_image_without_tiles(model: DuetModel) -> None:
    with internals.eager_attention(model):
        attention = internals.attention_map(model, WIDE)
    assert attention.weights.shape == (2, 2)
    assert attention.weights.sum() < 0.99 * attention.share, "tiles have a share, too"


def test_exported_checkpoint_s_own_processor_writes_the_same_prompts(
    model: DuetModel, tmp_path: Path
) -> None:
    model.save_merged(tmp_path / "merged")
    processor = load_transformers_processor(tmp_path / "merged")
    for refs in ((WIDE,), (TALL,), (ODD, WIDE)):
        text = f"<|user|>{'<image>' * len(refs)}what?</s><|assistant|>"
        pictures = [images.load_image(ref) for ref in refs]
        expected = processor(text=text, images=[pictures], return_tensors="pt")
        (chat,) = render_prompts(model, [(*refs, "what?")])
        assert expected["input_ids"][0].tolist() == list(chat.token_ids)
        pixel_values = [model.prepare_image(ref).inputs["pixel_values"] for ref in refs]
        assert_close(expected["pixel_values"][0], torch.cat(pixel_values))


def test_export_keeps_settings_of_a_base_with_one_processor_file(
    model: DuetModel, tmp_path: Path
) -> None:
    base = model.backbone.folder
    settings = json.loads((base / "preprocessor_config.json").read_text())
    config = {"image_seq_len": 4, "image_processor": settings}
    (base / "processor_config.json").write_text(json.dumps(config))
    backbone = load_backbone(base)
    backbone.image_processor.do_image_splitting = False
    merged = tmp_path / "merged"
    DuetModel(backbone, prompts=PROMPTS).save_merged(merged)

    def load_image_processor(folder: Path) -> Any:
        return AutoImageProcessor.from_pretrained(folder, backend="pil")

    assert load_image_processor(base).do_image_splitting
    assert not load_image_processor(merged).do_image_splitting
    assert json.loads((merged / "processor_config.json").read_text())["image_seq_len"] == 4


def test_lora_is_added_to_the_language_model_only(model: DuetModel) -> None:
    model.make_trainable(lora=LoraSettings(rank=2), projector=True)
    adapter_names = list(model.adapter_tensors())
    assert adapter_names
    assert all(".text_model.layers." in name for name in adapter_names)
    trained = {name for name, tensor in model.named_parameters() if tensor.requires_grad}
    assert any("connector" in name for name in trained)
    assert not any("vision_model" in name for name in trained)


def test_published_chat_template_is_supported(model: DuetModel) -> None:
    tokenizer = model.backbone.tokenizer
    tokenizer.chat_template = DEFAULT_CHAT_TEMPLATE
    turns = (Message("system", ("Be short.",)), Message("user", (WIDE, "what?")))
    chat = model.renderer.render_chat(turns, add_generation_prompt=True)
    image = tiny.image_as_text(model.renderer, WIDE)
    assert tokenizer.decode(list(chat.token_ids)) == (
        "<|im_start|>System: Be short.<end_of_utterance>\n"
        f"User:{image}what?<end_of_utterance>\nAssistant:"
    )
