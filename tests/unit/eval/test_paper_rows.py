"""Runs are matched to the rows of papers by the settings of their training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vlduet import config
from vlduet.errors import ConfigError
from vlduet.eval.paper_rows import METHOD_SETTINGS, Training, find_row, list_other_settings
from vlduet.recipes.registry import RECIPES
from vlduet.reports.papers import PUBLISHED_FILE

CONTENT = json.loads(PUBLISHED_FILE.read_text())
TABLES = {(table["paper"], table["title"]): table for table in CONTENT["tables"]}


def make_training(preset: str, *overrides: str) -> Training:
    """Return a short run of a preset with overrides."""
    run_config = config.load_run_config(preset, list(overrides))
    return Training(run_config, {}, 60, [400, 100])


def find_row_name(training: Training, *table: str) -> str | None:
    """Return the name of the row of a table that a run belongs to, or None."""
    content = TABLES[table]  # type: ignore[index]
    row = find_row(training, [*content["rows"], *content.get("unpublished", ())])
    return None if row is None else row["model"]


def list_preset_rows() -> list[tuple[str, str, str, str]]:
    """Return (preset, paper, title, row) for every preset that a published row names."""
    names = []
    for (paper, title), table in TABLES.items():
        for row in [*table["rows"], *table.get("unpublished", ())]:
            names += [(preset, paper, title, row["model"]) for preset in row.get("presets", ())]
    return names


@pytest.mark.parametrize("preset", sorted({preset for preset, *_ in list_preset_rows()}))
def test_a_run_of_a_preset_belongs_to_its_rows(preset: str) -> None:
    """With data and a base model of the user's own, too."""
    training = make_training(preset)
    num_sources = len(training.config.data.train)
    moved = [f"data.train.{i}.path=mine/{i}.jsonl" for i in range(num_sources)]
    own = make_training(preset, *moved, "model.path=mine/base", "train.lr=0.5", "out=runs/mine")
    for name, paper, title, row in list_preset_rows():
        if name == preset:
            assert find_row_name(training, paper, title) == row
            assert find_row_name(own, paper, title) == row


def test_every_ablation_preset_has_a_row() -> None:
    ablations = {name for name in config.list_presets() if name.startswith("ablations/")}
    assert ablations <= {preset for preset, *_ in list_preset_rows()}
    assert {"vladva-qwen2-vl-2b", "vladva-llava-13b"} <= {name for name, *_ in list_preset_rows()}


@pytest.mark.parametrize(
    ("preset", "overrides", "row"),
    [
        ("vladva", ["train.lora=null", "objectives={contrastive: 1}"], "soft prompts"),
        ("vladva", [], "soft prompts and LoRA, both losses"),
        ("vladva", ["objectives.language=3"], "soft prompts and LoRA, both losses"),
        ("vladva", ["recipe.guide=cross"], None),
        ("vladva", ["recipe.language_on=any"], None),
        ("vladva", ["train.lora=null"], None),
        ("vladva-nano", [], None),
        ("ablations/vladva-lora-only", ["train.soft_prompts=true"],
         "soft prompts and LoRA, without language loss"),
        ("sugar-nano", [], None),
    ],
)  # fmt: skip
def test_settings_decide_and_not_the_name(
    preset: str, overrides: list[str], row: str | None
) -> None:
    assert find_row_name(make_training(preset, *overrides), "VladVA", "Ablation") == row


def test_data_and_then_the_preset_select_a_row_of_several_with_one_method() -> None:
    pairs = "data.train=[{path: data/stamps/train.jsonl}, {path: data/emoji/train.jsonl}]"
    own = "data.train=[{path: own.jsonl}]"
    table = ("Sugar", "Ablation")
    assert find_row_name(make_training("sugar-nano", pairs), *table) == "without data_d"
    assert find_row_name(make_training("sugar-nano", own), *table) == "all parts"
    documents = "ablations/sugar-without-data-g"
    assert find_row_name(make_training(documents, own), *table) == "without data_g"
    unnamed = make_training("sugar-nano", own).config.model_copy(update={"preset": None})
    assert find_row_name(Training(unnamed, {}, 1, [1]), *table) == "all parts"


@pytest.mark.parametrize("recipe", METHOD_SETTINGS)
def test_default_values_of_a_method_are_those_of_its_recipe(recipe: str) -> None:
    options = RECIPES[recipe].options()
    for key, default in METHOD_SETTINGS[recipe].items():
        section, _, name = key.partition(".")
        if section == "recipe":
            assert getattr(options, name) == default
        else:
            assert config.TrainSection.model_fields[name].default == default


def test_description_of_a_training() -> None:
    training = make_training("vladva-nano", "data.train.1.path=b.jsonl", "train.batch_size=1000")
    assert training.describe() == (
        "models/nano trained on 500 records of data/stamps/train.jsonl, b.jsonl "
        "for 60 steps in batches of 1,000"
    )


def test_other_settings_are_listed_with_those_of_the_preset() -> None:
    overrides = ["train.lora.rank=2", "train.lr=2e-4", "recipe.short_below=20", "seed=4", "out=x"]
    training = make_training("vladva", *overrides)
    assert list_other_settings(training, "vladva") == [
        "recipe.short_below 20 (not set)", "train.lora.rank 2 (16)", "train.lr 0.0002 (0.0001)",
    ]  # fmt: skip
    without_lora = make_training("ablations/vladva-soft-prompts-only")
    assert list_other_settings(without_lora, "vladva") == []
    # Options that the config leaves out have their defaults.
    nano = make_training("vladva-nano").config
    options = {"split": "fields", "temperature_floor": 0.01, "short_below": 30}
    listed = list_other_settings(Training(nano, options, 1, [1]), "vladva")
    assert {"model.head not set (none)", "recipe.split fields (length)"} <= set(listed)
    assert not any("temperature_floor" in line or "short_below" in line for line in listed)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("steps", "many", r"'many'.*Evaluate again"),
        ("records", ["3"], r"records are .*3.*Evaluate again"),
        ("config", {}, "recipe is missing"),
        ("config", [], r"'config'|config"),
    ],
)
def test_facts_that_are_broken_name_the_file(key: str, value: Any, message: str) -> None:
    tree = config.load_run_config("vladva").model_dump(mode="json")
    facts = {"config": tree, "options": {}, "steps": 3, "records": [4]}
    place = Path("runs/x/scores.json")
    assert Training.from_json(facts, place=place).steps == 3
    with pytest.raises(ConfigError, match=message) as error:
        Training.from_json({**facts, key: value}, place=place)
    assert "scores.json" in str(error.value)
