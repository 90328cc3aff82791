"""What routers and experts learnt, recipe by recipe: the measures of their routing on the held-out text."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moestro.comparison import Comparison, LayerStatistics, RecipeResult, Run
from moestro.report.measures import Measure, measures
from moestro.report.numbers import fixed, mean, signed

Numbers = Mapping[str, float | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Learnt:
    """One measure, a cell per recipe with experts: the mean over layers and seeds, its spread over seeds."""

    measure: Measure
    cells: tuple[str, ...]
    spreads: tuple[str, ...]
    chances: tuple[str, ...]
    """What chance alone would give; empty where that is not known."""
    differences: tuple[str, ...]
    """To the first of them."""


def learnt_rows(comparison: Comparison) -> tuple[Learnt, ...]:
    """The measures of all recipes with experts; of competition only where a recipe has it."""
    sparse = with_experts(comparison)
    competes = any(recipe.competes for recipe in sparse)
    numbers = [[run_numbers(run, competes) for run in recipe.runs] for recipe in sparse]
    everything = [layer for runs in numbers for layers in runs for layer in layers]
    return tuple(learnt(measure, numbers) for measure in measures(everything))


def with_experts(comparison: Comparison) -> list[RecipeResult]:
    """The recipes that have any."""
    return [recipe for recipe in comparison.recipes if all(run.layers for run in recipe.runs)]


def learnt(measure: Measure, numbers: Sequence[Sequence[Sequence[Numbers]]]) -> Learnt:
    """One measure of the layers of each run of each recipe."""
    by_seed = [[over_layers(layers, measure.field, measure) for layers in runs] for runs in numbers]
    means = [mean(values) for values in by_seed]
    chance = [mean([over_layers(layers, measure.chance, measure) for layers in runs]) for runs in numbers]
    return Learnt(
        measure=measure,
        cells=tuple(fixed(value, measure.decimals) for value in means),
        spreads=tuple(spread(values, measure.decimals) for values in by_seed),
        chances=tuple("" if value is None else fixed(value, measure.decimals) for value in chance),
        differences=tuple(
            signed(value - means[0], measure.decimals) if index and value is not None and means[0] is not None else ""
            for index, value in enumerate(means)
        ),
    )


def over_layers(layers: Sequence[Numbers], name: str | None, measure: Measure) -> float | None:
    """The mean (or sum) over layers of one of their numbers; None where no layer has it."""
    values = [value for layer in layers if name and (value := layer.get(name)) is not None]
    return sum(values) if measure.summed and values else mean(values)


def spread(values: Sequence[float | None], decimals: int) -> str:
    """The standard deviation over seeds."""
    known = [value for value in values if value is not None]
    return f"± {fixed(statistics.stdev(known), decimals)}" if len(known) > 1 else ""


def run_numbers(run: Run, competes: bool) -> list[dict[str, float | None]]:
    """The numbers of every layer of a run, and in one more entry what is of the run as a whole."""
    layers = [layer_numbers(layer, competes) for layer in run.layers]
    gain = None if run.competed is None else run.competed.competition - run.competed.router
    return [*layers, {"competed": gain}] if competes else layers


def layer_numbers(layer: LayerStatistics, competes: bool) -> dict[str, float | None]:
    """One layer's numbers by the names of their measures."""
    numbers: dict[str, float | None] = {
        "max_vio_batch": layer.max_vio_batch,
        "entropy": layer.entropy,
        "mutual_information": layer.mutual_information,
        "domain_mutual_information": layer.domain_mutual_information,
        "domain_mutual_information_shuffled": layer.domain_mutual_information_shuffled,
        "column_variance": layer.column_variance,
        "cosine": layer.cosine,
        "overlap": layer.overlap,
        "overlap_shuffled": layer.overlap_shuffled,
    }
    if (composed := layer.composed) is not None:
        numbers |= {
            "pair_information": composed.mutual_information,
            "pair_information_shuffled": composed.mutual_information_shuffled,
            "composed": composed.size,
            "rerouted": composed.rerouted,
        }
    if competes and (found := layer.competition) is not None:
        numbers |= {
            "agreement": found.agreement,
            "agreement_shuffled": found.static_agreement,
            "regret": found.regret,
            "target_entropy": found.target_entropy,
            "winners_max_vio": found.winners_max_vio,
            "response": found.response,
        }
    return numbers
