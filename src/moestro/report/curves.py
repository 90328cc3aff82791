"""Learning curves as plotly figures.

Figures are plain dictionaries. Where plotly wants a colour they hold the name of a CSS custom property (`--series-1`),
which the page looks up when it draws, so that one figure serves light and dark.
"""

from collections.abc import Callable, Sequence
from typing import Any

from moestro.comparison import Comparison, CurvePoint, RecipeResult
from moestro.gate.visible import shortened
from moestro.report.text import plotly_label

Figure = dict[str, Any]
Curve = list[tuple[int | float, float]]  # (tokens or learning rate, loss)

SERIES = 8  # colours, one a recipe; after these they come again with the next dash
MAX_POINTS = 300
_DASHES = ("solid", "dot", "dash", "longdash")
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "x", "pentagon")
_LONGEST_NAME = 40
_STEEP_PART = 0.05  # of the tokens: the fall from the initial loss, which would flatten everything that matters


def learning_curves(comparison: Comparison) -> dict[str, Figure]:
    """Held-out loss, training loss and the paired difference over training, and where experts compete what routers know
    of it; a figure without points is left out."""
    held_out = [[_held_out(run.curve) for run in recipe.runs] for recipe in comparison.recipes]
    training = [[_thinned(_training(run.curve)) for run in recipe.runs] for recipe in comparison.recipes]
    first = {run.seed: curve for run, curve in zip(comparison.recipes[0].runs, held_out[0], strict=True)}
    differences = [
        [_minus(curve, first[run.seed]) for run, curve in zip(recipe.runs, curves, strict=True) if run.seed in first]
        for recipe, curves in zip(comparison.recipes[1:], held_out[1:], strict=True)
    ]
    figures = {
        "held-out": _figure(comparison.recipes, held_out, markers=True),
        "training": _figure(comparison.recipes, training, markers=False),
        "difference": _difference_figure(comparison.recipes[1:], differences),
    }
    if any(recipe.competes for recipe in comparison.recipes):
        figures |= {name: _beside_competition(comparison.recipes, name) for name in ("agreement", "regret")}
    return {name: figure for name, figure in figures.items() if figure["data"]}


def series_colour(index: int) -> str:
    """The CSS custom property of the recipe's colour; the first recipe's is a neutral one."""
    return f"--series-{index % SERIES}"


def frame(height: int) -> Figure:
    """The layout that all figures share."""
    axis = {"gridcolor": "--grid", "linecolor": "--axis", "zeroline": False, "fixedrange": True, "automargin": True}
    return {
        "height": height,
        "margin": {"l": 8, "r": 12, "t": 8, "b": 8},
        "paper_bgcolor": "--transparent",
        "plot_bgcolor": "--transparent",
        "font": {"color": "--muted", "size": 12},
        "hoverlabel": {"bgcolor": "--panel", "bordercolor": "--axis", "font": {"color": "--ink", "size": 12}},
        "showlegend": False,
        "xaxis": dict(axis),
        "yaxis": dict(axis),
    }


def _figure(recipes: Sequence[RecipeResult], curves: list[list[Curve]], *, markers: bool) -> Figure:
    data = [t for i, recipe in enumerate(recipes) for t in traces(recipe.name, i, curves[i], markers=markers)]
    drawn = [curve for runs in curves for curve in runs if curve]
    layout, bounds = _curve_layout(drawn), _bounds(drawn)
    if bounds:
        layout["yaxis"]["range"] = bounds
    return {"data": data, "layout": layout}


def _beside_competition(recipes: Sequence[RecipeResult], name: str) -> Figure:
    """Draw the agreement or regret (`name`) of routers beside competition, over training tokens."""
    curves: list[list[Curve]] = [
        [[(p.tokens, p.competition[name]) for p in run.curve if name in p.competition] for run in recipe.runs]
        for recipe in recipes
    ]
    data = [t for i, recipe in enumerate(recipes) for t in traces(recipe.name, i, curves[i], markers=True)]
    return {"data": data, "layout": _curve_layout([curve for runs in curves for curve in runs if curve])}


def _difference_figure(recipes: Sequence[RecipeResult], curves: list[list[Curve]]) -> Figure:
    data = [t for i, recipe in enumerate(recipes) for t in traces(recipe.name, i + 1, curves[i], markers=True)]
    drawn = [curve for runs in curves for curve in runs if curve]
    layout, bounds = _curve_layout(drawn), _difference_bounds(drawn)
    layout["shapes"] = [_zero_line()]
    if bounds:
        layout["yaxis"]["range"] = bounds
    return {"data": data, "layout": layout}


