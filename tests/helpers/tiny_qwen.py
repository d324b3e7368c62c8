"""Builders of tiny random Qwen-VL and GLM-V checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    Glm4vConfig,
    Glm4vForConditionalGeneration,
    Glm46VConfig,
    Glm46VForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
from transformers.models.glm46v.image_processing_pil_glm46v import Glm46VImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from helpers.tiny_parts import build_text_config, save_tokenizer
from helpers.tiny_tokenizers import (
    CHAT_TEMPLATE,
    SPECIAL_TOKENS,
    VISION_TOKENS,
    build_tokenizer,
)

QWEN_PATCH_CONFIG = {"patch_size": 4, "temporal_patch_size": 2, "spatial_merge_size": 2}
TOWER_CONFIG = {
    "depth": 2,
    "hidden_size": 16,
    "out_hidden_size": 32,
    "num_heads": 2,
    "intermediate_size": 32,
}


def build_qwen2_vl(folder: Path, *, seed: int = 0) -> Path:
    """Write a Qwen2-VL checkpoint: 4 to 16 tokens an image, by its proportions; tied embeddings."""
    torch.manual_seed(seed)
    tower = {
        "depth": 2,
        "embed_dim": 16,
        "hidden_size": 32,
        "num_heads": 2,
        "mlp_ratio": 2,
        "in_channels": 3,
    }
    config = Qwen2VLConfig(**_build_qwen_config(tower))
    Qwen2VLForConditionalGeneration(config).save_pretrained(folder)
    return _save_qwen_processor(folder)


def build_qwen2_5_vl(folder: Path, *, seed: int = 0) -> Path:
    """Write a Qwen2.5-VL checkpoint: all but one tower layer attend in windows of 2 x 2 tokens."""
    torch.manual_seed(seed)
    tower = TOWER_CONFIG | {"window_size": 16, "fullatt_block_indexes": [1]}
    config = Qwen2_5_VLConfig(**_build_qwen_config(tower))
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    return _save_qwen_processor(folder)


def build_qwen3_vl(folder: Path, *, seed: int = 0) -> Path:
    """Write a Qwen3-VL checkpoint: DeepStack from two tower layers to the first two LM layers."""
    torch.manual_seed(seed)
    config = Qwen3VLConfig(**_build_qwen3_config({}))
    Qwen3VLForConditionalGeneration(config).save_pretrained(folder)
    return _save_qwen_processor(folder)


def build_qwen3_vl_moe(folder: Path, *, seed: int = 0) -> Path:
    """Write a Qwen3-VL checkpoint with a mixture of experts: two of four per token."""
    torch.manual_seed(seed)
    experts = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "decoder_sparse_step": 1,
    }
    config = Qwen3VLMoeConfig(**_build_qwen3_config(experts))
    Qwen3VLMoeForConditionalGeneration(config).save_pretrained(folder)
    return _save_qwen_processor(folder)


def build_glm4v(folder: Path, *, seed: int = 0) -> Path:
    """Write a GLM-4.1V checkpoint: as Qwen2-VL, but a convolution merges patches into tokens."""
    torch.manual_seed(seed)
    Glm4vForConditionalGeneration(Glm4vConfig(**_build_glm_config())).save_pretrained(folder)
    return _save_glm_processor(folder, Glm4vImageProcessorPil)


def build_glm46v(folder: Path, *, seed: int = 0) -> Path:
    """Write a GLM-4.6V checkpoint, which differs from GLM-4.1V in its class names."""
    torch.manual_seed(seed)
    Glm46VForConditionalGeneration(Glm46VConfig(**_build_glm_config())).save_pretrained(folder)
    return _save_glm_processor(folder, Glm46VImageProcessorPil)


def _build_qwen_config(tower: dict[str, Any]) -> dict[str, Any]:
    """Return arguments of a Qwen-VL config with the given vision tower."""
    text = build_text_config().to_dict()
    names = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
    )
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    first_vision_id = len(SPECIAL_TOKENS) + 256
    vocab_size = first_vision_id + len(VISION_TOKENS)
    text_config = {name: text[name] for name in names}
    return {
        "vision_config": tower | QWEN_PATCH_CONFIG,
        "text_config": text_config | {"vocab_size": vocab_size, "rope_parameters": rope},
        "image_token_id": 3,
        "video_token_id": 4,
        "vision_start_token_id": first_vision_id,
        "vision_end_token_id": first_vision_id + 1,
        "tie_word_embeddings": True,
    }


def _build_qwen3_config(text_options: dict[str, Any]) -> dict[str, Any]:
    """Return arguments of a Qwen3-VL config; `text_options` are added to its text config."""
    deepstack = {"depth": 3, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16}
    config = _build_qwen_config(TOWER_CONFIG | deepstack)
    config["text_config"] |= {"head_dim": 8} | text_options
    return config


def _build_glm_config() -> dict[str, Any]:
    """Return arguments of a GLM-V config."""
    config = _build_qwen_config(TOWER_CONFIG | {"image_size": 16})
    config["text_config"]["rope_parameters"] |= {"partial_rotary_factor": 1.0}
    config["image_start_token_id"] = config.pop("vision_start_token_id")
    config["image_end_token_id"] = config.pop("vision_end_token_id")
    config["tie_word_embeddings"] = False
    return config


def _save_qwen_processor(folder: Path) -> Path:
    """Write the image processor and the tokenizer of a Qwen-VL and return the folder."""
    Qwen2VLImageProcessorPil(
        size={"shortest_edge": 16 * 16, "longest_edge": 32 * 32},
        patch_size=4,
        temporal_patch_size=2,
        merge_size=2,
    ).save_pretrained(folder)
    begin, end = VISION_TOKENS
    template = CHAT_TEMPLATE.replace("'<image>'", f"'{begin}<image>{end}'")
    return save_tokenizer(folder, build_tokenizer(bos=False, more=VISION_TOKENS), template=template)


def _save_glm_processor(folder: Path, image_processor_class: type) -> Path:
    """Write the image processor and the tokenizer of a GLM-V and return the folder."""
    _save_qwen_processor(folder)
    image_processor_class(
        size={"shortest_edge": 16 * 16 * 2, "longest_edge": 32 * 32 * 2},
        patch_size=4,
        temporal_patch_size=2,
        merge_size=2,
    ).save_pretrained(folder)
    return folder
