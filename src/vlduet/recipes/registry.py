"""Table of the recipes, and the recipe that a config names."""

from __future__ import annotations

from typing import Any

from vlduet.config import RunConfig, parse_options
from vlduet.errors import ConfigError, suggest_name
from vlduet.recipes import clip, duet, fromage, sugar, vladva
from vlduet.recipes.recipe import BoundRecipe, Recipe

RECIPES: dict[str, Recipe[Any]] = {
    recipe.name: recipe
    for recipe in (vladva.RECIPE, sugar.RECIPE, duet.RECIPE, fromage.RECIPE, clip.RECIPE)
}
"""Name -> recipe. A new method is a file of this package and an entry here."""


def find_recipe(name: str) -> Recipe[Any]:
    """Return a recipe by name.

    Raises:
        ConfigError: an unknown name; the message suggests the closest known one, or lists them.
    """
    if name not in RECIPES:
        fix = suggest_name(name, RECIPES)
        raise ConfigError(f"unknown recipe '{name}'", place="recipe.name", fix=fix)
    return RECIPES[name]


def load_recipe(config: RunConfig) -> BoundRecipe:
    """Return the recipe that a config names, with the config's options and loss weights.

    Raises:
        ConfigError: an unknown recipe, option or loss, an option with a wrong value or none that
            must have one, or no loss with a weight other than 0.
    """
    values = dict(config.recipe)
    recipe = find_recipe(str(values.pop("name", "")))
    for loss in config.objectives:
        if loss not in recipe.objectives:
            fix = suggest_name(loss, recipe.objectives)
            raise ConfigError(
                f"unknown loss '{loss}' of {recipe.name}", place="objectives", fix=fix
            )
    if not any(config.objectives.values()):
        fix = f"Known: {', '.join(recipe.objectives)}"
        raise ConfigError("no loss has a weight", place="objectives", fix=fix)
    options = parse_options(recipe.options, values, place="recipe")
    return recipe.bind(options, config.objectives)
