"""LoRA adapters by PEFT, saved in its own layout so that any PEFT user can load them.

PEFT is imported by the functions that need it: most commands open a model without an adapter.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn import functional as F

from vlduet.errors import ConfigError, ModelError
from vlduet.library_errors import COPY_AGAIN, is_lack_of_memory, translate_library_errors
from vlduet.model.backbone import Backbone
from vlduet.model.folder_checks import read_adapter_config
from vlduet.model.machine_memory import measure_memory
from vlduet.model.processing import silence_transformers
from vlduet.structured_files import read_safetensors_header

if TYPE_CHECKING:
    from peft import PeftModel

LORA_TARGET_PATTERNS = {
    "qv": "q_proj|v_proj",
    "all": "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|gate_up_proj|down_proj",
}
"""Linear layers of the language model that get LoRA: `qv` as in Sugar, `all` as in VladVA.

`gate_up_proj` is GLM's fusion of the gate and the up projection."""


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """Low-rank adaptation of the language model; the vision tower never gets any."""

    rank: int = 16
    """Rank r of the two factors of a layer's update."""
    alpha: int = 16
    """Numerator of the update's scale alpha / rank."""
    targets: str = "all"
    """Adapted layers, a key of LORA_TARGET_PATTERNS."""
    dropout: float = 0.0
    """Dropout probability of the adapter's inputs during training."""


class MixedPrecisionLinear(nn.Linear):
    """Linear layer that multiplies in the dtype of its input, whatever that of its parameters.

    The gradients are added to the parameters in their own dtype: a float32 factor of LoRA in a
    bfloat16 model is trained in float32 and costs a product in bfloat16.
    """

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> MixedPrecisionLinear:
        """Return a layer with the parameters of another, which are shared and not copied."""
        layer = cls(linear.in_features, linear.out_features, device="meta")
        layer.weight, layer.bias = linear.weight, linear.bias
        return layer.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        """Return float[..., out_features] in the dtype of the input, float[..., in_features]."""
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return F.linear(input, self.weight.to(input.dtype), bias)


def _multiply_in_input_dtype(peft_model: PeftModel) -> None:
    """Let the LoRA layers of a model multiply in the dtype of their inputs, in place.

    PEFT casts the input of every layer to the float32 of its factors, and autograd keeps that copy:
    as much memory as all other activations of a layer in bfloat16. The factors stay the same
    parameters under the same names.
    """
    from peft.tuners.lora import Linear as LoraLinear

    for layer in peft_model.modules():
        if isinstance(layer, LoraLinear):
            layer.cast_input_dtype_enabled = False
            for factors in (layer.lora_A, layer.lora_B):
                for name, factor in factors.items():
                    assert isinstance(factor, nn.Linear)
                    factors[name] = MixedPrecisionLinear.from_linear(factor)


def enable_lora(backbone: Backbone, lora: LoraSettings, existing: PeftModel | None) -> PeftModel:
    """Make the LoRA matrices of a model trainable and freeze all its other parameters, in place.

    Args:
        backbone: its model gets LoRA layers in place if it has none. They are initialised by
            torch's global generator and change no output before they are trained.
        lora: the requested adapter.
        existing: PEFT's wrapper where the model has an adapter already, which is then trained
            further.

    Returns:
        PEFT's wrapper of the model.

    Raises:
        ConfigError: the existing adapter has other settings, `lora.targets` is unknown, or the
            model has none of its layers.
    """
    if existing is None:
        peft_model = _add_lora(backbone, lora)
    else:
        _check_settings(existing, lora, backbone)
        peft_model = existing
    for name, parameter in backbone.model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return peft_model


def _add_lora(backbone: Backbone, lora: LoraSettings) -> PeftModel:
    """Insert new LoRA layers into the backbone's model in place and return PEFT's wrapper.

    They are random (torch's global generator) and in the mode, train or eval, of the backbone.

    Raises:
        ConfigError: `lora.targets` is unknown, the language model has no such layers, or there is
            too little memory for `lora.rank`.
    """
    from peft import LoraConfig, get_peft_model

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
        target_modules=_module_pattern(lora.targets, backbone),
    )
    _require_memory(backbone, lora)
    try:
        with silence_transformers():
            peft_model = get_peft_model(backbone.model, config)
    except ValueError as error:
        raise ConfigError(
            str(error).split(".")[0],
            place="train.lora.targets",
            fix="The language model has no such layers",
        ) from None
    except (RuntimeError, MemoryError) as error:
        if not is_lack_of_memory(error):
            raise
        message = f"too little memory for rank {lora.rank}"
        raise ConfigError(message, place="train.lora.rank", fix="Use a smaller rank") from error
    _multiply_in_input_dtype(peft_model)
    # The new layers, with their dropout, must be in the same mode as all others.
    backbone.train(backbone.training)
    return peft_model


