"""From a `model_type` to its `Family`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from vlduet.errors import ModelError, suggest_name
from vlduet.model.families.family import Family
from vlduet.model.families.gemma import gemma3, gemma4
from vlduet.model.families.idefics import idefics3
from vlduet.model.families.internvl import internvl
from vlduet.model.families.llava import fast_vlm, llava, llava_next, llava_onevision
from vlduet.model.families.mistral import mistral3
from vlduet.model.families.qwen import glm_vl, qwen_vl

FAMILIES: dict[str, Callable[[], Family]] = {
    "llava": llava,
    "llava_next": llava_next,
    "llava_onevision": llava_onevision,
    "fast_vlm": fast_vlm,
    "gemma3": gemma3,
    "gemma4": gemma4,
    "glm4v": glm_vl,
    "glm46v": glm_vl,
    "qwen2_vl": qwen_vl,
    "qwen2_5_vl": qwen_vl,
    "qwen3_vl": qwen_vl,
    "qwen3_vl_moe": qwen_vl,
    "internvl": internvl,
    "idefics3": idefics3,
    "mistral3": mistral3,
    "smolvlm": idefics3,
}
"""model_type -> function that makes its `Family`."""


def find_family(model_type: str, folder: Path) -> Family:
    """The family of a `model_type`. Raises ModelError that lists the known ones."""
    if model_type not in FAMILIES:
        raise ModelError(
            f"no backbone for model_type '{model_type}'",
            place=folder / "config.json",
            fix=suggest_name(model_type, FAMILIES),
        )
    return FAMILIES[model_type]()
