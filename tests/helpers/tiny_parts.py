"""Parts shared by tiny checkpoints: configs of language models and towers, processors."""

from __future__ import annotations

from pathlib import Path

from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)
from transformers.models.clip import CLIPImageProcessorPil

from helpers.tiny_tokenizers import CHAT_TEMPLATE, SPECIAL_TOKENS


def build_text_config() -> LlamaConfig:
    """Return the config of a Llama with two layers of width 32."""
    return LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(SPECIAL_TOKENS) + 256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def build_clip_config() -> CLIPVisionConfig:
    """Return the config of a CLIP tower with 4 patches and a class token."""
    return CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )


def build_siglip_config(*, patch_size: int) -> SiglipVisionConfig:
    """Return the config of a SigLIP tower for images of 16 x 16 pixels."""
    return SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=patch_size,
        vision_use_head=False,
    )


def build_clip_image_processor(size: int) -> CLIPImageProcessorPil:
    """Return an image processor that resizes to `size` x `size` pixels without cropping."""
    square = {"height": size, "width": size}
    return CLIPImageProcessorPil(size=square, crop_size=square, do_center_crop=False)


def save_tokenizer(
    folder: Path, tokenizer: PreTrainedTokenizerFast, *, template: str = CHAT_TEMPLATE
) -> Path:
    """Write a tokenizer with a chat template, which is set on it, and return the folder."""
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder
