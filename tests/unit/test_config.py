"""Config files: presets, overrides, and errors that name the place and the nearest valid key."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from vlduet import config, config_files
from vlduet.config import RunConfig
from vlduet.errors import ConfigError

REPOSITORY = Path(__file__).parents[2]

TREE: dict[str, Any] = {
    "out": "runs/x",
    "recipe": {"name": "vladva"},
    "objectives": {"contrastive": 1.0, "language": 0.3},
    "model": {"path": "models/base"},
    "data": {"train": [{"path": "a.jsonl"}, {"path": "b.jsonl", "weight": 2}]},
    "train": {"steps": 10},
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Path of a valid config file, run.yaml."""
    return write_config(tmp_path, TREE)


def write_config(folder: Path, tree: object) -> Path:
    """Write a tree, or a YAML text as it is, to run.yaml and return its path."""
    path = folder / "run.yaml"
    path.write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree))
    return path


def in_order(*fragments: object) -> str:
    """Return a pattern that matches all fragments in this order, with anything in between."""
    return "(?s)" + ".*".join(re.escape(str(fragment)) for fragment in fragments)


def get_value(settings: RunConfig, key: str) -> Any:
    """Return the value at a dotted key, with numbers for list items."""
    value: Any = settings
    for name in key.split("."):
        if name.isdigit():
            value = value[int(name)]
        elif isinstance(value, dict):
            value = value[name]
        else:
            value = getattr(value, name)
    return value


# --------------------------------------------------------------------- presets


def test_presets_are_listed_by_name() -> None:
    presets = config.list_presets()
    assert {"vladva", "vladva-nano", "sugar-nano", "ablations/sugar-alpha-0"} <= set(presets)
    assert presets == sorted(presets)


@pytest.mark.parametrize("name", ["vladva", "vladva.yaml", "configs/vladva.yaml"])
def test_a_preset_is_found_from_any_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert config.find_config(name) == config.PRESETS_FOLDER / "vladva.yaml"


def test_an_existing_file_has_priority_over_a_preset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vladva.yaml").write_text(yaml.safe_dump(TREE | {"seed": 41}))
    assert config.find_config("vladva.yaml") == Path("vladva.yaml")
    assert config.load_run_config("vladva.yaml").seed == 41


def test_an_unknown_config_name_lists_the_presets(tmp_path: Path) -> None:
    pattern = in_order("none.yaml", "no such file", "clip-nano", "vladva-nano")
    with pytest.raises(ConfigError, match=pattern):
        config.load_run_config(tmp_path / "none.yaml")


@pytest.mark.parametrize("name", config.list_presets())
def test_every_preset_loads(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if not name.startswith("compare-"):
        assert config.load_run_config(name).out.parts[:1] == ("runs",)
        return
    comparison = config.load_comparison_config(name)
    assert comparison.runs
    for overrides in comparison.runs.values():
        run = config.load_run_config(comparison.base, [*comparison.overrides, *overrides])
        assert run.data.train[0].path == Path("data/stamps/train.jsonl")


def test_a_copy_of_a_preset_still_extends_the_shipped_one(tmp_path: Path) -> None:
    preset = config.PRESETS_FOLDER / "ablations" / "sugar-without-gak.yaml"
    copy = tmp_path / "mine.yaml"
    copy.write_text(preset.read_text())
    copied_config, preset_config = config.load_run_config(copy), config.load_run_config(preset)
    assert copied_config == preset_config.model_copy(update={"preset": "sugar-nano"})
    assert copied_config.recipe["target"] == "mean"


def test_a_config_names_the_preset_that_it_is_or_extends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    loaded = config.load_run_config("ablations/sugar-without-gak", ["preset=other", "seed=3"])
    assert loaded.preset == "ablations/sugar-without-gak"
    # The resolved config of a run still names it.
    config.save_run_config(loaded, tmp_path / "config.yaml")
    assert config.load_run_config(tmp_path / "config.yaml") == loaded
    own = tmp_path / "own.yaml"
    own.write_text(yaml.safe_dump(TREE))
    (tmp_path / "derived.yaml").write_text("extends: own.yaml\n")
    assert config.load_run_config(own).preset is None
    assert config.load_run_config(tmp_path / "derived.yaml").preset is None


# --------------------------------------------------------------------- invalid keys and values


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("sed", "seed"),
        ("train.stps", "steps"),
        ("train.lora.rnak", "rank"),
        ("data.validaton", "validation"),
        ("data.train.1.wieght", "weight"),
        ("model.heads", "head"),
        ("data.validation.rot", "root"),
    ],
)
def test_an_unknown_key_suggests_the_closest_one(path: Path, key: str, nearest: str) -> None:
    pattern = in_order(path, f"unknown key '{key}'", f"Did you mean '{nearest}'")
    with pytest.raises(ConfigError, match=pattern):
        config.load_run_config(path, [f"{key}=1"])


