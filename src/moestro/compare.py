"""`compare`: train recipes on an equal budget, paired by seed, and say what is more than noise."""

import datetime
import shlex
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from rich.console import Console

import moestro
from moestro.comparison import Budget, Comparison, Data, RecipeResult, Run, Sweep
from moestro.data.decontamination import overlap_notes
from moestro.data.preparation import PreparedData
from moestro.errors import Misuse, TrainingFailed
from moestro.models.counting import count_parameters
from moestro.records import write_record
from moestro.report import write_report
from moestro.statistics import MARGIN, DocumentBootstrap, check_margin, compare_with_first, document_bootstrap
from moestro.sweep import Grid, at_rate, noted_failure, sweep, with_chosen
from moestro.training.environment import environment
from moestro.training.finish import read_losses
from moestro.training.owner import owned
from moestro.training.ranks import join, on_first_rank
from moestro.training.recipe import Recipe
from moestro.training.runs import RUN, describe_run, open_run
from moestro.training.train import Options, only_on_first_rank, recorded_dtype, resolve_dtype, train

TOLERANCE = 0.02
"""Parameters count as equal within this share: routers and norms differ a little between architectures."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What will be compared, settled before anything is trained."""

    recipes: tuple[Recipe, ...]
    seeds: tuple[int, ...]
    match: Literal["tokens", "flops"]
    differences: tuple[str, ...]
    """What is not equal although it should be; empty unless the user allowed it."""
    command: str
    grid: Grid | None = None
    """What chooses each recipe's learning rate first; None: the recipes say them."""
    margin: float = MARGIN
    """Nats per token: smaller differences are not worth having."""


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
    """Match the budgets, and refuse with the number that differs what would not be a fair comparison."""
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
    """Raise Misuse unless these can be compared at all."""
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
    """The recipe with as many tokens as cost the first one's training FLOPs."""
    budget = first.training.tokens * first.training_flops()
    tokens = round(budget / recipe.training_flops())
    return replace(recipe, training=replace(recipe.training, tokens=tokens)).validate()


def unequal(recipes: Sequence[Recipe], match: str) -> list[str]:
    """One sentence for each number that must be equal and is not.

    Active parameters must agree between all recipes; total ones between those with experts (a dense model has no idle
    parameters to add).
    """
    counts = {r.name: count_parameters(r.model.config(r.training.sequence_length)) for r in recipes}
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


def compare(the_plan: Plan, data: PreparedData, folder: Path, *, console: Console, options: Options) -> Comparison:
    """Train what is not trained yet, and write `comparison.json` and `report.html`.

    Of several ranks the first one decides and writes; all return the same comparison. Raises Misuse if another process
    works in the folder.
    """
    join()
    console = only_on_first_rank(console)
    with owned(folder):
        the_plan = on_first_rank(lambda: with_one_dtype(the_plan, folder, console))
        return trained(the_plan, data, folder, console=console, options=options)


def trained(the_plan: Plan, data: PreparedData, folder: Path, *, console: Console, options: Options) -> Comparison:
    """Run the plan in a folder that is this process's own."""
    run = partial(train_or_read, the_plan=the_plan, data=data, folder=folder, console=console, options=options)
    found = None
    if the_plan.grid is not None:
        found = sweep(the_plan.recipes, the_plan.grid, run)
        if not the_plan.seeds:  # the screening runs are read once more, and all was said of them
            run = partial(run, console=Console(quiet=True))
        the_plan = screened(the_plan, the_plan.grid, found)
    runs: dict[str, list[Run]] = {recipe.name: [] for recipe in the_plan.recipes}
    for seed in the_plan.seeds:
        for recipe in the_plan.recipes:
            runs[recipe.name].append(run(recipe, seed))

    def write() -> Comparison:
        comparison = replace(assemble(the_plan, runs, data, folder), sweep=found)
        write_record(comparison, folder / "comparison.json")
        write_report(comparison, folder / "report.html")
        return comparison

    return on_first_rank(write)


def train_or_read(
    recipe: Recipe,
    seed: int,
    *,
    the_plan: Plan,
    data: PreparedData,
    folder: Path,
    console: Console,
    options: Options,
) -> Run:
    """One run of the comparison, and a line about it."""
    where = run_folder(folder, recipe, seed, the_plan)
    rate = f" at learning rate {recipe.training.learning_rate:g}" if the_plan.grid else ""
    screening = the_plan.grid is not None and seed == the_plan.grid.seed
    # Before a failure is read there: it must be this run's.
    on_first_rank(lambda: open_run(where, describe_run(recipe, data, seed)))
    try:
        with noted_failure(where) if screening else nullcontext():
            run = train(recipe, data, where, seed=seed, console=console, options=options)
    except TrainingFailed as error:
        if screening:  # which goes on
            console.print(f"{recipe.name} seed {seed}{rate}: {error}", markup=False)
        raise
    loss, speed = run.held_out.loss, run.tokens_per_second or 0
    console.print(f"{recipe.name} seed {seed}{rate}: held-out loss {loss:.4f}, {speed:,.0f} tokens/s", markup=False)
    return run


def with_one_dtype(the_plan: Plan, folder: Path, console: Console) -> Plan:
    """`dtype=auto` decided once for all recipes that have it, as an earlier start in this folder did."""
    undecided = [recipe for recipe in the_plan.recipes if recipe.training.dtype == "auto"]
    if not undecided:
        return the_plan
    earlier = [path.parent for r in undecided for path in sorted(recipe_folder(folder, r).rglob(RUN))]
    first = recorded_dtype(undecided[0], earlier[0]) if earlier else undecided[0]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = resolve_dtype(first, console, device).training.dtype
    decided = [replace(r, training=replace(r.training, dtype=dtype)) if r in undecided else r for r in the_plan.recipes]
    return replace(the_plan, recipes=tuple(decided))


