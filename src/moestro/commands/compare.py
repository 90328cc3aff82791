"""`moestro compare`."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from moestro.commands.folders import slug
from moestro.difference import MARGIN
from moestro.flags import DataFlags, JobFlags, RecipeFlags, RunFlags, SweepFlags
from moestro.gate.ranges import Positive, Range, Seed, check
from moestro.listing import print_plan
from moestro.planning import plan

SWEEP_FLAGS, RECIPE_FLAGS, DATA_FLAGS = SweepFlags(), RecipeFlags(), DataFlags()
JOB_FLAGS, RUN_FLAGS = JobFlags(), RunFlags()


def compare(
    recipes: tyro.conf.Positional[tuple[str, ...]] = ("dense", "smoe", "fine-grained"),
    /,
    seeds: int = 3,
    first_seed: int = 0,
    match: Literal["tokens", "flops"] = "tokens",
    allow_unequal: bool = False,
    margin: float = MARGIN,
    verbose: bool = False,
    sweep_flags: Annotated[SweepFlags, tyro.conf.arg(name="")] = SWEEP_FLAGS,
    recipe_flags: Annotated[RecipeFlags, tyro.conf.arg(name="")] = RECIPE_FLAGS,
    data_flags: Annotated[DataFlags, tyro.conf.arg(name="")] = DATA_FLAGS,
    job_flags: Annotated[JobFlags, tyro.conf.arg(name="")] = JOB_FLAGS,
    run_flags: Annotated[RunFlags, tyro.conf.arg(name="")] = RUN_FLAGS,
) -> None:
    """Train recipes on an equal budget, paired by seed; print the table, write comparison.json and report.html.

    Args:
        recipes: Recipes, as `moestro recipes` lists them, also as NAME+VARIANT and NAME:FIELD=VALUE,...; the others
            are compared with the first.
        seeds: Number of seeds; three or more give an interval. 0 with --sweep: only the sweep runs.
        first_seed: First random seed; the others follow it.
        match: Budget that all recipes share: training tokens or training FLOPs.
        allow_unequal: Compare recipes although their budgets differ, and mark the table.
        margin: Equivalence margin in nats per token: recipes shown to differ by less are called equivalent.
        verbose: Print all that the report shows: every figure, losses by domain, and the rule of the verdicts.
    """
    check("margin", margin, Positive)
    chosen = [recipe_flags.recipe(spec) for spec in recipes]
    the_plan = plan(
        chosen,
        seeds=counted(first_seed, seeds),
        match=match,
        allow_unequal=allow_unequal,
        command=["moestro", *sys.argv[1:]],
        grid=sweep_flags.grid(recipes, recipe_flags),
        margin=margin,
    )
    if run_flags.dry_run:
        print_plan(the_plan)
        return
    folder = run_flags.out or Path("runs") / f"compare-{slug(recipes)}-{chosen[0].size}"
    from moestro.commands.work.compare import compare_recipes, print_commands

    if job_flags.print_commands:
        print_commands(the_plan, folder, recipe_flags, data_flags, run_flags)
        return
    compare_recipes(the_plan, folder, data_flags=data_flags, job_flags=job_flags, run_flags=run_flags, verbose=verbose)


def counted(first_seed: int, seeds: int) -> range:
    """Return `seeds` seeds from `first_seed` on. Raise Misuse if there are too many or one is out of range."""
    check("seeds", seeds, Annotated[int, Range(at_least=0, at_most=1_000)])
    check("first_seed", first_seed, Seed)
    check("first_seed and the seeds after it", first_seed + max(seeds, 1) - 1, Seed)
    return range(first_seed, first_seed + seeds)