def test_an_unknown_key_unlike_all_others_lists_the_valid_keys(path: Path) -> None:
    pattern = in_order("unknown key 'model.xyz'", "Known: dim, dtype, head, max_image_tokens, path")
    with pytest.raises(ConfigError, match=pattern):
        config.load_run_config(path, ["model.xyz=1"])


@pytest.mark.parametrize(
    ("override", "fragments"),
    [
        ("train.steps=ten", ["train.steps = 'ten'", "integer"]),
        ("train.steps=0", ["train.steps = 0", "greater than 0"]),
        ("train.steps=null", ["train: steps is missing", "epochs"]),
        ("train.lr=-1e-4", ["train.lr = -0.0001", "greater than 0"]),
        ("train.batch_size=1", ["train.batch_size = 1", "greater than 1"]),
        ("train.lora.targets=some", ["train.lora.targets = 'some'", "'qv' or 'all'"]),
        ("model.head=mpl", ["model.head = 'mpl'", "'none', 'linear' or 'mlp'"]),
        ("train.projector=maybe", ["train.projector = 'maybe'", "true or 'last'"]),
        ("objectives.language=much", ["objectives.language = 'much'", "number"]),
        ("objectives.language=-1", ["objectives.language = -1", "greater than or equal to 0"]),
        ("train.lr=.inf", ["train.lr = inf", "finite"]),
        ("out=2024", ["out = 2024", "a path: write it in quotes"]),
        ("data.train=[]", ["data.train = []", "at least 1"]),
        ("data.validation=1", ["data.validation = 1", "between 0 and 1"]),
        ("data.validation=true", ["data.validation = True", "between 0 and 1"]),
        ("data.validation=[v.jsonl]", ["data.validation = ['v.jsonl']", "a path"]),
        ("data.max_dropped=2", ["data.max_dropped = 2", "less than or equal to 1"]),
    ],
)
def test_an_invalid_value_is_reported_with_the_valid_ones(
    path: Path, override: str, fragments: list[str]
) -> None:
    with pytest.raises(ConfigError, match=in_order(path, *fragments)):
        config.load_run_config(path, [override])


@pytest.mark.parametrize("key", ["out", "recipe", "objectives", "model", "data", "train"])
def test_a_missing_section_is_named(tmp_path: Path, key: str) -> None:
    path = write_config(tmp_path, {name: value for name, value in TREE.items() if name != key})
    with pytest.raises(ConfigError, match=in_order(path, f"{key} is missing", "docs/train.md")):
        config.load_run_config(path)


def test_a_misspelt_section_is_reported_before_the_missing_one(tmp_path: Path) -> None:
    names = {"recipe": "recip"}
    tree = {names.get(name, name): value for name, value in TREE.items()}
    path = write_config(tmp_path, tree)
    pattern = in_order(path, "unknown key 'recip'", "Did you mean 'recipe'")
    with pytest.raises(ConfigError, match=pattern):
        config.load_run_config(path)


