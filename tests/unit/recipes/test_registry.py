"""Lookup of recipes, and the options and losses that a config may give them."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers import runs
from vlduet import config
from vlduet.errors import ConfigError
from vlduet.recipes.registry import RECIPES, find_recipe, load_recipe
from vlduet.recipes.sugar import SugarOptions


def test_every_recipe_is_found_by_its_name() -> None:
    assert sorted(RECIPES) == ["clip", "duet", "fromage", "sugar", "vladva"]
    for name in RECIPES:
        assert find_recipe(name).name == name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vladwa", r"recipe.name: unknown recipe 'vladwa'.*Did you mean 'vladva'"),
        ("", "Known: clip, duet, fromage, sugar, vladva"),
    ],
)
def test_an_unknown_recipe_is_refused_with_the_known_ones(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        find_recipe(name)


def test_the_config_binds_options_and_encoder_roles(tmp_path: Path) -> None:
    path = runs.write_run_config(tmp_path)
    overrides = ["recipe={name: vladva, guide: cross}"]
    recipe = load_recipe(config.load_run_config(path, overrides))
    assert recipe.name == "vladva"
    assert recipe.encoder_roles == ("cross",)
    without_weight = [*overrides, "objectives.contrastive=0"]
    assert load_recipe(config.load_run_config(path, without_weight)).encoder_roles == ()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("objectives={structure: 1}", "unknown loss 'structure' of vladva"),
        ("objectives={contrastive: 0}", "no loss has a weight"),
        ("recipe={name: vladva, gide: cross}", "Did you mean 'guide'"),
    ],
)
def test_wrong_losses_and_options_are_named(tmp_path: Path, override: str, message: str) -> None:
    run_config = config.load_run_config(runs.write_run_config(tmp_path), [override])
    with pytest.raises(ConfigError, match=message):
        load_recipe(run_config)


def test_recipes_without_frozen_encoders_select_none() -> None:
    assert find_recipe("fromage").bind(find_recipe("fromage").options(), {}).encoder_roles == ()
    assert find_recipe("sugar").bind(SugarOptions(), {"structure": 1.0}).encoder_roles == (
        "vision",
        "text",
        "cross",
    )
