"""Match an evaluated model to the row of a paper's table that has the settings of its training.

A row names presets. A run belongs to it if it has the same recipe, the same losses and the same
parts of the method as one of them. Base model, data, length and learning rates may differ;
`Training.describe` and `list_other_settings` say how.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Self

from vlduet.config import PRESETS_FOLDER, RunConfig, load_run_config, validate_run_config
from vlduet.errors import ConfigError, quote_value
from vlduet.structured_files import check_fields

METHOD_SETTINGS: dict[str, dict[str, Any]] = {
    "sugar": {
        "recipe.calibrate": False,
        "recipe.loss": "mse",
        "recipe.pool": "mean",
        "recipe.same_sequence": "all",
        "recipe.single": "cosine",
        "recipe.target": "gak",
        "recipe.triple": True,
    },
    "vladva": {
        "recipe.contrastive_on": "short",
        "recipe.guide": "none",
        "recipe.language_on": "long",
        "train.soft_prompts": False,
    },
}
"""Recipe -> settings that make it another row of the paper's tables, with their default values."""

COMPARED_SETTINGS = (
    "recipe.",
    "objectives.",
    "model.head",
    "model.max_image_tokens",
    "data.max_tokens",
    "train.batch_size",
    "train.lora.",
    "train.projector",
    "train.temperature",
    "train.lr",
    "train.warmup",
    "train.weight_decay",
    "train.clip",
)
"""Names, and starts of names, of the settings that `list_other_settings` compares."""


@dataclass(frozen=True, slots=True)
class Training:
    """How an evaluated model was trained."""

    config: RunConfig
    """Settings of the run; `out` says nothing."""
    options: dict[str, Any]
    """All options of the recipe, with their defaults; empty for models of earlier versions."""
    steps: int
    """Number of optimizer steps."""
    records: list[int]
    """Number of training records of every source."""

    @classmethod
    def from_json(cls, values: Mapping[str, Any], *, place: Path) -> Self:
        """Return what `vlduet.harness.builtin.read_training` wrote into a file.

        Raises:
            ConfigError: a key is missing, of another type or invalid; it names `place`.
        """
        types = {"config": dict, "options": dict, "steps": int, "records": list}
        check_fields(values, types, place=place, error_class=ConfigError, fix="Evaluate again")
        if not all(isinstance(count, int) for count in values["records"]):
            message = f"records are {quote_value(values['records'])}"
            raise ConfigError(message, place=place, fix="Evaluate again")
        config = validate_run_config({**values["config"], "out": "."}, place=str(place))
        return cls(config, values["options"], values["steps"], values["records"])

    def describe(self) -> str:
        """Return base model, data and length in words, without a full stop.

        For example ``models/nano trained on 500 records of a.jsonl for 60 steps in batches of 32``.
        """
        records = _format_count(sum(self.records), "record")
        sources = ", ".join(_list_sources(self.config))
        length = (
            f"{_format_count(self.steps, 'step')} in batches of {self.config.train.batch_size:,}"
        )
        return f"{self.config.model.path} trained on {records} of {sources} for {length}"


def find_row(training: Training, rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """Return the row of a table that a training run belongs to, or None.

    Several rows may have the same method, and differ in data or base model. Then one with the run's
    data is preferred, then one with its preset, then the first one. Rows without the key
    ``presets`` are left out.
    """
    method = _describe_method(training.config)
    if method is None:
        return None
    candidates: list[tuple[bool, bool, Mapping[str, Any]]] = []
    for row in rows:
        for preset in row.get("presets", ()):
            config = _load_preset(preset)
            if _describe_method(config) == method:
                has_data = _list_sources(config) == _list_sources(training.config)
                candidates.append((has_data, preset == training.config.preset, row))
    if not candidates:
        return None
    return max(candidates, key=lambda candidate: candidate[:2])[2]  # the first of equal ones


@cache
def _load_preset(name: str) -> RunConfig:
    """Return a shipped preset, whatever files of that name the current folder holds."""
    return load_run_config(PRESETS_FOLDER / f"{name}.yaml")


def _describe_method(config: RunConfig) -> dict[str, Any] | None:
    """Return what a row of a paper's table stands for, by name; None for another recipe.

    It is the recipe, its losses with a weight, whether there is LoRA, and METHOD_SETTINGS.
    """
    recipe = config.recipe["name"]
    if recipe not in METHOD_SETTINGS:
        return None
    losses = sorted(name for name, weight in config.objectives.items() if weight)
    settings = _flatten(config.model_dump(mode="json"))
    method = {key: settings.get(key, value) for key, value in METHOD_SETTINGS[recipe].items()}
    return method | {"recipe": recipe, "losses": losses, "LoRA": config.train.lora is not None}


def _list_sources(config: RunConfig) -> list[str]:
    """Return the paths of the training data."""
    return [str(source.path) for source in config.data.train]


def list_other_settings(training: Training, preset: str) -> list[str]:
    """Return ``name value (value in the preset)`` of the settings that differ from a preset's.

    Left out are METHOD_SETTINGS of the recipe, weights where one of both is 0, and what only one of
    both can have, such as the rank where there is no LoRA. Options of the recipe that the preset
    does not set are left out, too, unless the run's config sets them. A value that is not set is
    left to the model.
    """
    settings = _flatten(training.config.model_dump(mode="json"))
    preset_settings = _flatten(_load_preset(preset).model_dump(mode="json"))
    names = settings.keys() & preset_settings.keys()
    names |= {name for name in settings if name.startswith("recipe.")}
    for option, value in training.options.items():
        if f"recipe.{option}" in preset_settings:
            settings[f"recipe.{option}"] = value
            names.add(f"recipe.{option}")
    differences = []
    for name in sorted(names - METHOD_SETTINGS[training.config.recipe["name"]].keys()):
        value, preset_value = settings[name], preset_settings.get(name)
        is_switched_off = name.startswith("objectives.") and 0 in (value, preset_value)
        if name.startswith(COMPARED_SETTINGS) and value != preset_value and not is_switched_off:
            differences.append(f"{name} {_format_value(value)} ({_format_value(preset_value)})")
    return differences


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested mappings by their dotted names."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            leaves |= _flatten(value, f"{prefix}{key}.")
        else:
            leaves[prefix + key] = value
    return leaves


def _format_count(count: int, noun: str) -> str:
    """Return a number with its noun: ``1 step``, ``2,000 steps``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _format_value(value: Any) -> str:
    """Return a value as a config writes it; None as ``not set``."""
    if value is None:
        return "not set"
    return str(value).lower() if isinstance(value, bool) else str(value)
