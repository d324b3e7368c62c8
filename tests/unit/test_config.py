"""Configs: what a user types wrong is answered with the place and the nearest right thing; overrides keep their types."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from vlduet import config
from vlduet.config import RunConfig
from vlduet.errors import ConfigError

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
    return write(tmp_path, TREE)


def write(folder: Path, tree: object) -> Path:
    path = folder / "run.yaml"
    path.write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree))
    return path


def says(*pieces: object) -> str:
    """A pattern that wants all pieces, in order."""
    return "(?s)" + ".*".join(re.escape(str(piece)) for piece in pieces)


def get(settings: RunConfig, key: str) -> Any:
    value: Any = settings
    for name in key.split("."):
        value = (
            value[int(name)]
            if name.isdigit()
            else value[name]
            if isinstance(value, dict)
            else getattr(value, name)
        )
    return value


# ---------------------------------------------------------------------- unknown and wrong


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("sed", "seed"),
        ("train.stps", "steps"),
        ("train.lora.rnak", "rank"),
        ("data.validaton", "validation"),
        ("data.train.1.wieght", "weight"),
        ("model.heads", "head"),
    ],
)
def test_an_unknown_key_names_the_closest_with_its_file(path: Path, key: str, nearest: str) -> None:
    with pytest.raises(
        ConfigError, match=says(path, f"unknown key '{key}'", f"Did you mean '{nearest}'")
    ):
        config.load_run_config(path, [f"{key}=1"])


def test_an_unknown_key_far_from_all_lists_the_known(path: Path) -> None:
    with pytest.raises(
        ConfigError, match=says("unknown key 'model.xyz'", "Known: dim, dtype, head, path, prompts")
    ):
        config.load_run_config(path, ["model.xyz=1"])


@pytest.mark.parametrize(
    ("override", "pieces"),
    [
        ("train.steps=ten", ["train.steps = 'ten'", "integer"]),
        ("train.steps=0", ["train.steps = 0", "greater than 0"]),
        ("train.steps=null", ["train.steps = None"]),
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
    ],
)
def test_a_wrong_value_is_shown_with_what_is_wanted(
    path: Path, override: str, pieces: list[str]
) -> None:
    with pytest.raises(ConfigError, match=says(path, *pieces)):
        config.load_run_config(path, [override])


@pytest.mark.parametrize("key", ["out", "recipe", "objectives", "model", "data", "train"])
def test_a_missing_section_is_named(tmp_path: Path, key: str) -> None:
    path = write(tmp_path, {name: value for name, value in TREE.items() if name != key})
    with pytest.raises(ConfigError, match=says(path, f"{key} is missing", "docs/train.md")):
        config.load_run_config(path)


def test_a_misspelt_section_is_named_before_the_missing_one(tmp_path: Path) -> None:
    path = write(
        tmp_path, {{"recipe": "recip"}.get(name, name): value for name, value in TREE.items()}
    )
    with pytest.raises(
        ConfigError, match=says(path, "unknown key 'recip'", "Did you mean 'recipe'")
    ):
        config.load_run_config(path)


def test_a_missing_key_inside_a_section(tmp_path: Path) -> None:
    path = write(tmp_path, TREE | {"train": {"lr": 1}})
    with pytest.raises(ConfigError, match=says("train.steps is missing")):
        config.load_run_config(path)


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("out: [1\nrecipe: x\n", ["run.yaml:", "broken YAML"]),
        ("- a\n- b\n", ["run.yaml", "not a mapping"]),
        ("", ["run.yaml", "not a mapping"]),
        ("train: {steps: 2, lr: 1, steps: 9}\n", ["run.yaml:1", "'steps' stands twice"]),
        ("out: a\nseed: 1\nout: b\n", ["run.yaml:3", "'out' stands twice"]),
        ("out: !!python/object/apply:os.system ['true']\n", ["run.yaml:1", "broken YAML"]),
    ],
)
def test_a_broken_file(tmp_path: Path, text: str, pieces: list[str]) -> None:
    with pytest.raises(ConfigError, match=says(*pieces)):
        config.load_run_config(write(tmp_path, text))


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=says("none.yaml", "no such file", "configs/")):
        config.load_run_config(tmp_path / "none.yaml")


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_bytes(b"\x89PNG\r\n\x1a\n\xff\xfe")
    with pytest.raises(ConfigError, match=says("run.yaml")):
        config.load_run_config(tmp_path / "run.yaml")
    with pytest.raises(ConfigError, match=says(tmp_path)):
        config.load_run_config(tmp_path)


# ---------------------------------------------------------------------- overrides


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
        ("data.validation=v.jsonl", "data.validation", Path("v.jsonl")),
    ],
)
def test_overrides(path: Path, override: str, key: str, value: object) -> None:
    found = get(config.load_run_config(path, [override]), key)
    assert found == value and type(found) is type(value)


def test_the_last_override_wins_and_the_rest_stays(path: Path) -> None:
    settings = config.load_run_config(path, ["train.lr=1", "seed=3", "train.lr=2"])
    assert (settings.train.lr, settings.seed, settings.train.steps) == (2.0, 3, 10)
    assert [(s.path, s.weight) for s in settings.data.train] == [
        (Path("a.jsonl"), 1.0),
        (Path("b.jsonl"), 2.0),
    ]


@pytest.mark.parametrize(
    ("override", "pieces"),
    [
        ("train.lr", ["'train.lr'", "key.subkey=value"]),
        ("=1", ["'=1'", "key.subkey=value"]),
        ("train.steps.more=1", ["train.steps.more", "steps is not a section"]),
        ("data.train.7.path=x", ["data.train.7.path", "'7'"]),
        ("data.train.first.path=x", ["data.train.first.path", "'first'"]),
        ("data.train.-1=x", ["data.train.-1", "'-1'"]),
        ("train.lr=[1", ["train.lr", "broken"]),
        ("model.prompts.image={image}\n: x", ["model.prompts.image", "broken"]),
    ],
)
def test_a_wrong_override_is_shown(path: Path, override: str, pieces: list[str]) -> None:
    with pytest.raises(ConfigError, match=says(*pieces)):
        config.load_run_config(path, [override])


def test_scientific_notation_in_the_file_is_a_number_everywhere(tmp_path: Path) -> None:
    """YAML 1.1 takes 1e-4 for a string; a recipe's options are not typed by the tree."""
    text = yaml.safe_dump(TREE).replace("name: vladva", "name: vladva\n  temperature_floor: 1e-2")
    settings = config.load_run_config(write(tmp_path, text + "seed: 1\n"))
    assert settings.recipe["temperature_floor"] == 0.01


