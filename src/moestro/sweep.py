"""The learning-rate sweep before a comparison: every recipe gets the same grid, on a seed that no interval contains.

A comparison at one learning rate favours the recipe that it was tuned on. Screening on a seed of its own keeps the
choice of the rate out of the paired differences.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from moestro.comparison import FailedRun, Run, Screened, Sweep
from moestro.errors import Misuse, TrainingFailed
from moestro.gate.ranges import Positive, Seed, Tokens, check_fields
from moestro.training.recipe import Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """The learning rates, seed and tokens that every recipe is screened with."""

    learning_rates: tuple[Positive, ...]
    seed: Seed = 1000
    tokens: Tokens | None = None
    """Training tokens of each screening run; None: as many as each recipe trains on in the comparison."""

    def __post_init__(self) -> None:
        check_fields(self)

    def validate(self, recipes: Sequence[Recipe], seeds: Sequence[int], match: str) -> None:
        """Raise Misuse unless these recipes can run the grid, and its seed is not one of the comparison's `seeds`."""
        if not self.learning_rates:
            raise Misuse("a sweep needs at least one learning rate")
        names = [f"{rate:g}" for rate in self.learning_rates]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise Misuse(f"learning rates of a sweep must differ within six digits, got {twice} twice")
        if self.seed in seeds:
            raise Misuse(f"the screening seed must not be one of the comparison's, got {self.seed}")
        if self.tokens is not None and match == "flops":
            raise Misuse("sweep_tokens requires match='tokens', got match='flops', where recipes differ in tokens")
        least = max(recipe.training.batch_tokens for recipe in recipes)
        if self.tokens is not None and self.tokens < least:
            raise Misuse(f"sweep_tokens must be at least batch_tokens ({least}), got {self.tokens}")


def sweep(
    recipes: Sequence[Recipe], grid: Grid, make_all: Callable[[Sequence[Recipe], int], Sequence[Run | FailedRun]]
) -> Sweep:
    """Train every recipe at every learning rate of the grid, and choose each recipe's best.

    `make_all(recipes, seed)` trains or reads one run of each recipe, and returns their results in order.

    Raises:
        TrainingFailed: the machine stopped a run, so its learning rate is unknown, not bad.
    """
    arms = [at_rate(recipe, rate, grid) for recipe in recipes for rate in grid.learning_rates]
    results = [screened(arm, run) for arm, run in zip(arms, make_all(arms, grid.seed), strict=True)]
    count = len(grid.learning_rates)
    found = {r.name: tuple(results[i * count : (i + 1) * count]) for i, r in enumerate(recipes)}
    return Sweep(
        seed=grid.seed,
        tokens={
            r.name: arm.training.steps * arm.training.batch_tokens
            for r, arm in zip(recipes, arms[::count], strict=True)
        },
        screened=found,
        chosen={name: rate for name, results in found.items() if (rate := best(results)) is not None},
    )


def screened(recipe: Recipe, run: Run | FailedRun) -> Screened:
    """Return one run's learning rate and held-out loss, which is None if training failed at that rate.

    Raises:
        TrainingFailed: the machine stopped the run.
    """
    rate = recipe.training.learning_rate
    if isinstance(run, FailedRun):
        if run.cause == "machine":
            raise TrainingFailed(f"{recipe.name} at learning rate {rate:g}: {run.reason}")
        return Screened(learning_rate=rate, loss=None)
    return Screened(learning_rate=rate, loss=run.held_out.loss)


def at_rate(recipe: Recipe, rate: float, grid: Grid) -> Recipe:
    """Return the recipe as it is screened at the learning rate `rate`."""
    tokens = grid.tokens or recipe.training.tokens
    return replace(recipe, training=replace(recipe.training, learning_rate=rate, tokens=tokens))


def best(screened: Sequence[Screened]) -> float | None:
    """Return the learning rate with the lowest held-out loss; the lowest rate breaks ties. None if all failed."""
    losses = {result.learning_rate: result.loss for result in screened if result.loss is not None}
    return min(sorted(losses), key=losses.__getitem__) if losses else None


def with_chosen(recipes: Sequence[Recipe], found: Sweep) -> list[Recipe]:
    """Return the recipes at the learning rates that the sweep chose; one that failed at every rate is unchanged."""
    rates = {recipe.name: found.chosen.get(recipe.name, recipe.training.learning_rate) for recipe in recipes}
    return [replace(r, training=replace(r.training, learning_rate=rates[r.name])) for r in recipes]
