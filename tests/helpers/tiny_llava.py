"""Builders of tiny random LLaVA, LLaVA-NeXT, LLaVA-OneVision and FastVLM checkpoints."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    EfficientNetConfig,
    FastVlmConfig,
    FastVlmForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
)
from transformers.models.llava import LlavaProcessor
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)

from helpers.tiny_parts import (
    build_clip_config,
    build_clip_image_processor,
    build_siglip_config,
    build_text_config,
    save_tokenizer,
)
from helpers.tiny_tokenizers import CHAT_TEMPLATE, build_tokenizer


def build_llava(folder: Path, *, seed: int = 0) -> Path:
    """Write a LLaVA 1.5 checkpoint: CLIP with 4 patches and a class token that is dropped."""
    torch.manual_seed(seed)
    config = LlavaConfig(
        vision_config=build_clip_config(),
        text_config=build_text_config(),
        image_token_index=3,
        image_seq_length=4,
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    LlavaProcessor(
        build_clip_image_processor(16),
        build_tokenizer(bos=True),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
    return folder


def build_llava_next(folder: Path, *, seed: int = 0) -> Path:
    """Write a LLaVA 1.6 checkpoint: 4 tokens per tile, an overview and up to four tiles."""
    torch.manual_seed(seed)
    grid_pinpoints = [[16, 32], [32, 16], [32, 32], [16, 48]]
    config = LlavaNextConfig(
        vision_config=build_clip_config(),
        text_config=build_text_config(),
        image_token_index=3,
        image_grid_pinpoints=grid_pinpoints,
    )
    LlavaNextForConditionalGeneration(config).save_pretrained(folder)
    LlavaNextImageProcessorPil(
        size={"shortest_edge": 16},
        crop_size={"height": 16, "width": 16},
        image_grid_pinpoints=grid_pinpoints,
    ).save_pretrained(folder)
    return save_tokenizer(folder, build_tokenizer(bos=True))


def build_llava_onevision(folder: Path, *, seed: int = 0) -> Path:
    """Write a LLaVA-OneVision checkpoint: 4 tokens per tile, up to six tiles along a side."""
    torch.manual_seed(seed)
    grid_pinpoints = [[16 * rows, 16 * columns] for rows in range(1, 7) for columns in range(1, 7)]
    config = LlavaOnevisionConfig(
        vision_config=build_siglip_config(patch_size=8),
        text_config=build_text_config(),
        image_token_index=3,
        video_token_index=4,
        image_grid_pinpoints=grid_pinpoints,
    )
    LlavaOnevisionForConditionalGeneration(config).save_pretrained(folder)
    LlavaOnevisionImageProcessorPil(
        size={"height": 16, "width": 16}, image_grid_pinpoints=grid_pinpoints
    ).save_pretrained(folder)
    return save_tokenizer(folder, build_tokenizer(bos=True))


def build_fast_vlm(folder: Path, *, seed: int = 0) -> Path:
    """Write a FastVLM checkpoint with a convolutional tower, as nano is.

    An image takes 4 tokens; embeddings are tied.
    """
    torch.manual_seed(seed)
    vision_config = EfficientNetConfig(
        image_size=8,
        width_coefficient=0.25,
        depth_coefficient=1.0,
        in_channels=(32, 16),
        out_channels=(16, 32),
        kernel_sizes=(3, 3),
        strides=(1, 2),
        num_block_repeats=(1, 1),
        expand_ratios=(1, 2),
        hidden_dim=320,
        hidden_size=320,
        dropout_rate=0.0,
        drop_connect_rate=0.0,
    )
    text_config = build_text_config()
    text_config.tie_word_embeddings = True
    config = FastVlmConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_index=3,
        image_seq_length=4,
        tie_word_embeddings=True,
    )
    model = FastVlmForConditionalGeneration(config)
    # With the default initialisation the signal of the image vanishes on its way; a test that
    # changes an image must see a difference.
    tower = model.model.vision_tower
    for parameter in [*tower.parameters(), *model.model.multi_modal_projector.parameters()]:
        if parameter.ndim > 1:
            torch.nn.init.kaiming_normal_(parameter)
    for name, parameter in tower.named_parameters():
        if parameter.ndim == 1 and name.endswith("weight"):
            torch.nn.init.ones_(parameter)
    model.save_pretrained(folder)
    LlavaProcessor(
        build_clip_image_processor(8),
        build_tokenizer(bos=False),
        patch_size=4,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        image_token="<image>",
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
    return folder
