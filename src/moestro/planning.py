"""Plan a comparison and check it before any training: equal budgets, seeds, and the grid of learning rates."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from moestro.architecture.counting import count_parameters
from moestro.difference import MARGIN, check_margin
from moestro.errors import Misuse
from moestro.sweep import Grid
from moestro.training.recipe import Recipe

TOLERANCE = 0.02
"""Parameters count as equal within this share: routers and norms differ a little between architectures."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A checked comparison that is ready to run."""

    recipes: tuple[Recipe, ...]
    seeds: tuple[int, ...]
    match: Literal["tokens", "flops"]
    differences: tuple[str, ...]
    """A sentence for each budget that differs; empty unless the user allowed unequal budgets."""
    command: str
    grid: Grid | None = None
    """Grid of the learning-rate sweep; None: each recipe keeps its own learning rate."""
    margin: float = MARGIN
    """Equivalence margin in nats per token."""

    @property
    def runs(self) -> int:
        """The most runs that can train at once."""
        screening = len(self.grid.learning_rates) if self.grid is not None else 0
        return len(self.recipes) * max(len(self.seeds), screening)


def plan(
    recipes: Sequence[Recipe],
    *,
    seeds: Sequence[int],
    match: Literal["tokens", "flops"] = "tokens",
    allow_unequal: bool = False,
    command: Sequence[str] = (),
    grid: Grid | None = None,
    margin: float = MARGIN,
) -> Plan:
    """Match the budgets and return the plan. Raise Misuse, naming the number that differs, for an unfair comparison."""
    check(recipes, seeds, match, grid)
    if match == "flops":
        recipes = [with_flops_of(recipes[0], recipe) for recipe in recipes]
    differences = tuple(unequal(recipes, match))
    if differences and not allow_unequal:
        raise Misuse(f"budgets must be equal: {differences[0]}; change the recipe, or say --allow-unequal")
    return Plan(
        recipes=tuple(recipes),
        seeds=tuple(seeds),
        match=match,
        differences=differences,
        command=shlex.join(command),
        grid=grid,
        margin=check_margin(margin),
    )


def check(recipes: Sequence[Recipe], seeds: Sequence[int], match: str, grid: Grid | None) -> None:
    """Raise Misuse unless recipes, seeds and grid form a valid comparison."""
    names = [recipe.name for recipe in recipes]
    if not recipes:
        raise Misuse("compare needs at least one recipe")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise Misuse(f"every recipe must be named once, got {twice!r} {names.count(twice)} times")
    if not seeds and grid is None:
        raise Misuse("seeds must be at least 1 (or 0 beside --sweep: the screening alone), got 0")
    if negative := [seed for seed in (*seeds, *([grid.seed] if grid else ())) if seed < 0]:
        raise Misuse(f"a seed must be at least 0, got {negative[0]}")
    if grid is not None:
        grid.validate(recipes, seeds, match)


def with_flops_of(first: Recipe, recipe: Recipe) -> Recipe:
    """Return the recipe with as many tokens as the first recipe's training FLOPs pay for."""
    budget = first.training.tokens * first.training_flops()
    tokens = round(budget / recipe.training_flops())
    return replace(recipe, training=replace(recipe.training, tokens=tokens)).validate()


def unequal(recipes: Sequence[Recipe], match: str) -> list[str]:
    """Return one sentence for each number that should be equal and is not.

    Active parameters must agree between all recipes; total ones between those with experts (a dense model has no idle
    parameters to add).
    """
    counts = {r.name: count_parameters(r.model.architecture) for r in recipes}
    sparse = {name: count for name, count in counts.items() if count.total != count.active}
    quantities: list[tuple[str, dict[str, float], float]] = [
        ("active parameters", {name: count.active for name, count in counts.items()}, TOLERANCE),
        ("total parameters of the recipes with experts", {n: count.total for n, count in sparse.items()}, TOLERANCE),
    ]
    fields = ["batch_tokens", "sequence_length"] + (["tokens"] if match == "tokens" else [])
    quantities += [(name, {r.name: getattr(r.training, name) for r in recipes}, 0.0) for name in fields]
    quantities.append(("vocab_size", {r.name: r.model.vocab_size for r in recipes}, 0.0))
    sentences = []
    for what, values, tolerance in quantities:
        if values and max(values.values()) > min(values.values()) * (1 + tolerance):
            low, high = min(values, key=values.__getitem__), max(values, key=values.__getitem__)
            sentences.append(f"{what} differ: {low} has {values[low]:,}, {high} has {values[high]:,}")
    dtypes = {r.training.dtype for r in recipes}
    if len(dtypes) > 1:
        sentences.append(f"dtype differs: {', '.join(f'{r.name} has {r.training.dtype}' for r in recipes)}")
    return sentences


def run_folder(folder: Path, recipe: Recipe, seed: int, the_plan: Plan) -> Path:
    """Return the folder of one run of the comparison."""
    t = recipe.training
    swept = f"learning_rate={t.learning_rate:g},tokens={t.tokens}" if the_plan.grid else ""
    return recipe_folder(folder, recipe) / swept / f"seed-{seed}"


def recipe_folder(folder: Path, recipe: Recipe) -> Path:
    """Return the folder of all runs of a recipe."""
    return folder / "".join(c if c.isalnum() or c in "+-=,._" else "_" for c in recipe.name)
