"""Builders of tiny random encoders: the frozen ones of Sugar by role, and a BART."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2Model,
)

from helpers.tiny_parts import build_clip_image_processor
from helpers.tiny_tokenizers import SPECIAL_TOKENS, build_tokenizer

SPECIAL_TOKEN_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
VOCAB_SIZE = len(SPECIAL_TOKENS) + 256


def build_vision_encoder(folder: Path, *, seed: int = 0) -> Path:
    """Write a DINOv2 with 4 patches."""
    torch.manual_seed(seed)
    config = Dinov2Config(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        mlp_ratio=2,
        image_size=16,
        patch_size=8,
    )
    Dinov2Model(config).save_pretrained(folder)
    build_clip_image_processor(16).save_pretrained(folder)
    return folder


def build_text_encoder(folder: Path, *, seed: int = 0) -> Path:
    """Write a BERT as a sentence encoder."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
    )
    BertModel(config).save_pretrained(folder)
    build_tokenizer(bos=False).save_pretrained(folder)
    return folder


def build_cross_encoder(folder: Path, *, seed: int = 0) -> Path:
    """Write a CLIP with embeddings of width 12."""
    torch.manual_seed(seed)
    shape = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    text = CLIPTextConfig(vocab_size=VOCAB_SIZE, **shape, **SPECIAL_TOKEN_IDS)
    vision = CLIPVisionConfig(image_size=16, patch_size=8, **shape)
    config = CLIPConfig(
        text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=12
    )
    CLIPModel(config).save_pretrained(folder)
    build_tokenizer(bos=True).save_pretrained(folder)
    build_clip_image_processor(16).save_pretrained(folder)
    return folder


def build_frozen_encoders(folder: Path) -> dict[str, Path]:
    """Write one encoder per role of Sugar below `folder` and return {role: its folder}."""
    return {
        "vision": build_vision_encoder(folder / "vision"),
        "text": build_text_encoder(folder / "text"),
        "cross": build_cross_encoder(folder / "cross"),
    }


def build_bart(folder: Path, *, seed: int = 0) -> Path:
    """Write a BART with one layer in the encoder and one in the decoder."""
    torch.manual_seed(seed)
    config = BartConfig(
        vocab_size=VOCAB_SIZE,
        d_model=16,
        max_position_embeddings=64,
        encoder_layers=1,
        encoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_layers=1,
        decoder_attention_heads=2,
        decoder_ffn_dim=16,
        decoder_start_token_id=2,
        **SPECIAL_TOKEN_IDS,
    )
    BartForConditionalGeneration(config).save_pretrained(folder)
    build_tokenizer(bos=True).save_pretrained(folder)
    return folder