def _curve_layout(curves: Sequence[Curve]) -> Figure:
    layout = frame(height=320)
    last = max((curve[-1][0] for curve in curves), default=1)
    layout["xaxis"]["range"] = [0, 1.02 * last]
    layout["hovermode"] = "x unified"
    layout["xaxis"] |= {"title": {"text": "training tokens", "standoff": 8, "font": {"size": 12}}, "showgrid": False}
    layout["xaxis"] |= {"tickformat": "~s", "hoverformat": ".4~s"}
    layout["xaxis"] |= {"spikecolor": "--axis", "spikethickness": 1, "spikedash": "solid"}
    layout["yaxis"] |= {"showline": False}
    return layout


def traces(name: str, index: int, runs: list[Curve], *, markers: bool) -> list[Figure]:
    """The mean over seeds, and behind it every seed where there are several."""
    runs = [curve for curve in runs if curve]
    if not runs:
        return []
    dash = _DASHES[index // SERIES % len(_DASHES)]
    faint = [_line(name, index, curve, 1.0, dash, opacity=0.3) for curve in runs] if len(runs) > 1 else []
    for trace in faint:
        trace["hoverinfo"] = "skip"
    bold = _line(name, index, _mean_curve(runs), 2.2, dash, opacity=1.0)
    bold["hovertemplate"] = "%{y:.4f}<extra>%{fullData.name}</extra>"
    if markers:
        bold |= {"mode": "lines+markers", "marker": {"size": 5, "symbol": _SYMBOLS[index % len(_SYMBOLS)]}}
        bold["marker"]["color"] = series_colour(index)
    return [*faint, bold]


def _line(name: str, index: int, curve: Curve, width: float, dash: str, *, opacity: float) -> Figure:
    return {
        "type": "scatter",
        "mode": "lines",
        "name": plotly_label(shortened(name, _LONGEST_NAME)),
        "meta": index,  # the recipe, for the page's switches
        "x": [tokens for tokens, _ in curve],
        "y": [float(f"{loss:.6g}") for _, loss in curve],
        "line": {"color": series_colour(index), "width": width, "dash": dash},
        "opacity": opacity,
    }


def _zero_line() -> Figure:
    line = {"color": "--series-0", "width": 1.5}
    return {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": 0, "y1": 0, "line": line, "layer": "below"}


def _held_out(curve: Sequence[CurvePoint]) -> Curve:
    points = [(point.tokens, point.held_out_loss) for point in curve if point.held_out_loss is not None]
    return [points[i] for i in _kept(len(points))]


def _training(curve: Sequence[CurvePoint]) -> Curve:
    return [(point.tokens, point.loss) for point in curve]


def _kept(count: int) -> list[int]:
    """At most MAX_POINTS indices, evenly spread, the last among them."""
    stride = -(-count // MAX_POINTS) if count else 1
    return list(range((count - 1) % stride, count, stride)) if count else []


def _thinned(curve: Curve) -> Curve:
    """At most MAX_POINTS points, each the mean of as many consecutive ones, placed at the last of them."""
    size = max(1, -(-len(curve) // MAX_POINTS))
    groups = [curve[i : i + size] for i in range(0, len(curve), size)]
    return [(group[-1][0], sum(loss for _, loss in group) / len(group)) for group in groups]


def _minus(curve: Curve, other: Curve) -> Curve:
    at = dict(other)
    return [(tokens, loss - at[tokens]) for tokens, loss in curve if tokens in at]


def _mean_curve(runs: Sequence[Curve]) -> Curve:
    """The mean over the runs where all of them have a point."""
    at = [dict(curve) for curve in runs]
    shared = [tokens for tokens, _ in runs[0] if all(tokens in curve for curve in at)]
    return [(tokens, sum(curve[tokens] for curve in at) / len(at)) for tokens in shared]


def _bounds(curves: Sequence[Curve]) -> list[float] | None:
    """A vertical range that leaves out the first fall from the initial loss."""
    late = _losses(curves, lambda tokens, last: tokens >= _STEEP_PART * last)
    return padded(late)


def _difference_bounds(curves: Sequence[Curve]) -> list[float] | None:
    """A vertical range with zero in it that leaves out the first fall, where differences are large and mean little."""
    late = _losses(curves, lambda tokens, last: tokens >= 2 * _STEEP_PART * last)
    return padded([0.0, *late]) if late else None


def _losses(curves: Sequence[Curve], wanted: Callable[[float, float], bool]) -> list[float]:
    return [loss for curve in curves for tokens, loss in curve if wanted(tokens, curve[-1][0])]


def padded(values: Sequence[float]) -> list[float] | None:
    """A range with all values in it, and a margin."""
    if not values:
        return None
    low, high = min(values), max(values)
    margin = 0.06 * (high - low) or 0.05
    return [low - margin, high + margin]
