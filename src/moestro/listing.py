"""Recipes, variants and what they cost, in the terminal: known before anything is built."""

import inspect
from collections.abc import Mapping, Sequence

import rich.box
from rich.console import Console
from rich.table import Table

from moestro.planning import Plan
from moestro.report.numbers import metric
from moestro.report.printing import line, text
from moestro.sweep import at_rate
from moestro.training.estimate import Estimate, estimates
from moestro.training.recipe import Recipe
from moestro.training.recipes import VARIANTS


def print_recipes(recipes: Sequence[Recipe]) -> None:
    """All recipes and variants, and how to type them."""
    print_costs(estimates(recipes), "1 run")
    console = Console()
    console.print()
    line(console, "Variants, typed after a recipe as in cartesian+parallel or dense+halved:", "bold")
    print_words(console, {name: (inspect.getdoc(make) or "").splitlines()[0] for name, make in VARIANTS.items()})
    line(console, "Fields come after a colon, as in smoe:top_k=4 or cartesian+parallel:learning_rate=1e-3.")


def print_plan(the_plan: Plan) -> None:
    """What a comparison costs, its sweep included."""
    recipes, seeds, grid = the_plan.recipes, len(the_plan.seeds), the_plan.grid
    if grid is None:
        print_costs(estimates(recipes, runs=seeds), counted(seeds))
        return
    as_screened, rates = [at_rate(r, grid.learning_rates[0], grid) for r in recipes], len(grid.learning_rates)
    if not seeds:
        print_costs(estimates(as_screened, runs=rates), counted(rates))
        return
    share = as_screened[0].training.tokens / recipes[0].training.tokens
    tokens = f" on {grid.tokens:,} tokens" if grid.tokens else ""
    print_costs(estimates(recipes, runs=seeds + rates * share), f"{counted(seeds)} after a sweep of {rates}{tokens}")


def print_costs(rows: Sequence[Estimate], runs: str) -> None:
    """One row per recipe; `runs` says what the time is of."""
    first, console = rows[0], Console()
    line(console, f"size {first.size}, {first.tokens:,} tokens per run, sequences of {first.sequence_length}", "bold")
    table = Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("recipe", overflow="fold")
    for title in ("parameters", "active", "FLOPs", "memory", "time"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        parameters, memory = (f"{row.parameters:,}", f"{row.active_parameters:,}"), f"{row.memory_bytes / 1e9:,.1f} GB"
        table.add_row(text(console, row.name), *parameters, metric(row.training_flops), memory, row.duration)
    console.print(table)
    print_words(console, {row.name: row.description for row in rows})
    line(
        console,
        "FLOPs are per token of training, forward and backward, averaged over the run, with the answers of competing "
        "experts. Memory counts weights, gradients and AdamW in fp32, "
        f"and an estimate of the activations. Time is what {runs} would take at the full speed of this machine's "
        f"{first.dtype} matrix products, {first.device_flops / 1e9:,.0f} GFLOP/s measured now: expect more.",
        "dim",
    )


def print_words(console: Console, words: Mapping[str, str]) -> None:
    """Names, and beside them what they are."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(overflow="fold", ratio=1)
    table.add_column(ratio=4)
    for name, what in words.items():
        table.add_row(text(console, name), text(console, what))
    console.print(table)
    console.print()


def counted(runs: int) -> str:
    """A number of runs in words."""
    return f"{runs} run{'' if runs == 1 else 's'}"
