"""The door to PEFT: LoRA on the language model, saved in PEFT's own layout so that any PEFT user can load it."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from vlduet.errors import ConfigError, ModelError
from vlduet.model.backbone import Backbone
from vlduet.model.processing import silence_transformers

LORA_TARGET_PATTERNS = {
    "qv": "q_proj|v_proj",
    "all": "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|gate_up_proj|down_proj",
}
"""Which linear layers of the language model get LoRA: `qv` is Sugar's choice, `all` VladVA's. GLM has gate and up in one."""


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """Low-rank adaptation of the trunk; the vision tower is never touched."""

    rank: int = 16
    alpha: int = 16
    targets: str = "all"
    """qv or all."""
    dropout: float = 0.0


def enable_lora(backbone: Backbone, lora: LoraSettings, there: PeftModel | None) -> PeftModel:
    """The PEFT view of a model with its LoRA layers opened: those that are `there`, or new ones.

    Raises:
        ConfigError: what is there is not what is asked for, or see `_add_lora`.
    """
    if there is not None:
        _check_lora(there, lora, backbone)
    peft = there or _add_lora(backbone, lora)
    for name, parameter in backbone.model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return peft


def _add_lora(backbone: Backbone, lora: LoraSettings) -> PeftModel:
    """Inject LoRA layers in place and return the PEFT view of the model.

    The base's weights stay frozen; B starts at zero, so the model's function is unchanged.

    Raises:
        ConfigError: unknown targets, or the checkpoint has none of them.
    """
    if lora.targets not in LORA_TARGET_PATTERNS:
        raise ConfigError(
            f"'{lora.targets}'",
            place="train.lora.targets",
            fix=f"Use one of {', '.join(LORA_TARGET_PATTERNS)}",
        )
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=_pattern(lora.targets, backbone.family.language_model_path),
    )
    try:
        with silence_transformers():
            peft = get_peft_model(backbone.model, config)
    except ValueError as error:
        raise ConfigError(
            str(error).split(".")[0], place="train.lora.targets", fix="The trunk has no such layers"
        ) from None
    backbone.train(
        backbone.training
    )  # the new layers, with their dropout, in the mode of all others
    return peft


def _pattern(targets: str, trunk: str) -> str:
    return rf".*{trunk}\..*\.({LORA_TARGET_PATTERNS[targets]})"


def _check_lora(peft: PeftModel, lora: LoraSettings, backbone: Backbone) -> None:
    """The adapter that a model brings is the one that is asked for. Raises ConfigError."""
    has, pattern = (
        peft.peft_config["default"],
        partial(_pattern, trunk=backbone.family.language_model_path),
    )
    names = [name for name, _ in backbone.model.named_modules()]
    # By the layers, not by the words that named them: an adapter may have been made when fewer were known.
    found = {
        kind: {name for name in names if re.fullmatch(pattern(kind), name)}
        for kind in LORA_TARGET_PATTERNS
    }
    tuner: Any = peft.base_model
    carrying = set(tuner.targeted_module_names)
    targets = next((kind for kind, layers in found.items() if layers == carrying), "others")
    there = LoraSettings(
        rank=has.r, alpha=has.lora_alpha, targets=targets, dropout=has.lora_dropout
    )
    for field in fields(LoraSettings):
        wanted, brought = getattr(lora, field.name), getattr(there, field.name)
        if wanted != brought:
            raise ConfigError(
                f"{wanted!r}, but the model brings an adapter with {brought!r}",
                place=f"train.lora.{field.name}",
                fix=f"Set it to {brought}, or merge the model first",
            )


def load_lora(backbone: Backbone, folder: Path, *, trainable: bool = False) -> PeftModel:
    """Attach a saved adapter. Raises ModelError where it is not there or not of this base."""
    if not (folder / "adapter_model.safetensors").is_file():
        raise ModelError(
            "no adapter_model.safetensors here", place=folder, fix="Name a folder in PEFT layout"
        )
    try:
        with silence_transformers():
            return PeftModel.from_pretrained(backbone.model, str(folder), is_trainable=trainable)
    except (RuntimeError, ValueError) as error:
        raise ModelError(
            str(error).splitlines()[0], place=folder, fix="The adapter belongs to another base"
        ) from None


def save_lora(peft: PeftModel, folder: Path) -> None:
    """Write adapter_config.json and adapter_model.safetensors."""
    for config in peft.peft_config.values():
        # PEFT would write this machine's absolute path.
        config.base_model_name_or_path = Path(config.base_model_name_or_path or "").name
    peft.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's model card template says nothing


def merge_lora(peft: PeftModel) -> nn.Module:
    """Fold the adapter into the weights, in place; the result is a plain checkpoint."""
    merged: nn.Module = peft.merge_and_unload()
    return merged
