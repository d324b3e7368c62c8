"""Config files of training runs: YAML, overrides such as ``train.lr=1e-4``, and validation.

A config is found (`find_config`: a path or a preset that ships with the package), read and merged
over the file that it names under ``extends``, changed by overrides, and validated as a whole. Paths
inside it are relative to the current folder; only ``extends`` is relative to the config file or
names a preset. The classes below are the complete list of keys; docs/train.md explains each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import (
    BaseModel,
    ByteSize,
    ConfigDict,
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    Tag,
    TypeAdapter,
    ValidationError,
    field_serializer,
    field_validator,
    model_validator,
)

from vlduet.config_files import (
    apply_override,
    merge_trees,
    parse_overrides,
    read_yaml_mapping,
)
from vlduet.errors import ConfigError, quote_value, suggest_name
from vlduet.files import write_text_atomically

PRESETS_FOLDER = Path(__file__).parent / "configs"
"""Folder of the config files that ship with the package."""

T = TypeVar("T")


# --------------------------------------------------------------------- keys


class Section(BaseModel):
    """Base class of all config sections: immutable, without unknown keys, NaN or infinity."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


S = TypeVar("S", bound=Section)


class ModelSection(Section):
    """Keys under ``model``: the checkpoint, and how it embeds."""

    path: Path | None = None
    """Hugging Face checkpoint or VLDuet model folder, or its name on a hub (``ORG/NAME``); None for
    recipes that start from nothing."""
    preset: str | None = None
    """Prompts of a published embedding model (`vlduet.model.embedding_presets`) for a checkpoint
    that is not recognised by its name."""
    head: Literal["none", "linear", "mlp"] | None = None
    """Layer after pooling; None: that of the model folder, and ``none`` for a checkpoint."""
    dim: int = Field(default=384, gt=0)
    """Width of the embeddings; without effect if the head is ``none``."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Format of frozen weights; auto: bfloat16 for half-precision models on a GPU, else float32."""
    max_image_tokens: int | None = Field(default=None, gt=0)
    """Most tokens of an image, which is downscaled to them, saved with the model.

    None: that of the model folder; for a checkpoint 1536, but at most 3/4 of a sequence."""
    prompts: dict[str, Any] = {}
    """Fields of `vlduet.model.prompts.Prompts` that differ from the model's own values."""


class EncodersSection(Section):
    """Keys under ``encoders``: frozen encoders that compare slices, folders or names on a hub."""

    vision: Path | None = None
    """Encoder that compares two images."""
    text: Path | None = None
    """Encoder that compares two texts."""
    cross: Path | None = None
    """Dual encoder that compares an image and a text."""


class SourceSection(Section):
    """Keys of ``data.validation``: a set of records, and how it is read."""

    path: Path
    """File or folder in any format that ``vlduet data check`` accepts, or a name on a hub."""
    format: str | None = None
    """Record format, see ``vlduet data formats``; None: detected from the rows."""
    root: Path | None = None
    """Folder that relative image paths start from; None: that of the file."""
    columns: dict[str, str] = {}
    """Column of the source by role, such as ``{caption: text_en}``."""
    strict: bool = False
    """Refuse broken rows, and whatever in the source is not read."""


class TrainSourceSection(SourceSection):
    """Keys of one item of ``data.train``: a set of training records."""

    weight: float = Field(default=1.0, gt=0)
    """Relative share of every batch: weight divided by the sum of all weights."""
    max_records: int | None = Field(default=None, gt=0)
    """Number of records that are trained on: a random subset of the usable ones, which is the same
    for every seed. None: all."""


VALIDATION_TAGS = ("validation source", "validation share")
"""Names of the two forms of ``data.validation``, which are part of the place of pydantic's errors.
"""


def _select_validation_tag(value: object) -> str:
    """Return the tag of a value of ``data.validation``: a share is a float."""
    return VALIDATION_TAGS[isinstance(value, float)]


