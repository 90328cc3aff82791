"""`compare`: train recipes on an equal budget, paired by seed, and test their differences."""

import datetime
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

import moestro
from moestro.architecture.counting import count_parameters
from moestro.attempts import Attempt
from moestro.comparison import Budget, Comparison, Data, FailedRun, RecipeResult, Run, Sweep
from moestro.data.building import ALL
from moestro.data.decontamination import overlap_notes
from moestro.data.preparation import PreparedData
from moestro.difference import DocumentBootstrap
from moestro.jobs.choice import Jobs
from moestro.jobs.workers import make_all
from moestro.planning import Plan, recipe_folder, run_folder
from moestro.records import write_record
from moestro.report.html import write_report
from moestro.statistics import compare_with_first, document_bootstrap
from moestro.sweep import Grid, at_rate, sweep, with_chosen
from moestro.training.environment import environment
from moestro.training.finish import read_losses
from moestro.training.owner import owned
from moestro.training.ranks import join, on_first_rank
from moestro.training.recipe import Recipe
from moestro.training.runs import RUN
from moestro.training.train import Options, only_on_first_rank, recorded_dtype, resolve_dtype

ONE_JOB = Jobs()


def compare(
    the_plan: Plan, data: PreparedData, folder: Path, *, console: Console, options: Options, jobs: Jobs = ONE_JOB
) -> Comparison:
    """Train the runs that are not finished yet, compare them, and write `comparison.json` and `report.html`.

    A run that fails does not end the comparison: the others go on, and the record says which failed and why. `jobs`
    says how many runs train at once; results do not depend on their number.

    With several ranks the first one decides and writes; all return the same comparison.

    Raises:
        Misuse: another process uses the folder, or it holds other runs.
        TrainingFailed: the machine stopped a run of the sweep.
        Interrupted: the user asked to stop.
    """
    join()
    console = only_on_first_rank(console)
    with owned(folder):
        the_plan = on_first_rank(lambda: with_one_dtype(the_plan, folder, console))
        return trained(the_plan, data, folder, partial(make_all, jobs=jobs, options=options), console)


def trained(
    the_plan: Plan,
    data: PreparedData,
    folder: Path,
    make: Callable[..., list[Run | FailedRun]],
    console: Console,
) -> Comparison:
    """Run the sweep if the plan has one, then the comparison, in a folder that this process has locked."""
    found = None
    if the_plan.grid is not None:
        found = sweep(
            the_plan.recipes,
            the_plan.grid,
            lambda arms, seed: make([attempt(arm, seed, the_plan, folder) for arm in arms], data, console=console),
        )
        if not the_plan.seeds:  # they were all printed in the sweep, and are only read again
            console = Console(quiet=True)
        the_plan = after_sweep(the_plan, the_plan.grid, found)
    failed = [r.name for r in the_plan.recipes if found is not None and r.name not in found.chosen]
    attempts = [attempt(r, seed, the_plan, folder) for seed in the_plan.seeds for r in the_plan.recipes]
    results = iter(make([a for a in attempts if a.recipe.name not in failed], data, console=console))
    runs: dict[str, list[Run | FailedRun]] = {recipe.name: [] for recipe in the_plan.recipes}
    for a in attempts:
        reason = "every learning rate of the sweep failed"
        runs[a.recipe.name].append(FailedRun(seed=a.seed, reason=reason) if a.recipe.name in failed else next(results))

    def write() -> Comparison:
        comparison = replace(assemble(the_plan, runs, data, folder), sweep=found)
        write_record(comparison, folder / "comparison.json")
        write_report(comparison, folder / "report.html")
        return comparison

    return on_first_rank(write)


def attempt(recipe: Recipe, seed: int, the_plan: Plan, folder: Path) -> Attempt:
    """Return one run of the comparison as an attempt: with its folder and its name in messages."""
    rate = f" at learning rate {recipe.training.learning_rate:g}" if the_plan.grid else ""
    title = f"{recipe.name} seed {seed}{rate}"
    return Attempt(recipe=recipe, seed=seed, folder=run_folder(folder, recipe, seed, the_plan), title=title)


def with_one_dtype(the_plan: Plan, folder: Path, console: Console) -> Plan:
    """Return the plan with one dtype in place of every `auto`: that of an earlier start here, else the faster one."""
    undecided = [recipe for recipe in the_plan.recipes if recipe.training.dtype == "auto"]
    if not undecided:
        return the_plan
    earlier = [path.parent for r in undecided for path in sorted(recipe_folder(folder, r).rglob(RUN))]
    first = recorded_dtype(undecided[0], earlier[0]) if earlier else undecided[0]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = resolve_dtype(first, console, device).training.dtype
    decided = [replace(r, training=replace(r.training, dtype=dtype)) if r in undecided else r for r in the_plan.recipes]
    return replace(the_plan, recipes=tuple(decided))