@dataclass(frozen=True, slots=True)
class Options:
    """As a recipe has them."""

    language_on: Literal["long", "any"] = "long"
    floor: float = 0.01
    triple: bool = False


def test_options_of_a_recipe_are_typed() -> None:
    assert config.parse_options(Options, {"floor": 1, "triple": True}, place="recipe") == Options(
        floor=1.0, triple=True
    )


@pytest.mark.parametrize(
    ("values", "pieces"),
    [
        ({"flor": 1}, ["recipe.flor", "unknown key 'flor'", "Did you mean 'floor'"]),
        ({"floor": "low"}, ["recipe.floor", "'low'", "number"]),
        ({"language_on": "lng"}, ["recipe.language_on", "'lng'", "'long' or 'any'"]),
        ({"triple": "perhaps"}, ["recipe.triple", "'perhaps'", "boolean"]),
    ],
)
def test_wrong_options_of_a_recipe_are_shown(values: dict[str, Any], pieces: list[str]) -> None:
    with pytest.raises(ConfigError, match=says(*pieces)):
        config.parse_options(Options, values, place="recipe")


# ---------------------------------------------------------------------- saving


def test_a_saved_config_reloads_equal(path: Path, tmp_path: Path) -> None:
    settings = config.load_run_config(
        path, ["train.lora.dropout=0.1", "model.prompts.chat=false", "train.lr=1e-5", "seed=7"]
    )
    config.save_run_config(settings, tmp_path / "saved.yaml")
    assert config.load_run_config(tmp_path / "saved.yaml") == settings
    spelled = yaml.safe_load((tmp_path / "saved.yaml").read_text())
    assert spelled["train"]["lora"]["rank"] == 16 and spelled["data"]["cache"] is None, (
        "every default is written"
    )