class DataSection(Section):
    """Keys under ``data``: the records to train on and to validate with."""

    train: list[TrainSourceSection] = Field(min_length=1)
    validation: (
        Annotated[
            Annotated[SourceSection, Tag(VALIDATION_TAGS[0])]
            | Annotated[float, Tag(VALIDATION_TAGS[1])],
            Discriminator(_select_validation_tag),
        ]
        | None
    ) = None
    """Pair records for validation, which are never trained on: a source of their own (a section, or
    its ``path`` alone), or a share of the training records, which a hash of their content selects.
    """
    max_dropped: float = Field(default=0.1, ge=0, le=1)
    """Largest share of a source's records that may be dropped or cut when training starts."""
    max_tokens: int | None = Field(default=None, gt=0)
    """Longest sequence in tokens, saved with the model; longer texts are truncated, images never.

    None: that of the model folder, and 2048 for a checkpoint."""
    cache: Path | Literal[False] | None = None
    """Folder of cached features of frozen encoders; None: ``out/features``; False: memory only."""
    cache_limit: Annotated[ByteSize, Field(ge=0)] = ByteSize(64 * 10**9)
    """Largest size of the features in the folder, such as ``64 GB``, or a number of bytes. Vision
    features that would take more are not stored at all."""

    @field_validator("validation", mode="before")
    @classmethod
    def _parse_validation(cls, value: Any) -> Any:
        """Return a path as a section that has it, and None, a section or a share as it is.

        Raises ValueError for other values.
        """
        if isinstance(value, str | Path):
            return {"path": value}
        is_share = isinstance(value, float) and 0 < value < 1
        if value is None or is_share or isinstance(value, dict | SourceSection):
            return value
        raise ValueError("write a path, a section with path, or a share between 0 and 1")

    @field_serializer("validation", mode="wrap")
    def _dump_validation(self, value: Any, handler: SerializerFunctionWrapHandler) -> Any:
        """Return a source that has nothing but its path as this path, as it is usually written."""
        if isinstance(value, SourceSection) and value == SourceSection(path=value.path):
            return str(value.path)
        return handler(value)


class LoraSection(Section):
    """Keys under ``train.lora``: low-rank adaptation of the language model."""

    rank: int = Field(default=16, gt=0)
    alpha: int = Field(default=16, gt=0)
    targets: Literal["qv", "all"] = "all"
    dropout: float = Field(default=0.0, ge=0, lt=1)


class TrainSection(Section):
    """Keys under ``train``: which weights are trained, how fast, and for how long."""

    steps: int | None = Field(default=None, gt=0)
    """Number of optimizer steps; None: `epochs` decides."""
    epochs: float | None = Field(default=None, gt=0)
    """Number of passes over as many records as are usable; None: `steps` decides."""
    batch_size: int = Field(default=32, gt=1)
    """Number of records per step, summed over all processes."""
    lora: LoraSection | None = LoraSection()
    projector: Literal[False, True, "last"] = False
    """Train the projector between vision tower and language model; last: its last layer only."""
    soft_prompts: bool = False
    """Train the prompts: each of their tokens gets an embedding of its own, initially the same."""
    temperature: float | None = Field(default=None, gt=0)
    """Fixed temperature of the contrastive loss; None: learned, from the model's own or 0.07."""
    lr: float = Field(default=1e-4, gt=0)
    """Learning rate of LoRA; it falls to zero as a cosine after the warm-up."""
    lr_new: float | None = Field(default=None, gt=0)
    """Learning rate of projector, head, soft prompts and temperature; None: same as ``lr``."""
    warmup: float = Field(default=0.03, ge=0, lt=1)
    """Length of the linear warm-up, as a share of all steps."""
    weight_decay: float = Field(default=0.0, ge=0)
    clip: float = Field(default=1.0, gt=0)
    """Largest norm of the gradient; larger ones are scaled down to it."""
    pack: int | None = Field(default=None, gt=0)
    """Number of tokens up to which one row is filled with several sequences; None: one per row."""
    chunk_tokens: int | None = Field(default=None, gt=0)
    """Number of padded tokens that pass through the model at once (GradCache); None: the batch."""
    checkpointing: bool = False
    """Recompute layers in the backward pass, which saves memory and takes up to half more time."""
    fused: bool = True
    """Compute all losses from one forward pass; False runs one pass per loss, for comparisons."""
    log_every: int = Field(default=10, gt=0)
    eval_every: int = Field(default=200, gt=0)
    save_every: int = Field(default=200, gt=0)

    @model_validator(mode="after")
    def _check_length(self) -> Self:
        """Raise ValueError unless exactly one of `steps` and `epochs` is set."""
        if self.steps is None and self.epochs is None:
            raise ValueError("steps is missing: set steps or epochs")
        if self.steps is not None and self.epochs is not None:
            raise ValueError("steps and epochs exclude each other: leave one out")
        return self


class RunConfig(Section):
    """Everything that decides a training run: the top level of a config file."""

    out: Path
    """Folder of the run: config, metrics, checkpoints and the trained model."""
    preset: str | None = None
    """Name of the preset that the config was loaded from or extends, which `load_run_config`
    writes; for reports. It decides nothing."""
    seed: int = 0
    recipe: dict[str, Any]
    """``name`` of the recipe, and the options of that recipe (docs/train.md)."""
    objectives: dict[str, Annotated[float, Field(ge=0)]]
    """Weight of each loss by name. A loss of the recipe that is not listed is not computed."""
    model: ModelSection
    encoders: EncodersSection = EncodersSection()
    data: DataSection
    train: TrainSection


