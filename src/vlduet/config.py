"""The config tree of a run: YAML plus `a.b=c` overrides, checked as a whole; an unknown key names the closest one."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from vlduet.errors import ConfigError, suggest_name

T = TypeVar("T")


class Section(BaseModel):
    """A part of the tree."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


S = TypeVar("S", bound=Section)


class ModelSection(Section):
    """Which checkpoint, and how it embeds."""

    path: Path | None = None
    """A Hugging Face checkpoint or a model folder of VLDuet; recipes that start from nothing need none."""
    head: Literal["none", "linear", "mlp"] | None = None
    """Between pooled hidden state and embedding; default: the model folder's own, `none` for a plain checkpoint."""
    dim: int = Field(default=384, gt=0)
    """Width of the embeddings, unless head is none."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the frozen weights. auto: float32 on a CPU; on a GPU, bfloat16 for a checkpoint saved in half precision."""
    prompts: dict[str, Any] = {}
    """Fields of `vlduet.model.prompts.Prompts` that differ from the model's own."""


class EncodersSection(Section):
    """Frozen encoders that a recipe asks how alike slices are: local folders."""

    vision: Path | None = None
    """Compares two images."""
    text: Path | None = None
    """Compares two texts."""
    cross: Path | None = None
    """Compares an image and a text."""


class SourceSection(Section):
    """One set of training records."""

    path: Path
    """Anything that `vlduet data check` accepts."""
    weight: float = Field(default=1.0, gt=0)
    """Its share of every batch is weight / sum of weights."""


class DataSection(Section):
    """What is trained and validated on."""

    train: list[SourceSection] = Field(min_length=1)
    validation: Path | None = None
    """Pair records that are never trained on."""
    max_tokens: int = Field(default=2048, gt=0)
    """Longest sequence; texts are cut to fit, images never."""
    cache: Path | Literal[False] | None = None
    """Folder of what frozen encoders see; default: `features` inside the run. False keeps a little of it in memory."""


class LoraSection(Section):
    """Low-rank adaptation of the language model."""

    rank: int = Field(default=16, gt=0)
    alpha: int = Field(default=16, gt=0)
    targets: Literal["qv", "all"] = "all"
    dropout: float = Field(default=0.0, ge=0, lt=1)


class TrainSection(Section):
    """What moves, how fast, and how long."""

    steps: int = Field(gt=0)
    batch_size: int = Field(default=32, gt=1)
    """Records of one step, over all processes."""
    lora: LoraSection | None = LoraSection()
    projector: Literal[False, True, "last"] = False
    """Train the projector between vision tower and language model too; `last`: its last linear layer alone."""
    soft_prompts: bool = False
    """Learn the prompts: every token of theirs becomes one that is trained, and starts as it is."""
    temperature: float | None = Field(default=None, gt=0)
    """Of the contrastive loss, fixed; default: learned, from the model's own (.07 in a plain checkpoint)."""
    lr: float = Field(default=1e-4, gt=0)
    """Of LoRA; cosine to zero after the warm-up."""
    lr_new: float | None = Field(default=None, gt=0)
    """Of projector, head, soft prompts and temperature; default: lr."""
    warmup: float = Field(default=0.03, ge=0, lt=1)
    """Share of the steps."""
    weight_decay: float = Field(default=0.0, ge=0)
    clip: float = Field(default=1.0, gt=0)
    """Largest gradient norm."""
    pack: int | None = Field(default=None, gt=0)
    """Fill rows up to this many tokens with several sequences; default: one a row."""
    chunk_tokens: int | None = Field(default=None, gt=0)
    """Padded tokens that live at one time: the batch goes through the model in chunks (GradCache); default: all at once."""
    checkpointing: bool = False
    """Compute every layer of the language model again in the backward pass: less memory, up to half more time."""
    fused: bool = True
    """One pass of a sequence for all losses. False: one for each, as most joint trainers do; for comparisons."""
    log_every: int = Field(default=10, gt=0)
    eval_every: int = Field(default=200, gt=0)
    save_every: int = Field(default=200, gt=0)


class RunConfig(Section):
    """Everything that decides a training run."""

    out: Path
    """Folder of the run: config, metrics, checkpoints and the trained model."""
    seed: int = 0
    recipe: dict[str, Any]
    """`name`, and the options of that recipe (docs/train.md)."""
    objectives: dict[str, Annotated[float, Field(ge=0)]]
    """Weight of every loss by name; a recipe's loss that is left out is not computed."""
    model: ModelSection
    encoders: EncodersSection = EncodersSection()
    data: DataSection
    train: TrainSection


class ComparisonConfig(Section):
    """Several runs that differ in what is said here and in nothing else."""

    base: Path
    """The config that all runs share."""
    out: Path
    """Folder of the comparison: the runs, and the table."""
    seeds: list[int] = Field(default=[0], min_length=1)
    """Every run is made once with each."""
    overrides: list[str] = []
    """Settings of all runs that differ from the base, as `train.steps=100`."""
    runs: dict[str, list[str]] = Field(min_length=1)
    """Name -> the settings that make it what it is."""


