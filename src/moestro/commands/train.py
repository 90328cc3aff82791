"""`moestro train`."""

from pathlib import Path
from typing import Annotated

import tyro

from moestro.commands.folders import slug
from moestro.flags import DataFlags, RecipeFlags, RunFlags
from moestro.gate.ranges import Seed, check
from moestro.listing import print_costs
from moestro.training.estimate import estimates

RECIPE_FLAGS, DATA_FLAGS, RUN_FLAGS = RecipeFlags(), DataFlags(), RunFlags()


def train(
    recipe: tyro.conf.Positional[str],
    /,
    seed: int = 0,
    export_stock: bool = False,
    recipe_flags: Annotated[RecipeFlags, tyro.conf.arg(name="")] = RECIPE_FLAGS,
    data_flags: Annotated[DataFlags, tyro.conf.arg(name="")] = DATA_FLAGS,
    run_flags: Annotated[RunFlags, tyro.conf.arg(name="")] = RUN_FLAGS,
) -> None:
    """Train one recipe.

    Args:
        recipe: A recipe, as `moestro recipes` lists them; NAME+VARIANT is a variant of it, and NAME:FIELD=VALUE,...
            overrides fields.
        seed: Random seed for initial weights and data order.
        export_stock: Also save the finished model as its stock transformers sibling, which it must have, in stock/.
    """
    check("seed", seed, Seed)
    chosen = recipe_flags.recipe(recipe)
    if run_flags.dry_run:
        print_costs(estimates([chosen]), "1 run")
        return
    folder = run_flags.out or Path("runs") / f"{slug([recipe])}-{chosen.size}-seed-{seed}"
    from moestro.commands.work.train import train_recipe

    train_recipe(chosen, folder, seed=seed, data_flags=data_flags, run_flags=run_flags, export_stock=export_stock)