class ComparisonConfig(Section):
    """Several training runs that differ in the listed settings only (``vlduet compare``)."""

    base: Path
    """Config file or preset name that all runs share."""
    out: Path
    """Folder of the comparison: one sub-folder per run, and the table of results."""
    seeds: list[int] = Field(default=[0], min_length=1)
    """Seeds; every run is trained once with each of them."""
    overrides: list[str] = []
    """Overrides of the base that all runs share, such as ``train.steps=100``."""
    runs: dict[str, list[str]] = Field(min_length=1)
    """Name of each run, and the overrides that distinguish it."""
    reference: str | None = None
    """Name of a run whose differences to the others are measured item by item; None: of none."""
    benchmarks: list[str] = []
    """Names of benchmarks that all trained models are measured on."""
    benchmark_data: Path = Path("data")
    """Folder of the official files of benchmarks."""


# --------------------------------------------------------------------- files


def list_presets() -> list[str]:
    """Return the names of all shipped presets, sorted: ``ablations/sugar-alpha-0``, ``vladva``."""
    paths = PRESETS_FOLDER.rglob("*.yaml")
    return sorted(path.relative_to(PRESETS_FOLDER).with_suffix("").as_posix() for path in paths)


def find_config(name: Path | str) -> Path:
    """Return the path of a config file, given as a path or as the name of a preset.

    Args:
        name: Path of an existing file, which has priority, or a name from `list_presets`. The
            forms ``NAME.yaml`` and ``configs/NAME.yaml`` of a preset's name are accepted too.

    Returns:
        `name` itself as a Path if it is a file, else the absolute path of the preset.

    Raises:
        ConfigError: There is neither such a file nor such a preset. The error lists the presets.
    """
    path = Path(name)
    if path.is_file():
        return path
    presets = list_presets()
    preset = path.as_posix().removeprefix("configs/").removesuffix(".yaml")
    if preset in presets:
        return PRESETS_FOLDER / f"{preset}.yaml"
    raise ConfigError(
        "no such file, and no preset of that name",
        place=path,
        fix=f"Name a YAML config file or one of the presets: {', '.join(presets)}",
    )


def load_run_config(path: Path | str, overrides: Iterable[str] = ()) -> RunConfig:
    """Return the validated config of a training run.

    Args:
        path: Config file or preset name, see `find_config`. Keys of the file that it names under
            ``extends`` are the defaults.
        overrides: ``a.b=c`` texts, applied in order; the values are YAML.

    Raises:
        ConfigError: No such file, broken YAML, or an invalid key or value, named with its file.
    """
    path = find_config(path)
    tree = _read_tree(path, overrides)
    tree["preset"] = _find_preset_name(path) or tree.get("preset")
    return validate_run_config(tree, place=str(path))


def load_comparison_config(path: Path | str, overrides: Iterable[str] = ()) -> ComparisonConfig:
    """Return the validated config of a comparison; its runs' own settings are not checked yet.

    The arguments and the errors are those of `load_run_config`.
    """
    path = find_config(path)
    return _validate(ComparisonConfig, _read_tree(path, overrides), place=str(path))


def save_run_config(config: RunConfig, path: Path, *, comment: str = "") -> None:
    """Write a config as YAML with every default value spelled out; replaces a file atomically.

    `comment`, one line, precedes it.
    """
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    write_text_atomically(path, f"# {comment}\n{text}" if comment else text)


def _read_tree(path: Path, overrides: Iterable[str]) -> dict[str, Any]:
    """Return a YAML file as nested dicts, merged over its ``extends`` file, with overrides applied.

    The key ``extends`` is looked up beside `path`, then by `find_config`, and is removed.

    Raises ConfigError as `read_yaml_mapping` does for either file, if the extended file is missing
    or extends another one itself, and as `apply_override` does.
    """
    tree = read_yaml_mapping(path)
    base_name = tree.pop("extends", None)
    if base_name is not None:
        base = read_yaml_mapping(_find_base(path, str(base_name)))
        if "extends" in base:
            raise ConfigError(
                f"extends {base_name}, which itself extends another file",
                place=path,
                fix="Extend the last file of the chain, and copy the keys in between",
            )
        _remove_replaced_lengths(base, tree)
        tree = merge_trees(base, tree)
    for override in overrides:
        apply_override(tree, override)
        _remove_replaced_lengths(tree, parse_overrides([override], place="override"))
    return tree


def _find_base(path: Path, name: str) -> Path:
    """Return the path of the file that a config extends by name: beside it, or by `find_config`."""
    sibling = path.parent / name
    return sibling if sibling.is_file() else find_config(name)


