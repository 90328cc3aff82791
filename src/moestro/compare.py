"""`compare`: train recipes on an equal budget, paired by seed, and say what is more than noise."""

import datetime
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from rich.console import Console

import moestro
from moestro.comparison import Budget, Comparison, Data, RecipeResult, Run
from moestro.data.preparation import PreparedData
from moestro.errors import Misuse
from moestro.models.counting import count_parameters, training_flops_per_token
from moestro.records import write_record
from moestro.report import write_report
from moestro.statistics import DocumentBootstrap, compare_with_first, document_bootstrap
from moestro.training.recipes import Recipe
from moestro.training.runs import environment
from moestro.training.train import Options, recorded_dtype, resolve_dtype, train

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


def plan(
    recipes: Sequence[Recipe],
    *,
    seeds: Sequence[int],
    match: Literal["tokens", "flops"] = "tokens",
    allow_unequal: bool = False,
    command: Sequence[str] = (),
) -> Plan:
    """Match the budgets, and refuse with the number that differs what would not be a fair comparison."""
    names = [recipe.name for recipe in recipes]
    if not recipes:
        raise Misuse("compare needs at least one recipe")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise Misuse(f"every recipe must be named once, got {twice!r} {names.count(twice)} times")
    if not seeds:
        raise Misuse("seeds must be at least 1, got 0")
    if match == "flops":
        recipes = [with_flops_of(recipes[0], recipe) for recipe in recipes]
    differences = tuple(unequal(recipes, match))
    if differences and not allow_unequal:
        raise Misuse(f"budgets must be equal: {differences[0]}; change the recipe, or say --allow-unequal")
    return Plan(
        recipes=tuple(recipes), seeds=tuple(seeds), match=match, differences=differences, command=shlex.join(command)
    )


def with_flops_of(first: Recipe, recipe: Recipe) -> Recipe:
    """The recipe with as many tokens as cost the first one's training FLOPs."""
    budget = first.training.tokens * training_flops(first)
    tokens = round(budget / training_flops(recipe))
    return replace(recipe, training=replace(recipe.training, tokens=tokens)).validate()


def training_flops(recipe: Recipe) -> int:
    """Training FLOPs per token at the recipe's sequence length."""
    length = recipe.training.sequence_length
    return training_flops_per_token(recipe.model.config(length), length)


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
    """Train what is not trained yet, and write `comparison.json` and `report.html`."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    first = recorded_dtype(the_plan.recipes[0], run_folder(folder, the_plan.recipes[0], the_plan.seeds[0]))
    first = resolve_dtype(first, console, device)
    dtype = first.training.dtype
    recipes = [replace(r, training=replace(r.training, dtype=dtype)) for r in the_plan.recipes]
    runs: dict[str, list[Run]] = {recipe.name: [] for recipe in recipes}
    for seed in the_plan.seeds:
        for recipe in recipes:
            run = train(recipe, data, run_folder(folder, recipe, seed), seed=seed, console=console, options=options)
            runs[recipe.name].append(run)
            loss, speed = run.held_out.loss, run.tokens_per_second or 0
            console.print(f"{recipe.name} seed {seed}: held-out loss {loss:.4f}, {speed:,.0f} tokens/s", markup=False)
    comparison = assemble(replace(the_plan, recipes=tuple(recipes)), runs, data, folder)
    write_record(comparison, folder / "comparison.json")
    write_report(comparison, folder / "report.html")
    return comparison


def run_folder(folder: Path, recipe: Recipe, seed: int) -> Path:
    """Where a run of the comparison lives."""
    safe = "".join(c if c.isalnum() or c in "+-=,._" else "_" for c in recipe.name)
    return folder / safe / f"seed-{seed}"


def assemble(the_plan: Plan, runs: dict[str, list[Run]], data: PreparedData, folder: Path) -> Comparison:
    """The comparison's record from its runs."""
    recipes, seeds = the_plan.recipes, the_plan.seeds
    losses = [[run.held_out.loss for run in runs[recipe.name]] for recipe in recipes]
    differences = [None, *(compare_with_first(losses) if len(recipes) > 1 else ())]
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
                flops_per_token=float(training_flops(recipe)),
                runs=tuple(runs[recipe.name]),
                difference=difference,
                document_bootstrap=None if difference is None else bootstrap(folder, recipe, recipes[0], seeds),  # pyright: ignore[reportGeneralTypeIssues]
            )
        )
    return Comparison(
        version=moestro.__version__,
        created=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        command=the_plan.command,
        budget=budget(the_plan, results[0]),
        data=describe_data(data),
        gzip_bits_per_byte=data.gzip_bits_per_byte["all"],
        gzip_domains={name: bits for name, bits in data.gzip_bits_per_byte.items() if name != "all"},
        environment=environment(),
        seeds=seeds,
        recipes=tuple(results),
    )


def budget(the_plan: Plan, first: RecipeResult) -> Budget:
    """What every recipe was given."""
    training = the_plan.recipes[0].training
    return Budget(
        match=the_plan.match,
        tokens=training.steps * training.batch_tokens,
        steps=training.steps,
        batch_tokens=training.batch_tokens,
        sequence_length=training.sequence_length,
        dtype=training.dtype,
        parameters=first.active_parameters,
        equal=not the_plan.differences,
        differences=the_plan.differences,
    )


def bootstrap(folder: Path, recipe: Recipe, first: Recipe, seeds: Sequence[int]) -> DocumentBootstrap:
    """Resample the held-out documents, losses averaged over seeds."""
    pairs = [[np.load(run_folder(folder, r, s) / "held_out.npz") for s in seeds] for r in (recipe, first)]
    tokens = pairs[0][0]["tokens"]
    a, b = (np.mean([run["nll"] for run in runs], axis=0)[tokens > 0] for runs in pairs)
    return document_bootstrap(a, b, tokens[tokens > 0])


def describe_data(data: PreparedData) -> Data:
    """The data's record, with what the reader must know of it."""
    domains = data.description["domains"]
    held = [domain["held_out"] for domain in domains.values()]
    missing = data.description["missing_domains"]
    return Data(
        sources=tuple(data.description["sources"]),
        hash=data.hash,
        tokenizer=f"{data.description['tokenizer']['name']}, {data.description['tokenizer']['vocabulary']} tokens",
        train_tokens=sum(domain["train"]["tokens"] for domain in domains.values()),
        held_out_tokens=sum(domain["tokens"] for domain in held),
        held_out_bytes=sum(domain["bytes"] for domain in held),
        held_out_documents=sum(domain["documents"] for domain in held),
        notes=tuple(f"the domain {name} is missing on this machine" for name in missing),
    )
