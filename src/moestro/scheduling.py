"""Write the runs of a comparison as commands, for a scheduler that starts each on a machine of its own."""

import shlex
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from moestro.compare import attempt
from moestro.flags import DataFlags, RecipeFlags
from moestro.planning import Plan
from moestro.sweep import at_rate
from moestro.training.recipe import Recipe


def commands(the_plan: Plan, folder: Path, recipe_flags: RecipeFlags, data_flags: DataFlags) -> Iterator[str]:
    """Yield one `moestro train` command per run. With a sweep, yield the sweep's runs only: they decide the others.

    Each command fills the folder that `moestro compare` reads. No recipe's dtype may be "auto": each machine would
    decide it anew.
    """
    common = [*words(data_flags), *words(recipe_flags, leave_out=("tokens", "learning_rate", "dtype"))]
    for recipe, seed in runs(the_plan):
        t = recipe.training
        where = attempt(recipe, seed, the_plan, folder).folder
        own = ["--seed", str(seed), "--tokens", str(t.tokens), "--dtype", t.dtype]
        if the_plan.grid is not None or recipe_flags.learning_rate is not None:
            own += ["--learning-rate", repr(t.learning_rate)]
        yield shlex.join(["moestro", "train", recipe.name, *own, "--out", str(where), *common])


def runs(the_plan: Plan) -> Iterator[tuple[Recipe, int]]:
    """Yield each recipe and seed; with a grid, each recipe at each of its learning rates with the screening seed."""
    if (grid := the_plan.grid) is not None:
        yield from ((at_rate(r, rate, grid), grid.seed) for r in the_plan.recipes for rate in grid.learning_rates)
    else:
        yield from ((recipe, seed) for seed in the_plan.seeds for recipe in the_plan.recipes)


def words(flags: Any, leave_out: tuple[str, ...] = ()) -> list[str]:
    """Return as command-line words the fields of `flags` that differ from their defaults, except `leave_out`."""
    found = []
    for field in fields(flags):
        value = getattr(flags, field.name)
        if value != field.default and field.name not in leave_out:
            values = value if isinstance(value, tuple) else (value,)
            found += [f"--{field.name.replace('_', '-')}", *map(str, values)]
    return found