def _find_preset_name(path: Path) -> str | None:
    """Return the name of the preset that a config file is, or else the one that it extends, if any.

    Raises ConfigError as `read_yaml_mapping` and `find_config` do.
    """
    if not path.resolve().is_relative_to(PRESETS_FOLDER.resolve()):
        base_name = read_yaml_mapping(path).get("extends")
        if base_name is None:
            return None
        path = _find_base(path, str(base_name))
    preset = path.resolve()
    if not preset.is_relative_to(PRESETS_FOLDER.resolve()):
        return None
    return preset.relative_to(PRESETS_FOLDER.resolve()).with_suffix("").as_posix()


def _remove_replaced_lengths(tree: dict[str, Any], changes: dict[str, Any]) -> None:
    """Remove from `tree`, in place, that of ``train.steps`` and ``train.epochs`` which is replaced.

    A run has one of them. If `changes` set one and not the other, the other is replaced.
    """
    settings, changed = tree.get("train"), changes.get("train")
    if isinstance(settings, dict) and isinstance(changed, dict):
        for key, replaced_key in (("steps", "epochs"), ("epochs", "steps")):
            if changed.get(key) is not None and changed.get(replaced_key) is None:
                settings.pop(replaced_key, None)


# --------------------------------------------------------------------- validation


def validate_run_config(tree: dict[str, Any], *, place: str) -> RunConfig:
    """Return nested dicts as a RunConfig.

    Args:
        tree: Keys and plain values, as YAML gives them.
        place: Where they come from, for error messages.

    Raises:
        ConfigError: The first invalid key or value; a misspelt key is reported before others.
    """
    return _validate(RunConfig, tree, place=place)


def _validate(section: type[S], tree: dict[str, Any], *, place: str) -> S:
    """Return `tree` as an instance of `section`.

    Raises:
        ConfigError: The first unknown key, with a suggestion; without one, pydantic's first error.
            `place` precedes the dotted key in the message.
    """
    try:
        return section.model_validate(tree)
    except ValidationError as error:
        # A misspelt key comes first, because it is often the reason why another one is missing.
        first = min(error.errors(), key=lambda details: details["type"] != "extra_forbidden")
        location = tuple(part for part in first["loc"] if part not in VALIDATION_TAGS)
        key = ".".join(str(part) for part in location)
        if first["type"] == "extra_forbidden":
            fix = suggest_name(str(location[-1]), _list_keys_at(section, location[:-1]))
            raise ConfigError(f"unknown key {quote_value(key)}", place=place, fix=fix) from None
        reason = first["msg"].lower().removeprefix("value error, ")
        if first["type"] == "path_type":
            reason = "input should be a path: write it in quotes"
        problem = f"{key} = {quote_value(first['input'])}: {reason}"
        if first["type"] == "missing":
            problem = f"{key} is missing"
        elif isinstance(first["input"], dict):  # keys of a section that do not fit together
            problem = f"{key}: {reason}"
        raise ConfigError(problem, place=place, fix="See docs/train.md") from None


def _list_keys_at(section: type[Section], location: tuple[Any, ...]) -> list[str]:
    """Return the keys, in declared order, of the sub-section at `location`, starting at `section`.

    `location` is a path of keys and list indices, as in pydantic's errors; () is `section` itself.
    """
    for name in location:
        if isinstance(name, int):  # an index of a list, whose items all have the same class
            continue
        child = _section_class(section.model_fields[name].annotation)
        assert child is not None, "pydantic looks for keys in sections only"
        section = child
    return list(section.model_fields)


def _section_class(annotation: Any) -> type[Section] | None:
    """Return the Section class in a field's annotation, such as ``LoraSection | None``, or None."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    classes = map(_section_class, getattr(annotation, "__args__", ()))
    return next((c for c in classes if c is not None), None)


def parse_options(options_class: type[T], values: Mapping[str, Any], *, place: str) -> T:
    """Return option values as an instance of a dataclass, such as a recipe's options.

    Args:
        options_class: Dataclass whose fields are the valid options.
        values: Option names and their values. Pydantic converts them to the field's type: ``"5"``
            becomes 5.
        place: Prefix of the option's name in error messages, such as ``recipe``.

    Raises:
        ConfigError: An unknown name (reported before the others), a missing option that has no
            default, or a value of the wrong type.
    """
    names = [field.name for field in dataclasses.fields(options_class)]  # type: ignore[arg-type]
    for name in values:
        if name not in names:
            raise ConfigError(
                f"unknown key '{name}'", place=f"{place}.{name}", fix=suggest_name(name, names)
            )
    try:
        return TypeAdapter(options_class).validate_python(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(
            f"{quote_value(first['input'])}: {first['msg'].lower()}",
            place=".".join(str(part) for part in (place, *first["loc"])),
            fix="See docs/train.md",
        ) from None
