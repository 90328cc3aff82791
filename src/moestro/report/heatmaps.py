"""Where the tokens went: load per layer, per domain within a layer, and by pairs of two layers, as plotly heat maps.

A cell is a load over the uniform load (1: as many choices as if all experts were alike), or a pair's share over what
two independent choices would give. Colour follows its logarithm to base 2, so that half and double are equally far
from the middle, and ends at a quarter and at four times. A cross marks what no token chose.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from moestro.comparison import Comparison, LayerStatistics
from moestro.gate.visible import shortened
from moestro.report.curves import Figure, frame
from moestro.report.text import plotly_label

_LIMIT = 2.0  # powers of two
_COLOURS = [
    [0.0, "--load-low"],
    [0.25, "--load-lower"],
    [0.5, "--load-even"],
    [0.75, "--load-higher"],
    [1.0, "--load-high"],
]
_LONGEST_LABEL = 22
_ROW, _DENSE_ROW, _MANY_ROWS = 26, 16, 24  # pixels, pixels, rows


def expert_figures(comparison: Comparison) -> dict[str, Any]:
    """Per recipe index and seed index, as "1/0": the load of all layers; by domain of each; by pairs of composed ones.

    Dense recipes have none.
    """
    return {
        f"{recipe_index}/{comparison.seeds.index(run.seed)}": {
            "load": load_figure(run.layers),
            "domains": [titled(f"layer {layer.label}", domain_figure(layer)) for layer in run.layers],
            "pairs": [
                titled(f"layer {before.label} by layer {layer.label}", pair_figure(layer.pairs))
                for before, layer in pairwise(run.layers)
                if layer.pairs is not None
            ],
        }
        for recipe_index, recipe in enumerate(comparison.recipes)
        for run in recipe.runs
        if run.layers
    }


def titled(title: str, figure: Figure) -> dict[str, Any]:
    """A figure among several."""
    return {"title": title, "figure": figure}


def load_figure(layers: Sequence[LayerStatistics]) -> Figure:
    """Layers (first on top) by experts."""
    return heat_map([f"layer {layer.label}" for layer in layers], [layer.load for layer in layers])


def domain_figure(layer: LayerStatistics) -> Figure:
    """Domains by experts within one layer."""
    return heat_map(list(layer.domain_load), list(layer.domain_load.values()))


def pair_figure(rows: tuple[tuple[float, ...], ...]) -> Figure:
    """Experts of the sub-layer before by experts of this one; 1 is what independent choices would give."""
    earlier, later = [sum(row) for row in rows], [sum(column) for column in zip(*rows, strict=True)]
    ratios = [
        [share / (a * b) if a * b else None for share, b in zip(row, later, strict=True)]
        for row, a in zip(rows, earlier, strict=True)
    ]
    return ratio_map(
        [str(index) for index in range(len(rows))],
        ratios,
        "expert %{y}, then %{x}<br>%{customdata:.2f} × chance<extra></extra>",
    )


def moe_recipes(comparison: Comparison) -> list[tuple[int, str]]:
    """Index and name of every recipe that has MoE layers and a finished run."""
    return [(i, recipe.name) for i, recipe in enumerate(comparison.recipes) if any(run.layers for run in recipe.runs)]


def heat_map(names: Sequence[str], loads: Sequence[tuple[float, ...]]) -> Figure:
    """One row of experts per name."""
    width = max((len(load) for load in loads), default=0)
    ratios = [_ratios(load) + [None] * (width - len(load)) for load in loads]
    return ratio_map(names, ratios, "expert %{x}<br>%{customdata:.2f} × uniform<extra>%{y}</extra>")


def ratio_map(names: Sequence[str], ratios: Sequence[Sequence[float | None]], hover: str) -> Figure:
    """One row of ratios per name."""
    width = max(map(len, ratios), default=0)
    trace = {
        "type": "heatmap",
        "z": [[None if ratio is None else _colour_position(ratio) for ratio in row] for row in ratios],
        "customdata": [[None if ratio is None else float(f"{ratio:.4g}") for ratio in row] for row in ratios],
        "text": [["×" if ratio == 0 else "" for ratio in row] for row in ratios],
        "texttemplate": "%{text}",
        "textfont": {"color": "--dead", "size": 13},
        "hovertemplate": hover,
        "zmin": -_LIMIT,
        "zmax": _LIMIT,
        "colorscale": _COLOURS,
        "showscale": False,
        "xgap": 1 if width <= 64 else 0,
        "ygap": 1,
    }
    return {"data": [trace], "layout": _layout(names, width)}


def _layout(names: Sequence[str], width: int) -> Figure:
    layout = frame(height=(_ROW if len(names) <= _MANY_ROWS else _DENSE_ROW) * len(names) + 46)
    layout["xaxis"] |= {"title": {"text": "expert", "standoff": 4, "font": {"size": 12}}}
    layout["xaxis"] |= {"nticks": 17} if width > 17 else {"dtick": 1}  # left to itself, plotly names half an expert
    for axis in ("xaxis", "yaxis"):
        layout[axis] |= {"showgrid": False, "showline": False, "ticks": ""}
    layout["yaxis"] |= {
        "autorange": "reversed",
        "tickvals": list(range(len(names))),
        "ticktext": [plotly_label(shortened(name, _LONGEST_LABEL)) for name in names],
    }
    return layout


def _colour_position(ratio: float) -> float:
    return max(-_LIMIT, min(_LIMIT, round(math.log2(ratio), 3))) if ratio > 0 else -_LIMIT


def _ratios(load: tuple[float, ...]) -> list[float | None]:
    """Loads over the uniform one; unknown where there was nothing to choose, as in a domain without tokens."""
    return [share * len(load) for share in load] if any(load) else [None] * len(load)