def test_no_lora_survives_saving(path: Path, tmp_path: Path) -> None:
    settings = config.load_run_config(path, ["train.lora=null"])
    config.save_run_config(settings, tmp_path / "saved.yaml")
    assert config.load_run_config(tmp_path / "saved.yaml").train.lora is None


def test_a_config_does_not_change(path: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        config.load_run_config(path).train.lr = 1.0


def test_a_config_extends_another(path: Path) -> None:
    above = path.with_name("above.yaml")
    above.write_text(
        "extends: run.yaml\nrecipe: {language_on: any}\nobjectives: {language: 0}\ntrain: {lr: 0.5}\n"
    )
    found = config.load_run_config(above, ["train.steps=3"])
    assert found.recipe == {"name": "vladva", "language_on": "any"} and found.objectives == {
        "contrastive": 1.0,
        "language": 0.0,
    }
    assert (found.train.lr, found.train.steps, len(found.data.train)) == (0.5, 3, 2)
    above.write_text("extends: run.yaml\ndata: {train: [{path: c.jsonl}]}\n")
    assert [source.path.name for source in config.load_run_config(above).data.train] == ["c.jsonl"]


def test_what_a_config_extends_must_be_there_and_the_last(path: Path) -> None:
    above, top = path.with_name("above.yaml"), path.with_name("top.yaml")
    above.write_text("extends: run.yaml\n")
    top.write_text("extends: above.yaml\n")
    with pytest.raises(ConfigError, match=says(top, "extends another")):
        config.load_run_config(top)
    top.write_text("extends: gone.yaml\n")
    with pytest.raises(ConfigError, match=says("gone.yaml", "no such file")):
        config.load_run_config(top)


@pytest.mark.parametrize(
    "file", sorted((Path(__file__).parents[2] / "configs").rglob("*.yaml")), ids=lambda p: p.name
)
def test_the_configs_that_come_with_it_load(file: Path) -> None:
    if not file.name.startswith("compare-"):
        config.load_run_config(file)
        return
    comparison = config.load_comparison_config(file)
    for overrides in comparison.runs.values():
        config.load_run_config(
            file.parents[1] / comparison.base, [*comparison.overrides, *overrides]
        )


def test_docs_explain_every_key() -> None:
    """docs/train.md is where the errors send people."""
    text = (Path(__file__).parents[2] / "docs" / "train.md").read_text()

    def keys(section: type[config.Section], prefix: str) -> list[str]:
        found = []
        for name, field in section.model_fields.items():
            options = [field.annotation, *getattr(field.annotation, "__args__", ())]
            inner = [o for o in options if isinstance(o, type) and issubclass(o, config.Section)]
            found += keys(inner[0], f"{prefix}{name}.") if inner else [f"{prefix}{name}"]
        return found

    missing = [
        key
        for key in keys(RunConfig, "")
        if f"`{key.replace('data.train.', 'data.train[].')}`" not in text
    ]
    assert not missing, f"docs/train.md does not explain {missing}"


def test_anchors_and_merges_are_no_repeated_keys(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("b: &b {x: 1}\ns: {a: &a {<<: *b, x: 2}}\nc: {<<: *a, y: 3}\n")
    assert config._read_mapping(path)["c"] == {"x": 2, "y": 3}