def test_a_missing_key_inside_a_section_is_named(tmp_path: Path) -> None:
    path = write_config(tmp_path, TREE | {"train": {"lr": 1}})
    with pytest.raises(ConfigError, match=in_order("train: steps is missing", "epochs")):
        config.load_run_config(path)


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        ("out: [1\nrecipe: x\n", ["run.yaml:", "broken YAML"]),
        ("- a\n- b\n", ["run.yaml", "not a mapping"]),
        ("", ["run.yaml", "not a mapping"]),
        ("train: {steps: 2, lr: 1, steps: 9}\n", ["run.yaml:1", "'steps' occurs twice"]),
        ("out: a\nseed: 1\nout: b\n", ["run.yaml:3", "'out' occurs twice"]),
        ("out: !!python/object/apply:os.system ['true']\n", ["run.yaml:1", "broken YAML"]),
    ],
)
def test_a_broken_file_is_named_with_its_line(
    tmp_path: Path, text: str, fragments: list[str]
) -> None:
    with pytest.raises(ConfigError, match=in_order(*fragments)):
        config.load_run_config(write_config(tmp_path, text))


def test_a_file_that_is_not_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_bytes(b"\x89PNG\r\n\x1a\n\xff\xfe")
    with pytest.raises(ConfigError, match=in_order("run.yaml", "cannot be read as text")):
        config.load_run_config(tmp_path / "run.yaml")
    with pytest.raises(ConfigError, match=in_order(tmp_path, "no such file")):
        config.load_run_config(tmp_path)


# --------------------------------------------------------------------- overrides


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("train.steps=25", "train.steps", 25),
        ("train.lr=1e-4", "train.lr", 1e-4),
        ("train.lr=3E-5", "train.lr", 3e-5),
        ("train.lr=.5", "train.lr", 0.5),
        ("train.projector=true", "train.projector", True),
        ("train.projector=no", "train.projector", False),
        ("train.projector=last", "train.projector", "last"),
        ("train.lora=null", "train.lora", None),
        ("train.lora.rank=4", "train.lora.rank", 4),
        ("train.lora={rank: 8, targets: qv}", "train.lora.targets", "qv"),
        ("objectives.language=0", "objectives.language", 0.0),
        ("objectives={contrastive: 1e-1}", "objectives", {"contrastive": 0.1}),
        ("model.path=/a/b c=d", "model.path", Path("/a/b c=d")),
        ("out=inf", "out", Path("inf")),
        ("model.prompts.image=<s>{image}", "model.prompts", {"image": "<s>{image}"}),
        ("model.prompts.chat=false", "model.prompts", {"chat": False}),
        ("recipe.temperature_floor=2e-2", "recipe.temperature_floor", 0.02),
        ("data.train.0.path=c.jsonl", "data.train.0.path", Path("c.jsonl")),
        ("data.train.1.weight=0.5", "data.train.1.weight", 0.5),
        ("data.train=[{path: c.jsonl}]", "data.train.0.path", Path("c.jsonl")),
        ("data.train.2.path=c.jsonl", "data.train.2.path", Path("c.jsonl")),
        ("data.train.0.root=photos", "data.train.0.root", Path("photos")),
        ("data.train.0.columns.caption=text_en", "data.train.0.columns", {"caption": "text_en"}),
        ("data.validation=v.jsonl", "data.validation.path", Path("v.jsonl")),
        ("data.validation.path=v.jsonl", "data.validation.path", Path("v.jsonl")),
        ("data.validation={path: v, root: r}", "data.validation.root", Path("r")),
        ("data.validation=0.2", "data.validation", 0.2),
        ("train.epochs=2.5", "train.epochs", 2.5),
    ],
)
def test_an_override_sets_a_value_of_its_type(
    path: Path, override: str, key: str, value: object
) -> None:
    loaded = get_value(config.load_run_config(path, [override]), key)
    assert loaded == value
    assert type(loaded) is type(value)


@pytest.mark.parametrize(
    ("overrides", "length"),
    [
        (["train.epochs=3"], (None, 3)),
        (["train.epochs=3", "train.steps=7"], (7, None)),
        (["train={epochs: 0.5}"], (None, 0.5)),
        (["train.epochs=null"], (10, None)),
    ],
)
def test_steps_and_epochs_replace_each_other(
    path: Path, overrides: list[str], length: tuple[int | None, float | None]
) -> None:
    train = config.load_run_config(path, overrides).train
    assert (train.steps, train.epochs) == length


