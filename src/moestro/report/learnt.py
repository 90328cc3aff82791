"""What routers and experts learnt, recipe by recipe: the measures of their routing on the held-out text."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moestro.comparison import Comparison, Run
from moestro.report.heatmaps import moe_recipes
from moestro.report.measures import CHANCE, Measure, measures, over_layers
from moestro.report.numbers import fixed, mean, signed

Numbers = Mapping[str, float | None]

OF_ROUTING = (
    "max_vio_batch",
    "entropy",
    "mutual_information",
    "domain_mutual_information",
    "column_variance",
    "cosine",
    "overlap",
    "pair_information",
    "composed",
    "rerouted",
)
OF_COMPETITION = (
    "agreement",
    "corrected_agreement",
    "regret",
    "target_entropy",
    "spread",
    "winners_max_vio",
    "response",
)
"""Shown where experts competed in any recipe."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One measure of one recipe, in words; empty where there is nothing to say."""

    value: str
    """Mean over layers and seeds."""
    spread: str
    """Over seeds."""
    chance: str
    """What chance alone would give."""
    difference: str
    """To the first recipe with experts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Learnt:
    """One measure, a cell per recipe with experts."""

    measure: Measure
    cells: tuple[Cell, ...]


def learnt_rows(comparison: Comparison) -> tuple[Learnt, ...]:
    """The measures of all recipes with experts."""
    sparse = [comparison.recipes[index] for index, _ in moe_recipes(comparison)]
    competes = any(recipe.competes for recipe in sparse)
    numbers = [[run_numbers(run, competes) for run in recipe.runs] for recipe in sparse]
    everything = [layer for runs in numbers for layers in runs for layer in layers]
    return tuple(
        Learnt(measure=measure, cells=tuple(cell(measure, runs, numbers[0]) for runs in numbers))
        for measure in measures(everything)
    )


def cell(measure: Measure, runs: Sequence[Sequence[Numbers]], first: Sequence[Sequence[Numbers]]) -> Cell:
    """One measure of the layers of each run of a recipe, beside those of the first recipe."""

    def by_seed(runs: Sequence[Sequence[Numbers]], field: str | None) -> list[float | None]:
        return [over_layers(layers, field, summed=measure.summed) for layers in runs]

    values, decimals = by_seed(runs, measure.field), measure.decimals
    known = [value for value in values if value is not None]
    value, base, chance = mean(values), mean(by_seed(first, measure.field)), mean(by_seed(runs, measure.chance))
    apart = runs is not first and value is not None and base is not None
    return Cell(
        value=fixed(value, decimals),
        spread=f"± {fixed(statistics.stdev(known), decimals)}" if len(known) > 1 else "",
        chance="" if chance is None else fixed(chance, decimals),
        difference=signed(value - base, decimals) if apart else "",  # type: ignore[operator]
    )


def run_numbers(run: Run, competes: bool) -> list[Numbers]:
    """The numbers of every layer of a run, and in one more entry what is of the run as a whole."""
    shown = {*OF_ROUTING, *(OF_COMPETITION if competes else ())}
    layers: list[Numbers] = [
        {n: value for n, value in layer.figures.items() if n.removesuffix(CHANCE) in shown} for layer in run.layers
    ]
    return [*layers, {"competed": run.competed and run.competed.gain}] if competes else layers
