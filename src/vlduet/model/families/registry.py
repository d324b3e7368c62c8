"""Mapping from the `model_type` of a transformers config to its `Family` class."""

from __future__ import annotations

from pathlib import Path

from vlduet.model.families.family import Family
from vlduet.model.families.gemma import Gemma3, Gemma4
from vlduet.model.families.idefics import Idefics3
from vlduet.model.families.internvl import InternVL
from vlduet.model.families.llava import FastVLM, Llava, LlavaNext, LlavaOneVision
from vlduet.model.families.mistral import Mistral3
from vlduet.model.families.qwen import GlmVL, QwenVL
from vlduet.model.folder_checks import describe_unknown_type

FAMILIES: dict[str, type[Family]] = {
    "llava": Llava,
    "llava_next": LlavaNext,
    "llava_onevision": LlavaOneVision,
    "fast_vlm": FastVLM,
    "gemma3": Gemma3,
    "gemma4": Gemma4,
    "glm4v": GlmVL,
    "glm46v": GlmVL,
    "qwen2_vl": QwenVL,
    "qwen2_5_vl": QwenVL,
    "qwen3_vl": QwenVL,
    "qwen3_vl_moe": QwenVL,
    "internvl": InternVL,
    "idefics3": Idefics3,
    "mistral3": Mistral3,
    "smolvlm": Idefics3,
}
"""Family class of each supported `model_type`."""


def find_family(model_type: str, folder: Path) -> type[Family]:
    """Return the family class of a `model_type`.

    Args:
        folder: the checkpoint folder, named in the error message.

    Raises:
        ModelError: the `model_type` is not supported; the message says what to use instead.
    """
    if model_type not in FAMILIES:
        raise describe_unknown_type(str(model_type), folder, supported=FAMILIES)
    return FAMILIES[model_type]