def test_epochs_of_a_file_replace_the_steps_of_the_file_that_it_extends(path: Path) -> None:
    child = path.with_name("child.yaml")
    child.write_text("extends: run.yaml\ntrain: {epochs: 4}\n")
    train = config.load_run_config(child).train
    assert (train.steps, train.epochs) == (None, 4)


def test_steps_and_epochs_in_one_file_are_refused(tmp_path: Path) -> None:
    path = write_config(tmp_path, TREE | {"train": {"steps": 2, "epochs": 1}})
    with pytest.raises(ConfigError, match=in_order("train: steps and epochs exclude each other")):
        config.load_run_config(path)


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("data.validation=v.jsonl", "v.jsonl"),
        ("data.validation=0.25", 0.25),
        ("data.validation={path: v.jsonl, root: r}", {"path": "v.jsonl", "root": "r"}),
    ],
)
def test_a_saved_config_names_validation_as_the_user_did(
    path: Path, override: str, text: object
) -> None:
    settings = config.load_run_config(path, [override])
    copy = path.with_name("copy.yaml")
    config.save_run_config(settings, copy)
    assert config.load_run_config(copy) == settings
    saved = config_files.read_yaml_mapping(copy)["data"]["validation"]
    assert saved == text or saved.items() >= text.items()  # type: ignore[attr-defined]


def test_the_last_override_wins_and_other_keys_are_unchanged(path: Path) -> None:
    settings = config.load_run_config(path, ["train.lr=1", "seed=3", "train.lr=2"])
    assert (settings.train.lr, settings.seed, settings.train.steps) == (2.0, 3, 10)
    sources = [(source.path, source.weight) for source in settings.data.train]
    assert sources == [(Path("a.jsonl"), 1.0), (Path("b.jsonl"), 2.0)]


@pytest.mark.parametrize(
    ("override", "fragments"),
    [
        ("train.lr", ["'train.lr'", "key.subkey=value"]),
        ("=1", ["'=1'", "key.subkey=value"]),
        ("train.steps.more=1", ["train.steps.more", "steps is not a section", "train.steps={more"]),
        ("data.train.7.path=x", ["data.train.7.path", "'7'", "0 to 2"]),
        ("data.train.first.path=x", ["data.train.first.path", "'first'"]),
        ("data.train.-1=x", ["data.train.-1", "'-1'"]),
        ("train.lr=[1", ["train.lr", "broken"]),
        ("model.prompts.image={image}\n: x", ["model.prompts.image", "broken"]),
    ],
)
def test_an_invalid_override_is_reported(path: Path, override: str, fragments: list[str]) -> None:
    with pytest.raises(ConfigError, match=in_order(*fragments)):
        config.load_run_config(path, [override])


def test_overrides_alone_become_nested_values() -> None:
    tree = config_files.parse_overrides(["a.b=1e-2", "a.c=[x]", "d=text"], place="--set")
    assert tree == {"a": {"b": 0.01, "c": ["x"]}, "d": "text"}
    with pytest.raises(ConfigError, match=in_order("--set", "'a'", "key.subkey=value")):
        config_files.parse_overrides(["a"], place="--set")


def test_scientific_notation_is_a_number_also_in_untyped_recipe_options(tmp_path: Path) -> None:
    """YAML 1.1 reads 1e-4 as a string, and the config does not type a recipe's options."""
    text = yaml.safe_dump(TREE)
    text = text.replace("name: vladva", "name: vladva\n  temperature_floor: 1e-2")
    settings = config.load_run_config(write_config(tmp_path, text + "seed: 1\n"))
    assert settings.recipe["temperature_floor"] == 0.01


# --------------------------------------------------------------------- options of a recipe


@dataclass(frozen=True, slots=True)
class ExampleOptions:
    """Options like those of a recipe."""

    language_on: Literal["long", "any"] = "long"
    floor: float = 0.01
    triple: bool = False


def test_options_are_converted_to_their_types() -> None:
    options = config.parse_options(ExampleOptions, {"floor": 1, "triple": True}, place="recipe")
    assert options == ExampleOptions(floor=1.0, triple=True)
    assert type(options.floor) is float


