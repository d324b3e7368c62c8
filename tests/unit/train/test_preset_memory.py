"""The presets of the papers fit the GPUs that their comments name, by the estimate of a dry run."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from helpers import tiny
from vlduet import config
from vlduet.config import RunConfig
from vlduet.model.adapters import LoraSettings
from vlduet.model.backbone import Backbone, load_backbone
from vlduet.model.duet import DuetModel
from vlduet.model.prompts import Prompts
from vlduet.train.memory import (
    ActivationProfile,
    BatchSize,
    count_state_bytes,
    measure_activations,
)

ENCODER_BYTES = 4 * (87 + 109 + 428) * 1_000_000
"""DINOv2-base, BGE-base and CLIP ViT-L/14 in float32, which sugar compares slices with."""
PROMPTS = Prompts(image="{image} sum:", text="{text} sum:", parts="{parts} sum:", chat=False)


@dataclass(frozen=True)
class Shape:
    """Sizes of a checkpoint of the LLaVA 1.5 family."""

    width: int
    intermediate: int
    num_layers: int
    num_heads: int


SHAPES = {"7b": Shape(4096, 11008, 32, 32), "13b": Shape(5120, 13824, 40, 40)}


def build_model(
    folder: Path, shape: Shape, settings: RunConfig, *, num_layers: int, device: str
) -> DuetModel:
    """Return a model as a preset trains it, in bfloat16, with arbitrary or (on `meta`) no weights.

    Args:
        folder: tiny checkpoint of the family, for tokenizer and image processor.
        shape: sizes of the language model.
        settings: the preset.
        num_layers: number of layers of the language model.
        device: `cpu`, with a small vocabulary and vision tower, or `meta` with the true ones.
    """
    is_meta = device == "meta"
    text_config = LlamaConfig(
        hidden_size=shape.width,
        intermediate_size=shape.intermediate,
        num_hidden_layers=num_layers,
        num_attention_heads=shape.num_heads,
        vocab_size=32064 if is_meta else 512,
    )
    vision_config = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24 if is_meta else 1,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(
            LlavaConfig(vision_config=vision_config, text_config=text_config)
        )
    # Memory that is never written is zeros, and takes no time.
    model = model.to(torch.bfloat16).to_empty(device=device).requires_grad_(False)
    parts = load_backbone(folder)
    backbone = Backbone(model.eval(), parts.tokenizer, parts.image_processor, folder=folder)
    duet = DuetModel(
        backbone, prompts=PROMPTS, head=settings.model.head or "none", dim=settings.model.dim
    )
    train = settings.train
    assert train.lora is not None
    duet.make_trainable(
        lora=LoraSettings(**train.lora.model_dump()),
        projector=train.projector,
        soft_prompts=train.soft_prompts,
    )
    if train.checkpointing:
        backbone.enable_gradient_checkpointing()
    return duet


def measure_profiles(
    folder: Path, shape: Shape, settings: RunConfig
) -> tuple[ActivationProfile, ActivationProfile]:
    """Return the activations of a model with one and with two layers; its vocabulary is 32,064."""
    model = build_model(folder, shape, settings, num_layers=2, device="cpu")
    sequences = [model.renderer.render_embedding((text,)) for text in ("one", "one two three")]
    batch = model.collate(sequences)
    batch.labels[-1, -1] = 0
    profiles = []
    for num_layers in (1, 2):
        model.backbone.model.config.text_config.num_hidden_layers = num_layers
        profiles.append(replace(measure_activations(model, [batch]), logits=4.0 * 32064))
    return profiles[0], profiles[1]


@pytest.mark.parametrize(
    ("preset", "size", "encoder_bytes"),
    [
        ("vladva", "7b", 0),
        ("vladva-llava-13b", "13b", 0),
        ("sugar", "7b", ENCODER_BYTES),
        ("duet", "7b", ENCODER_BYTES),
    ],
)
def test_a_preset_fits_the_gpu_that_it_names(
    tmp_path: Path, preset: str, size: str, encoder_bytes: int
) -> None:
    comment = (config.PRESETS_FOLDER / f"{preset}.yaml").read_text()
    named = re.search(r"GPUs? of (\d+) GB.*?about (\d+) GB", comment)
    assert named is not None
    gpu_gb, documented_gb = map(int, named.groups())
    settings = config.load_run_config(preset)
    train, max_tokens = settings.train, settings.data.max_tokens
    assert train.chunk_tokens and max_tokens and max_tokens <= train.chunk_tokens
    tiny.FAMILY_BUILDERS["llava"](tmp_path / "base")
    shape = SHAPES[size]
    full = build_model(
        tmp_path / "base", shape, settings, num_layers=shape.num_layers, device="meta"
    )
    # The longest rows, with labels at most tokens: more than any chunk of the data has.
    chunk = BatchSize(
        tokens=train.chunk_tokens,
        token_pairs=train.chunk_tokens * max_tokens,
        labels=train.chunk_tokens,
        anchors=train.chunk_tokens // 64,
    )
    first, second = measure_profiles(tmp_path / "base", shape, settings)
    layer = second.count_saved_bytes(chunk) - first.count_saved_bytes(chunk)
    saved = first.count_saved_bytes(chunk) + (shape.num_layers - 1) * layer
    state = count_state_bytes(full) + encoder_bytes
    total = (state + saved + first.count_backward_bytes(chunk)) / 1e9
    assert total == pytest.approx(documented_gb, rel=0.04)
    assert total < 0.85 * gpu_gb
