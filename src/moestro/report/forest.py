"""The forest plot of paired differences: positions in per cent of its width, to be drawn at any size."""

import math
from dataclasses import dataclass

from moestro.comparison import Comparison
from moestro.difference import Difference
from moestro.report.numbers import decimals_for, signed


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One recipe's difference: its mean, seeds, interval, and the band of the equivalence margin."""

    mean: float
    seeds: tuple[float, ...]
    interval: tuple[float, float] | None  # left end and width
    margin: tuple[float, float] | None  # left end and width of the margin around zero, cut at the edges


@dataclass(frozen=True, slots=True, kw_only=True)
class Forest:
    """A bar per recipe (None for the first), on one scale with zero in the middle."""

    bars: tuple[Bar | None, ...]
    ticks: tuple[tuple[float, str], ...]
    has_interval: bool
    margin: str  # the margin as text, empty without one


def forest(comparison: Comparison) -> Forest:
    """The paired differences of all recipes on one scale."""
    found = [recipe.difference for recipe in comparison.recipes]
    tick = _tick(max((_reach(d) for d in found if d is not None), default=0.0) or 0.001)
    edge = 2.25 * tick
    decimals = decimals_for(tick)
    return Forest(
        bars=tuple(None if d is None else _bar(d, edge) for d in found),
        ticks=tuple((_position(i * tick, edge), signed(i * tick, decimals)) for i in range(-2, 3)),
        has_interval=any(d is not None and d.interval is not None for d in found),
        margin=next((f"{d.margin:g}" for d in found if d is not None and d.margin is not None), ""),
    )


def _bar(found: Difference, edge: float) -> Bar:
    return Bar(
        mean=_position(found.mean, edge),
        seeds=tuple(_position(value, edge) for value in found.by_seed),
        interval=_stretch(*found.interval, edge) if found.interval else None,
        margin=_stretch(-margin, margin, edge) if (margin := min(found.margin or 0.0, edge)) else None,
    )


def _reach(found: Difference) -> float:
    """Return the largest absolute value that the bar must show."""
    return max(abs(end) for end in (*found.by_seed, *(found.interval or ())))


def _tick(reach: float) -> float:
    """The smallest 1, 2 or 5 times a power of ten of which two and a bit cover `reach`."""
    power = 10.0 ** math.floor(math.log10(reach / 2.2))
    return next(step * power for step in (1, 2, 5, 10) if 2.2 * step * power >= reach * (1 - 1e-9))


def _stretch(low: float, high: float, edge: float) -> tuple[float, float]:
    left, right = _position(low, edge), _position(high, edge)
    return left, round(right - left, 3)


def _position(value: float, edge: float) -> float:
    return round(50 * (1 + value / edge), 3)
