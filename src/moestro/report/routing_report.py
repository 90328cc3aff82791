"""The report of how one checkpoint, or two, route a text."""

from pathlib import Path

from moestro.inspection.measuring import RoutingStudy
from moestro.report import routing_robustness, routing_sentences
from moestro.report.page import render_page
from moestro.report.routing_figures import figures
from moestro.report.routing_summary import (
    all_labels,
    domain_rows,
    fact_rows,
    layer_rows,
    measure_rows,
    prediction_rows,
    study_measures,
)


def write_routing_report(study: RoutingStudy, path: Path) -> None:
    """Write the report to `path`."""
    path.write_text(render_routing(study), encoding="utf-8")


def render_routing(study: RoutingStudy) -> str:
    """The report, a whole HTML page."""
    return render_page(
        "routing.html",
        scripts=("figures.js", "routing.js"),
        styles=("report.css", "routing.css"),
        study=study,
        names=[checkpoint.finding.name for checkpoint in study.checkpoints],
        facts=fact_rows([checkpoint.finding for checkpoint in study.checkpoints]),
        predictions=prediction_rows(study),
        domains=domain_rows(study),
        measures=study_measures(study),
        measure_rows=measure_rows(study),
        layers=layer_rows(study),
        labels=all_labels(study),
        figures=figures(study),
        say=routing_sentences,
        robustness=routing_robustness,
        robustness_rows=routing_robustness.robustness_rows(study),
    )