def _require_memory(backbone: Backbone, lora: LoraSettings) -> None:
    """Raise ConfigError if the factors of an adapter and their gradients exceed all memory.

    They are many tensors, each of which the system grants: it ends the process when they are
    filled.
    """
    pattern = re.compile(_module_pattern(lora.targets, backbone))
    num_values = sum(
        lora.rank * (module.in_features + module.out_features)
        for name, module in backbone.model.named_modules()
        if isinstance(module, nn.Linear) and pattern.fullmatch(name)
    )
    required, available = 2 * 4 * num_values, measure_memory(backbone.device)
    if required > available:
        sizes = f"{required / 2**30:,.0f} GiB of {available / 2**30:,.0f}"
        message = f"too little memory for rank {lora.rank}: {sizes}"
        raise ConfigError(message, place="train.lora.rank", fix="Use a smaller rank")


def _module_pattern(targets: str, backbone: Backbone) -> str:
    """Return the regular expression of the adapted modules' full names."""
    language_model = backbone.family.language_model_path
    return rf".*{language_model}\..*\.({LORA_TARGET_PATTERNS[targets]})"


def _check_settings(peft_model: PeftModel, lora: LoraSettings, backbone: Backbone) -> None:
    """Raise ConfigError for the first of LoraSettings that differs from a model's adapter.

    The adapter's `targets` are the key of LORA_TARGET_PATTERNS that selects exactly its layers in
    `backbone`; if there is none, they differ from any request. Nothing is modified.
    """
    config = peft_model.peft_config["default"]
    tuner: Any = peft_model.base_model
    adapted = set(tuner.targeted_module_names)
    module_names = [name for name, _ in backbone.model.named_modules()]
    # Targets are compared by the layers that they select, not by the saved pattern: older versions
    # wrote patterns that listed fewer layer names.
    targets = "others"
    for kind in LORA_TARGET_PATTERNS:
        pattern = re.compile(_module_pattern(kind, backbone))
        if adapted == {name for name in module_names if pattern.fullmatch(name)}:
            targets = kind
            break
    existing = LoraSettings(
        rank=config.r, alpha=config.lora_alpha, targets=targets, dropout=config.lora_dropout
    )
    for field in fields(LoraSettings):
        requested_value = getattr(lora, field.name)
        existing_value = getattr(existing, field.name)
        if requested_value != existing_value:
            raise ConfigError(
                f"{requested_value!r}, but the model brings an adapter with {existing_value!r}",
                place=f"train.lora.{field.name}",
                fix=f"Set it to {existing_value}, or merge the model first",
            )


def load_lora(backbone: Backbone, folder: Path) -> PeftModel:
    """Attach a saved adapter to a model, frozen, and return PEFT's wrapper.

    The LoRA layers are inserted into `backbone.model` in place, which is then in evaluation mode.

    Raises:
        ModelError: the folder has no adapter, or it is broken or belongs to another base.
    """
    from peft import PeftModel

    if not (folder / "adapter_model.safetensors").is_file():
        raise ModelError(
            "no adapter_model.safetensors here", place=folder, fix="Name a folder in PEFT layout"
        )
    config_path = folder / "adapter_config.json"
    config = read_adapter_config(config_path)
    path = folder / "adapter_model.safetensors"
    _, tensors = read_safetensors_header(path, error_class=ModelError, fix=COPY_AGAIN)
    axes = [axis for tensor in tensors.values() for axis in tensor["shape"]]
    patterns = config.get("rank_pattern") or {}
    rank = max([config["r"], *(value for value in patterns.values() if isinstance(value, int))])
    if rank > max(axes, default=0):  # before factors of this size are made
        message = f"the rank is {rank}, which the adapter's weights do not have"
        raise ModelError(message, place=config_path, fix=COPY_AGAIN)
    fix = "Copy the whole folder again, or name the base that the adapter was trained on"
    with translate_library_errors(folder, subject="adapter", fix=fix), silence_transformers():
        peft_model = PeftModel.from_pretrained(backbone.model, str(folder), is_trainable=False)
    _multiply_in_input_dtype(peft_model)
    return peft_model


def save_lora(peft_model: PeftModel, folder: Path) -> None:
    """Write adapter_config.json and adapter_model.safetensors into a folder, which is created.

    In both the file and the adapter in memory, the path of the base model is reduced to its last
    component. PEFT's README.md is deleted from the folder.
    """
    for config in peft_model.peft_config.values():
        # PEFT would write an absolute path of this machine.
        config.base_model_name_or_path = Path(config.base_model_name_or_path or "").name
    peft_model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # an empty template of a model card


def merge_lora(peft_model: PeftModel) -> None:
    """Add the adapter to the base's weights in place and remove its layers."""
    peft_model.merge_and_unload()
