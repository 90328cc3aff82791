"""`moestro recipes`."""

from typing import Annotated

import tyro

from moestro.flags import RecipeFlags
from moestro.listing import print_recipes
from moestro.training.recipes import RECIPES

RECIPE_FLAGS = RecipeFlags()


def recipes(recipe_flags: Annotated[RecipeFlags, tyro.conf.arg(name="")] = RECIPE_FLAGS) -> None:
    """List the recipes, their costs at one size, and their variants."""
    print_recipes([recipe_flags.recipe(name) for name in RECIPES])
