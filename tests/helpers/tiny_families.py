"""Builders of tiny random checkpoints of every supported family, written in a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PixtralVisionConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.models.smolvlm.configuration_smolvlm import SmolVLMVisionConfig
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from helpers.tiny_llava import (
    build_fast_vlm,
    build_llava,
    build_llava_next,
    build_llava_onevision,
)
from helpers.tiny_parts import build_siglip_config, build_text_config, save_tokenizer
from helpers.tiny_qwen import (
    build_glm4v,
    build_glm46v,
    build_qwen2_5_vl,
    build_qwen2_vl,
    build_qwen3_vl,
    build_qwen3_vl_moe,
)
from helpers.tiny_tokenizers import (
    LINE_END_MERGES,
    VISION_TOKENS,
    build_tokenizer,
    gemma_chat_template,
)

SMOLVLM_TOKENS = [
    "<fake_token_around_image>",
    "<global-img>",
    *(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)),
]
"""Special tokens of SmolVLM.

The first one precedes every square and follows the last, which is the whole image. The others say
which square follows.
"""
MISTRAL3_TOKEN_PIXELS = 8
"""Side of the pixel square that makes a token of a Mistral 3."""
PIXTRAL_TOKENS = ["[IMG_BREAK]", "[IMG_END]"]
"""Tokens between the rows of a Mistral 3 image and after it."""
SMALL_TOWER = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def build_internvl(folder: Path, *, seed: int = 0, tiles: bool = False) -> Path:
    """Write an InternVL checkpoint: 4 tokens a square.

    With `tiles`, an image that is not square is cut into several squares.
    """
    torch.manual_seed(seed)
    text_config = build_text_config()
    text_config.vocab_size += len(VISION_TOKENS)
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(image_size=16, patch_size=4, **SMALL_TOWER),
        text_config=text_config,
        image_token_id=3,
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    InternVLForConditionalGeneration(config).save_pretrained(folder)
    size = {"height": 16, "width": 16}
    GotOcr2ImageProcessorPil(size=size, crop_to_patches=tiles).save_pretrained(folder)
    names = dict(zip(("start_image_token", "end_image_token"), VISION_TOKENS, strict=True))
    return save_tokenizer(folder, build_tokenizer(bos=False, more=VISION_TOKENS, names=names))


def build_smolvlm(folder: Path, *, seed: int = 0) -> Path:
    """Write a SmolVLM checkpoint: 4 tokens a square; its processor cuts images into tiles."""
    torch.manual_seed(seed)
    vision_config = SmolVLMVisionConfig(image_size=16, patch_size=4, **SMALL_TOWER)
    config = SmolVLMConfig(**_build_idefics_config(vision_config))
    SmolVLMForConditionalGeneration(config).save_pretrained(folder)
    return _save_idefics_processor(folder, SmolVLMImageProcessorPil)


def build_idefics3(folder: Path, *, seed: int = 0) -> Path:
    """Write an Idefics3 checkpoint, which differs from SmolVLM in its class names."""
    torch.manual_seed(seed)
    vision_config = Idefics3VisionConfig(image_size=16, patch_size=4, **SMALL_TOWER)
    config = Idefics3Config(**_build_idefics_config(vision_config))
    Idefics3ForConditionalGeneration(config).save_pretrained(folder)
    return _save_idefics_processor(folder, Idefics3ImageProcessorPil)


def _build_idefics_config(vision_config: Any) -> dict[str, Any]:
    """Return arguments of an Idefics3 or SmolVLM config."""
    text_config = build_text_config()
    text_config.vocab_size += len(SMOLVLM_TOKENS)
    return {
        "vision_config": vision_config,
        "text_config": text_config,
        "image_token_id": 3,
        "scale_factor": 2,
        "tie_word_embeddings": False,
    }


def _save_idefics_processor(folder: Path, image_processor_class: type) -> Path:
    """Write image processor and tokenizer of an Idefics3 or SmolVLM and return the folder."""
    image_processor_class(
        size={"longest_edge": 32}, max_image_size={"longest_edge": 16}
    ).save_pretrained(folder)
    return save_tokenizer(folder, build_tokenizer(bos=False, more=SMOLVLM_TOKENS))


def build_mistral3(folder: Path, *, seed: int = 0) -> Path:
    """Write a Mistral 3 checkpoint: up to 32 x 32 pixels, cells of 8 x 8 pixels make a token."""
    torch.manual_seed(seed)
    text_config = build_text_config()
    text_config.vocab_size += len(PIXTRAL_TOKENS)
    config = Mistral3Config(
        vision_config=PixtralVisionConfig(image_size=32, patch_size=4, **SMALL_TOWER),
        text_config=text_config,
        image_token_index=3,
        spatial_merge_size=2,
        tie_word_embeddings=False,
    )
    Mistral3ForConditionalGeneration(config).save_pretrained(folder)
    PixtralImageProcessorPil(
        size={"longest_edge": 32}, patch_size={"height": 4, "width": 4}
    ).save_pretrained(folder)
    return save_tokenizer(folder, build_tokenizer(bos=True, more=PIXTRAL_TOKENS))


def build_gemma3(folder: Path, *, seed: int = 0) -> Path:
    """Write a Gemma 3 checkpoint: 4 tokens an image, one layer with a window of 16 tokens."""
    torch.manual_seed(seed)
    known_names = Gemma3TextConfig().to_dict()
    llama = build_text_config().to_dict()
    text_config = {name: value for name, value in llama.items() if name in known_names}
    first_vision_id = llama["vocab_size"]
    text_config |= {
        "model_type": "gemma3_text",
        "vocab_size": first_vision_id + len(VISION_TOKENS) + len(LINE_END_MERGES),
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": None,
    }
    config = Gemma3Config(
        vision_config=build_siglip_config(patch_size=4),
        text_config=text_config,
        mm_tokens_per_image=4,
        image_token_index=3,
        boi_token_index=first_vision_id,
        eoi_token_index=first_vision_id + 1,
    )
    model = Gemma3ForConditionalGeneration(config)
    projection = model.model.multi_modal_projector.mm_input_projection_weight
    torch.nn.init.normal_(projection, std=0.2)
    model.save_pretrained(folder)
    Gemma3ImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    names = dict(zip(("boi_token", "eoi_token"), VISION_TOKENS, strict=True))
    tokenizer = build_tokenizer(
        bos=True,
        more=VISION_TOKENS,
        names=names | {"image_token": "<image>"},
        merges=LINE_END_MERGES,
    )
    return save_tokenizer(folder, tokenizer, template=gemma_chat_template(""))


def build_gemma4(folder: Path, *, seed: int = 0) -> Path:
    """Write a small Gemma 4: up to 70 tokens an image, per-layer embeddings, shared keys.

    The last two layers use the keys and values of layers before them.
    """
    small = {
        "hidden_size_per_layer_input": 8,
        "num_kv_shared_layers": 2,
        "use_double_wide_mlp": True,
    }
    return _build_gemma4(folder, small, seed=seed)


def build_gemma4_large(folder: Path, *, seed: int = 0) -> Path:
    """Write a large Gemma 4: experts, and bidirectional images in layers with a window.

    In layers without a window, keys are values.
    """
    large = {
        "hidden_size_per_layer_input": 0,
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 16,
        "use_bidirectional_attention": "vision",
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
    }
    return _build_gemma4(folder, large, seed=seed)


def _build_gemma4(folder: Path, text_options: dict[str, Any], *, seed: int) -> Path:
    """Write a Gemma 4 checkpoint; `text_options` are added to its text config."""
    torch.manual_seed(seed)
    vision_config = SMALL_TOWER | {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "patch_size": 4,
        "pooling_kernel_size": 2,
        "position_embedding_size": 70 * 4,
    }
    llama = build_text_config().to_dict()
    names = (
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "eos_token_id",
    )
    first_vision_id = llama["vocab_size"]
    text_config = {name: llama[name] for name in names} | {
        "vocab_size": first_vision_id + len(VISION_TOKENS),
        "vocab_size_per_layer_input": first_vision_id + len(VISION_TOKENS),
        "pad_token_id": 0,
        "bos_token_id": 1,
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "head_dim": 8,
        "global_head_dim": 16,
        "sliding_window": 48,
        "final_logit_softcapping": 2.0,
    }
    config = Gemma4Config(
        text_config=text_config | text_options,
        vision_config=vision_config,
        image_token_id=3,
        boi_token_id=first_vision_id,
        eoi_token_id=first_vision_id + 1,
        video_token_id=first_vision_id - 1,  # bytes that occur in no text of a test
        audio_token_id=first_vision_id - 2,
    )
    Gemma4ForConditionalGeneration(config).save_pretrained(folder)
    Gemma4ImageProcessorPil(
        patch_size=4, pooling_kernel_size=2, max_soft_tokens=70
    ).save_pretrained(folder)
    return save_tokenizer(folder, build_tokenizer(bos=True, more=VISION_TOKENS))


FAMILY_BUILDERS = {
    "fast_vlm": build_fast_vlm,
    "gemma3": build_gemma3,
    "gemma4": build_gemma4,
    "gemma4_large": build_gemma4_large,
    "glm46v": build_glm46v,
    "glm4v": build_glm4v,
    "idefics3": build_idefics3,
    "internvl": build_internvl,
    "llava": build_llava,
    "llava_next": build_llava_next,
    "llava_onevision": build_llava_onevision,
    "mistral3": build_mistral3,
    "qwen2_5_vl": build_qwen2_5_vl,
    "qwen2_vl": build_qwen2_vl,
    "qwen3_vl": build_qwen3_vl,
    "qwen3_vl_moe": build_qwen3_vl_moe,
    "smolvlm": build_smolvlm,
}
"""Function that writes a tiny checkpoint of each family to a folder, by name of the family."""
