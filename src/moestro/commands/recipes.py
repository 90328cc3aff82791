"""`moestro recipes`."""

from typing import Annotated

import tyro

from moestro.flags import RecipeFlags
from moestro.listing import print_recipes
from moestro.training.recipes import RECIPES

RECIPE_FLAGS = RecipeFlags()


def recipes(recipe_flags: Annotated[RecipeFlags, tyro.conf.arg(name="")] = RECIPE_FLAGS) -> None:
    """List the recipes, what they cost at one size, and the variants of them."""
    print_recipes([recipe_flags.recipe(name) for name in RECIPES])