def screened(the_plan: Plan, grid: Grid, found: Sweep) -> Plan:
    """The plan at the learning rates that the sweep chose; without seeds, of the screening runs themselves."""
    recipes = with_chosen(the_plan.recipes, found)
    if the_plan.seeds:
        return replace(the_plan, recipes=tuple(recipes))
    recipes = [at_rate(recipe, recipe.training.learning_rate, grid) for recipe in recipes]
    return replace(the_plan, recipes=tuple(recipes), seeds=(grid.seed,))


def run_folder(folder: Path, recipe: Recipe, seed: int, the_plan: Plan) -> Path:
    """Where a run of the comparison lives."""
    t = recipe.training
    swept = f"learning_rate={t.learning_rate:g},tokens={t.tokens}" if the_plan.grid else ""
    return recipe_folder(folder, recipe) / swept / f"seed-{seed}"


def recipe_folder(folder: Path, recipe: Recipe) -> Path:
    """Where all runs of a recipe live."""
    return folder / "".join(c if c.isalnum() or c in "+-=,._" else "_" for c in recipe.name)


def assemble(the_plan: Plan, runs: dict[str, list[Run]], data: PreparedData, folder: Path) -> Comparison:
    """The comparison's record from its runs."""
    recipes = the_plan.recipes
    losses = [[run.held_out.loss for run in runs[recipe.name]] for recipe in recipes]
    differences = [None, *(compare_with_first(losses, margin=the_plan.margin) if len(recipes) > 1 else ())]
    results = []
    for recipe, difference in zip(recipes, differences, strict=True):
        config = recipe.model.config(recipe.training.sequence_length)
        count = count_parameters(config)
        results.append(
            RecipeResult(
                name=recipe.name,
                description=recipe.description,
                total_parameters=count.total,
                active_parameters=count.active,
                flops_per_token=float(recipe.training_flops()),
                competes=recipe.compete is not None,
                runs=tuple(runs[recipe.name]),
                difference=difference,
                document_bootstrap=None if difference is None else bootstrap(folder, recipe, the_plan),  # pyright: ignore[reportGeneralTypeIssues]
            )
        )
    return Comparison(
        version=moestro.__version__,
        created=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        command=the_plan.command,
        budget=budget(the_plan, results),
        data=describe_data(data),
        gzip_bits_per_byte=data.gzip_bits_per_byte["all"],
        gzip_domains={name: bits for name, bits in data.gzip_bits_per_byte.items() if name != "all"},
        environment=environment(),
        seeds=the_plan.seeds,
        recipes=tuple(results),
    )


def budget(the_plan: Plan, results: Sequence[RecipeResult]) -> Budget:
    """What every recipe was given, by what its runs were really trained on."""
    training = the_plan.recipes[0].training
    differences = (*the_plan.differences, *unequally_trained(the_plan, results))
    tokens = results[0].runs[0].trained_tokens
    return Budget(
        match=the_plan.match,
        tokens=training.steps * training.batch_tokens if tokens is None else tokens,
        steps=results[0].runs[0].steps or training.steps,
        batch_tokens=training.batch_tokens,
        sequence_length=training.sequence_length,
        dtype=training.dtype,
        parameters=results[0].active_parameters,
        equal=not differences,
        differences=differences,
    )


def unequally_trained(the_plan: Plan, results: Sequence[RecipeResult]) -> list[str]:
    """A sentence if runs were trained on other shares of what was planned for them; nothing if the shares are one."""
    shares = {
        f"{result.name} seed {run.seed}": (run.trained_tokens, recipe.training.steps * recipe.training.batch_tokens)
        for recipe, result in zip(the_plan.recipes, results, strict=True)
        for run in result.runs
    }
    known = {name: tokens / planned for name, (tokens, planned) in shares.items() if tokens is not None}
    if not known or min(known.values()) == max(known.values()):
        return []
    low, high = min(known, key=known.__getitem__), max(known, key=known.__getitem__)
    said = (f"{name} was trained on {shares[name][0]:,} of {shares[name][1]:,} tokens" for name in (low, high))
    return [f"runs differ in what they were trained on: {', '.join(said)}"]


def bootstrap(folder: Path, recipe: Recipe, the_plan: Plan) -> DocumentBootstrap:
    """Resample the held-out documents, losses averaged over seeds."""
    arms = (recipe, the_plan.recipes[0])
    pairs = [[read_losses(run_folder(folder, r, s, the_plan)) for s in the_plan.seeds] for r in arms]
    tokens = pairs[0][0][1]
    a, b = (np.mean([nll for nll, _ in runs], axis=0)[tokens > 0] for runs in pairs)
    return document_bootstrap(a, b, tokens[tokens > 0])


def describe_data(data: PreparedData) -> Data:
    """The data's record, with what the reader must know of it."""
    domains = data.description["domains"]
    held = [domain["held_out"] for domain in domains.values()]
    missing = data.description["missing_domains"]
    missing_notes = [f"the domain {name} is missing on this machine" for name in missing]
    return Data(
        sources=tuple(data.description["sources"]),
        hash=data.hash,
        tokenizer=f"{data.description['tokenizer']['name']}, {data.description['tokenizer']['vocabulary']} tokens",
        train_tokens=sum(domain["train"]["tokens"] for domain in domains.values()),
        held_out_tokens=sum(domain["tokens"] for domain in held),
        held_out_bytes=sum(domain["bytes"] for domain in held),
        held_out_documents=sum(domain["documents"] for domain in held),
        overlap=data.description["overlap"],
        notes=(*missing_notes, *overlap_notes(data.description)),
    )