def after_sweep(the_plan: Plan, grid: Grid, found: Sweep) -> Plan:
    """Return the plan at the learning rates that the sweep chose.

    A plan without seeds trains nothing more: it then compares each recipe's best screening run.
    """
    recipes = with_chosen(the_plan.recipes, found)
    if the_plan.seeds:
        return replace(the_plan, recipes=tuple(recipes))
    recipes = [at_rate(recipe, recipe.training.learning_rate, grid) for recipe in recipes]
    return replace(the_plan, recipes=tuple(recipes), seeds=(grid.seed,))


def assemble(the_plan: Plan, runs: dict[str, list[Run | FailedRun]], data: PreparedData, folder: Path) -> Comparison:
    """Return the record of the comparison: its runs, their differences and their budget."""
    recipes = the_plan.recipes
    losses = [[run.held_out.loss if isinstance(run, Run) else None for run in runs[r.name]] for r in recipes]
    differences = [None, *(compare_with_first(losses, margin=the_plan.margin) if len(recipes) > 1 else ())]
    results = []
    for recipe, difference in zip(recipes, differences, strict=True):
        count = count_parameters(recipe.model.architecture)
        results.append(
            RecipeResult(
                name=recipe.name,
                description=recipe.description,
                total_parameters=count.total,
                active_parameters=count.active,
                flops_per_token=float(recipe.training_flops()),
                competes=recipe.compete is not None,
                runs=tuple(run for run in runs[recipe.name] if isinstance(run, Run)),
                failed=tuple(run for run in runs[recipe.name] if isinstance(run, FailedRun)),
                difference=difference,
            )
        )
    results = [replace(r, document_bootstrap=bootstrap(folder, the_plan, results[0], r)) for r in results]
    return Comparison(
        version=moestro.__version__,
        created=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        command=the_plan.command,
        budget=budget(the_plan, results),
        data=describe_data(data),
        gzip_bits_per_byte=data.gzip_bits_per_byte[ALL],
        gzip_domains={name: bits for name, bits in data.gzip_bits_per_byte.items() if name != ALL},
        environment=environment(),
        seeds=the_plan.seeds,
        recipes=tuple(results),
    )


def budget(the_plan: Plan, results: Sequence[RecipeResult]) -> Budget:
    """Return the budget. Its tokens and steps are those of the first recipe's first finished run, or as planned."""
    training = the_plan.recipes[0].training
    differences = (*the_plan.differences, *unequally_trained(the_plan, results))
    tokens, steps = training.steps * training.batch_tokens, training.steps
    if results[0].runs:
        trained = results[0].runs[0]
        tokens, steps = tokens if trained.trained_tokens is None else trained.trained_tokens, trained.steps or steps
    return Budget(
        match=the_plan.match,
        tokens=tokens,
        steps=steps,
        batch_tokens=training.batch_tokens,
        sequence_length=training.sequence_length,
        dtype=training.dtype,
        parameters=results[0].active_parameters,
        equal=not differences,
        differences=differences,
    )


def unequally_trained(the_plan: Plan, results: Sequence[RecipeResult]) -> list[str]:
    """Return a sentence if runs completed different shares of their planned tokens; empty if the shares agree."""
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


def bootstrap(folder: Path, the_plan: Plan, first: RecipeResult, result: RecipeResult) -> DocumentBootstrap | None:
    """Resample the held-out documents, with losses averaged over the seeds that both recipes finished.

    Return None if there is no difference: for the first recipe, or if no seed finished with both.
    """
    if result.difference is None:
        return None
    both = {run.seed for run in first.runs} & {run.seed for run in result.runs}
    arms = [recipe for name in (result.name, first.name) for recipe in the_plan.recipes if recipe.name == name]
    pairs = [[read_losses(run_folder(folder, r, seed, the_plan)) for seed in sorted(both)] for r in arms]
    tokens = pairs[0][0][1]
    a, b = (np.mean([nll for nll, _ in runs], axis=0)[tokens > 0] for runs in pairs)
    return document_bootstrap(a, b, tokens[tokens > 0])


def describe_data(data: PreparedData) -> Data:
    """Return the record of the data, with notes on missing domains and on overlap with training text."""
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
