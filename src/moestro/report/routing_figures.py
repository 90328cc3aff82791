"""The figures of a routing study: a line per checkpoint over layers, and heat maps of loads."""

from typing import Any

from moestro.inspection import Measured, RoutingStudy
from moestro.report.curves import Figure, frame, series_colour
from moestro.report.heatmaps import heat_map
from moestro.report.measures import Measure, measures
from moestro.report.routing_summary import all_labels, by_label
from moestro.report.text import plotly_label, shortened

_TICKS = 12
_LONGEST_NAME = 40


def figures(study: RoutingStudy) -> dict[str, Any]:
    """All figures of the page."""
    return {
        "measures": {measure.field: measure_figure(study, measure) for measure in measures(study)},
        "loads": [load_figure(checkpoint) for checkpoint in study.checkpoints],
        "domains": [
            {layer.label: heat_map(list(layer.domain_load), list(layer.domain_load.values())) for layer in c.layers}
            for c in study.checkpoints
        ],
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
    layout["yaxis"] |= {"rangemode": "tozero", "showline": False, "nticks": 6}
    layout["hovermode"] = "x unified"
    traces = [trace(checkpoint, index, labels, measure) for index, checkpoint in enumerate(study.checkpoints)]
    return {"data": traces, "layout": layout}


def trace(checkpoint: Measured, index: int, labels: list[str], measure: Measure) -> Figure:
    """One checkpoint's line; gaps where it has no MoE layer of that label."""
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
