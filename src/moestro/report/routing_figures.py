"""The figures of a routing study: a line per checkpoint over layers, and heat maps of loads."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from moestro.gate.visible import shortened
from moestro.inspection.measuring import Measured, RoutingStudy
from moestro.report.curves import Figure, frame, series_colour
from moestro.report.heatmaps import heat_map
from moestro.report.measures import Measure
from moestro.report.routing_robustness import robustness_figure
from moestro.report.routing_summary import all_labels, by_label, study_measures
from moestro.report.text import plotly_label

_TICKS = 12
_LONGEST_NAME = 40


def figures(study: RoutingStudy) -> dict[str, Any]:
    """All figures of the page."""
    return {
        "measures": {measure.field: measure_figure(study, measure) for measure in study_measures(study)},
        "loads": [load_figure(checkpoint) for checkpoint in study.checkpoints],
        "domains": [
            {layer.label: heat_map(list(layer.domain_load), list(layer.domain_load.values())) for layer in c.layers}
            for c in study.checkpoints
        ],
        "robustness": robustness_figure(study),
    }


def load_figure(checkpoint: Measured) -> Figure:
    """Layers (first on top) by experts."""
    layers = checkpoint.layers
    return heat_map([f"layer {layer.label}" for layer in layers], [layer.load for layer in layers])


def measure_figure(study: RoutingStudy, measure: Measure) -> Figure:
    """One measure over layers."""
    labels = all_labels(study)
    layout = frame(height=210)
    stride = -(-len(labels) // _TICKS)
    layout["xaxis"] |= {"tickvals": list(range(0, len(labels), stride)), "ticktext": labels[::stride]}
    layout["xaxis"] |= {"range": [-0.4, len(labels) - 0.6], "showgrid": False}
    layout["xaxis"] |= {"title": {"text": "layer", "standoff": 4, "font": {"size": 12}}}
    layout["yaxis"] |= {"showline": False, "nticks": 6}
    layout["hovermode"] = "x unified"
    traces = [trace(checkpoint, index, labels, measure) for index, checkpoint in enumerate(study.checkpoints)]
    if measure.chance is not None:
        by_chance = replace(measure, field=measure.chance)
        faint = [trace(checkpoint, index, labels, by_chance) for index, checkpoint in enumerate(study.checkpoints)]
        traces += [as_chance(drawn) for drawn in faint]
    layout["yaxis"]["range"] = bounds([y for drawn in traces for y in drawn["y"] if y is not None], measure.least)
    return {"data": traces, "layout": layout}


def bounds(values: Sequence[float], least: float) -> list[float]:
    """A vertical range with zero in it."""
    high = max(0.0, least, *values)
    low = min(0.0, -least if min(values, default=0.0) < 0 else 0.0, *values)
    margin = 0.06 * (high - low) or 0.06
    return [low - margin, high + margin]


def trace(checkpoint: Measured, index: int, labels: list[str], measure: Measure) -> Figure:
    """Return one checkpoint's line. It passes over labels of which the checkpoint has no MoE layer."""
    layers, colour = by_label(checkpoint), series_colour(index + 1)
    values = [layers[label].figures.get(measure.field) if label in layers else None for label in labels]
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": plotly_label(shortened(checkpoint.finding.name, _LONGEST_NAME)),
        "x": list(range(len(labels))),
        "y": [None if value is None else float(f"{value:.6g}") for value in values],
        "customdata": labels,
        "connectgaps": True,
        "line": {"color": colour, "width": 2},
        "marker": {"size": 5, "symbol": ("circle", "square")[index % 2], "color": colour},
        "hovertemplate": f"%{{y:.{measure.decimals}f}}<extra>%{{fullData.name}}</extra>",
    }


def as_chance(drawn: Figure) -> Figure:
    """The line of what chance alone would give: thin and dotted."""
    line = drawn["line"] | {"width": 1.2, "dash": "dot"}
    template = drawn["hovertemplate"].replace("<extra>", "<extra>chance, ")
    return drawn | {"mode": "lines", "line": line, "hovertemplate": template, "opacity": 0.75}
