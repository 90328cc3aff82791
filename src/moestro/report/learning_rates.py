"""The learning-rate sweep, as a table of recipes by rates and as a figure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from moestro.comparison import Comparison, Screened, Sweep
from moestro.report.curves import Curve, Figure, frame, padded, traces
from moestro.report.numbers import ABSENT, fixed, signed

FAILED = "failed"
_BEST_SIZE, _SIZE = 11, 5


@dataclass(frozen=True, slots=True, kw_only=True)
class RateCell:
    """One recipe at one learning rate."""

    loss: str
    difference: str
    """To the recipe's best; empty there, and where there is no loss."""
    best: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class RateTable:
    """Learning rates from the lowest to the highest, and per recipe a cell for each."""

    rates: tuple[str, ...]
    rows: tuple[tuple[RateCell, ...], ...]


def rate_table(comparison: Comparison) -> RateTable | None:
    """What every recipe reached, in the comparison's order; None where there was no sweep."""
    found = comparison.sweep
    if found is None:
        return None
    rates = all_rates(found)
    names = [recipe.name for recipe in comparison.recipes]
    return RateTable(
        rates=tuple(f"{rate:g}" for rate in rates),
        rows=tuple(_cells(found.screened[name], found.chosen.get(name), rates) for name in names),
    )


def rate_figure(comparison: Comparison) -> Figure | None:
    """Return loss against learning rate, one line per recipe with its best marked; None without two finished rates."""
    found = comparison.sweep
    if found is None or len(rates := all_rates(found)) < 2:
        return None
    layout, data, shown = _layout(rates), [], []
    for index, recipe in enumerate(comparison.recipes):
        if (best := found.chosen.get(recipe.name)) is None:
            continue
        points = _finished(found.screened[recipe.name])
        for trace in traces(recipe.name, index, [points], markers=True):
            sizes = [_BEST_SIZE if rate == best else _SIZE for rate, _ in points]
            trace["marker"] |= {"size": sizes, "opacity": 1, "line": {"width": 0}}
            data.append(trace)
        at = [rate for rate, _ in points].index(best)
        shown += [loss for _, loss in points[max(0, at - 1) : at + 2]]
    layout["yaxis"]["range"] = padded(shown)
    return {"data": data, "layout": layout} if data else None


def all_rates(found: Sweep) -> list[float]:
    """Every learning rate that was tried, ascending."""
    return sorted({result.learning_rate for results in found.screened.values() for result in results})


def _layout(rates: Sequence[float]) -> Figure:
    """A logarithmic axis that is marked at the rates."""
    layout = frame(height=300)
    low, high = math.log10(rates[0]), math.log10(rates[-1])
    margin = 0.06 * (high - low)
    layout |= {"hovermode": "x unified", "hoverdistance": -1}  # points are far apart: the nearest one, however far
    layout["xaxis"] |= {"type": "log", "range": [low - margin, high + margin], "showgrid": False, "hoverformat": "~g"}
    layout["xaxis"] |= {"tickvals": list(rates), "ticktext": [f"{rate:g}" for rate in rates]}
    layout["xaxis"] |= {"title": {"text": "learning rate", "standoff": 8, "font": {"size": 12}}}
    layout["xaxis"] |= {"spikecolor": "--axis", "spikethickness": 1, "spikedash": "solid"}
    layout["yaxis"] |= {"showline": False}
    return layout


def _finished(results: Sequence[Screened]) -> Curve:
    return sorted((result.learning_rate, result.loss) for result in results if result.loss is not None)


def _cells(results: Sequence[Screened], best: float | None, rates: Sequence[float]) -> tuple[RateCell, ...]:
    losses = {result.learning_rate: result.loss for result in results}
    return tuple(_cell(losses, best, rate) for rate in rates)


def _cell(losses: dict[float, float | None], best: float | None, rate: float) -> RateCell:
    loss, least = losses.get(rate), None if best is None else losses[best]
    if loss is None or least is None:
        return RateCell(loss=FAILED if rate in losses else ABSENT, difference="", best=False)
    return RateCell(loss=fixed(loss), difference="" if rate == best else signed(loss - least), best=rate == best)