def load_run_config(path: Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a config file, laid over the one that it `extends`; paths in it are relative to where the command runs.

    Raises:
        ConfigError: naming file and key, with the closest known key for an unknown one.
    """
    return validate_run_config(_read(path, overrides), place=str(path))


def load_comparison_config(path: Path, overrides: Iterable[str] = ()) -> ComparisonConfig:
    """Read the config of a comparison. Raises ConfigError as `load` does; the runs' settings are not yet checked."""
    return _checked(ComparisonConfig, _read(path, overrides), place=str(path))


def _read(path: Path, overrides: Iterable[str]) -> dict[str, Any]:
    """The tree of a YAML file, laid over the one that it `extends`, with its overrides. Raises ConfigError."""
    tree = _read_mapping(path)
    if (base := tree.pop("extends", None)) is not None:
        below = _read_mapping(path.parent / str(base))
        if "extends" in below:
            raise ConfigError(
                f"extends {base}, which extends another", place=path, fix="Extend the last one"
            )
        tree = _over(below, tree)
    for override in overrides:
        _override(tree, override)
    return tree


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(
            "no such file", place=path, fix="Name a YAML config, see configs/"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"cannot be read as text ({error})", place=path, fix="Name a YAML config"
        ) from None
    tree = _parse(text, place=str(path))
    if not isinstance(tree, dict):
        raise ConfigError("not a mapping of keys", place=path, fix="See configs/ for examples")
    return tree


def _over(below: Any, above: Any) -> Any:
    """`above` laid over `below`: sections key by key, anything else whole."""
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    return below | {
        key: _over(below[key], value) if key in below else value for key, value in above.items()
    }


def validate_run_config(tree: dict[str, Any], *, place: str) -> RunConfig:
    """A tree of plain values -> RunConfig. Raises ConfigError for the first thing that is wrong."""
    return _checked(RunConfig, tree, place=place)


def _checked(kind: type[S], tree: dict[str, Any], *, place: str) -> S:
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        # What is misspelt before what is missing: the one is often the other.
        first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
        key = ".".join(str(x) for x in first["loc"])
        if first["type"] == "extra_forbidden":
            known = _fields_at(kind, first["loc"][:-1])
            raise ConfigError(
                f"unknown key '{key}'", place=place, fix=suggest_name(str(first["loc"][-1]), known)
            ) from None
        said = (
            "input should be a path: write it in quotes"
            if first["type"] == "path_type"
            else first["msg"].lower()
        )
        what = "is missing" if first["type"] == "missing" else f"= {first['input']!r}: {said}"
        raise ConfigError(f"{key} {what}", place=place, fix="See docs/train.md") from None


def parse_options(kind: type[T], values: Mapping[str, Any], *, place: str) -> T:
    """Values -> a dataclass of options, such as a recipe's.

    Raises:
        ConfigError: an unknown name, with the closest one, or a value of another type.
    """
    known = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for name in values:
        if name not in known:
            raise ConfigError(
                f"unknown key '{name}'", place=f"{place}.{name}", fix=suggest_name(name, known)
            )
    try:
        return TypeAdapter(kind).validate_python(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(x) for x in (place, *first["loc"]))
        what = f"{first['input']!r}: {first['msg'].lower()}"
        raise ConfigError(what, place=where, fix="See docs/train.md") from None


def parse_overrides(overrides: Iterable[str], *, place: str) -> dict[str, Any]:
    """`a.b=c` texts alone -> a tree of plain values. Raises ConfigError for one that is not of this form."""
    found: dict[str, Any] = {}
    for text in overrides:
        try:
            _override(found, text)
        except ConfigError as error:
            raise ConfigError(error.message, place=place, fix=error.fix) from None
    return found


def save_run_config(config: RunConfig, path: Path) -> None:
    """Write the resolved config, every default spelled out."""
    path.write_text(
        yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), encoding="utf-8"
    )


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML 1.1 takes 1e-4 for a string; ours takes it for the number that it is in YAML 1.2. A key that stands twice, of
    which the first would be lost without a word, is an error."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.composer.ComposerError(
                        None, None, f"'{key.value}' stands twice", key.start_mark
                    )
                seen.add(key.value)
        return node


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def _parse(text: str, *, place: str) -> Any:
    """YAML -> plain values. Raises ConfigError with the line."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        what = f"broken YAML ({getattr(error, 'problem', error)})"
        raise ConfigError(
            what, place=f"{place}:{mark.line + 1}" if mark else place, fix="Mend the line"
        ) from None


def _override(tree: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"'{text}'", place="override", fix="Write key.subkey=value")
    *path, last = key.split(".")
    node: Any = tree
    for name in path:
        inner = (
            node.setdefault(name, {}) if isinstance(node, dict) else node[_index(node, name, key)]
        )
        if not isinstance(inner, dict | list):
            raise ConfigError(
                f"'{key}': {name} is not a section", place="override", fix="Write key.subkey=value"
            )
        node = inner
    node[last if isinstance(node, dict) else _index(node, last, key)] = _parse(value, place=key)


def _index(items: list[Any], name: str, key: str) -> int:
    """`name` as an index of `items`; the first free one adds an item."""
    if not name.isdecimal() or int(name) > len(items):
        raise ConfigError(
            f"'{key}': '{name}' is no item",
            place="override",
            fix=f"Write a number, 0 to {len(items)}",
        )
    if int(name) == len(items):
        items.append({})
    return int(name)


def _fields_at(kind: type[Section], location: tuple[Any, ...]) -> list[str]:
    """The known keys of the section at `location`."""
    section: Any = kind
    for name in location:
        if isinstance(name, int):
            continue
        annotation = section.model_fields[name].annotation
        options = [annotation, *getattr(annotation, "__args__", ())]
        section = next(o for o in options if isinstance(o, type) and issubclass(o, Section))
    return list(section.model_fields)