@pytest.mark.parametrize(
    ("values", "fragments"),
    [
        ({"flor": 1}, ["recipe.flor", "unknown key 'flor'", "Did you mean 'floor'"]),
        ({"floor": "low"}, ["recipe.floor", "'low'", "number"]),
        ({"language_on": "lng"}, ["recipe.language_on", "'lng'", "'long' or 'any'"]),
        ({"triple": "perhaps"}, ["recipe.triple", "'perhaps'", "boolean"]),
    ],
)
def test_invalid_options_are_reported(values: dict[str, Any], fragments: list[str]) -> None:
    with pytest.raises(ConfigError, match=in_order(*fragments)):
        config.parse_options(ExampleOptions, values, place="recipe")


# --------------------------------------------------------------------- saving and extending


def test_a_saved_config_reloads_equal_with_every_default_in_the_file(
    path: Path, tmp_path: Path
) -> None:
    overrides = ["train.lora.dropout=0.1", "model.prompts.chat=false", "train.lr=1e-5", "seed=7"]
    settings = config.load_run_config(path, overrides)
    config.save_run_config(settings, tmp_path / "saved.yaml")
    assert config.load_run_config(tmp_path / "saved.yaml") == settings
    tree = yaml.safe_load((tmp_path / "saved.yaml").read_text())
    assert tree["train"]["lora"]["rank"] == 16
    assert tree["data"]["cache"] is None


def test_disabled_lora_stays_disabled_after_saving(path: Path, tmp_path: Path) -> None:
    settings = config.load_run_config(path, ["train.lora=null"])
    config.save_run_config(settings, tmp_path / "saved.yaml")
    assert config.load_run_config(tmp_path / "saved.yaml").train.lora is None


def test_a_config_is_immutable(path: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        config.load_run_config(path).train.lr = 1.0


def test_a_config_that_extends_another_changes_single_keys_and_whole_lists(path: Path) -> None:
    child = path.with_name("child.yaml")
    child.write_text(
        "extends: run.yaml\nrecipe: {language_on: any}\nobjectives: {language: 0}\n"
        "train: {lr: 0.5}\n"
    )
    settings = config.load_run_config(child, ["train.steps=3"])
    assert settings.recipe == {"name": "vladva", "language_on": "any"}
    assert settings.objectives == {"contrastive": 1.0, "language": 0.0}
    assert (settings.train.lr, settings.train.steps, len(settings.data.train)) == (0.5, 3, 2)
    child.write_text("extends: run.yaml\ndata: {train: [{path: c.jsonl}]}\n")
    assert [source.path.name for source in config.load_run_config(child).data.train] == ["c.jsonl"]


def test_an_extended_file_must_exist_and_not_extend_another(path: Path) -> None:
    middle = path.with_name("middle.yaml")
    top = path.with_name("top.yaml")
    middle.write_text("extends: run.yaml\n")
    top.write_text("extends: middle.yaml\n")
    with pytest.raises(ConfigError, match=in_order(top, "extends another")):
        config.load_run_config(top)
    top.write_text("extends: missing.yaml\n")
    with pytest.raises(ConfigError, match=in_order("missing.yaml", "no such file")):
        config.load_run_config(top)


def test_yaml_anchors_and_merges_are_not_repeated_keys(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("b: &b {x: 1}\ns: {a: &a {<<: *b, x: 2}}\nc: {<<: *a, y: 3}\n")
    assert config_files.read_yaml_mapping(path)["c"] == {"x": 2, "y": 3}


# --------------------------------------------------------------------- documentation


def list_keys(section: type[config.Section], prefix: str = "") -> list[str]:
    """Return the dotted names of all keys of a section and of the sections in it."""
    keys = []
    for name, field in section.model_fields.items():
        inner = config._section_class(field.annotation)
        if inner is not None and name != "validation":  # the keys of its items are those of train
            keys += list_keys(inner, f"{prefix}{name}.")
        else:
            keys.append(f"{prefix}{name}")
    return keys


def test_docs_explain_every_key() -> None:
    """Error messages send users to docs/train.md."""
    text = (REPOSITORY / "docs" / "train.md").read_text()
    names = [key.replace("data.train.", "data.train[].") for key in list_keys(RunConfig)]
    missing = [name for name in names if f"`{name}`" not in text]
    assert not missing, f"docs/train.md does not explain {missing}"
