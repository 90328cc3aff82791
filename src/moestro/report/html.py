"""The report of a comparison."""

from pathlib import Path

from moestro.comparison import Comparison
from moestro.report import sentences
from moestro.report.curves import learning_curves
from moestro.report.forest import forest
from moestro.report.heatmaps import expert_figures, moe_recipes
from moestro.report.learning_rates import rate_figure, rate_table
from moestro.report.learnt import learnt_rows
from moestro.report.page import render_page
from moestro.report.summary import domain_rows, rows


def write_report(comparison: Comparison, path: Path) -> None:
    """Write the report of a comparison to `path`."""
    path.write_text(render(comparison), encoding="utf-8")


def render(comparison: Comparison) -> str:
    """The report of a comparison, a whole HTML page."""
    return render_page(
        "report.html",
        scripts=("figures.js", "report.js"),
        comparison=comparison,
        first=comparison.recipes[0],
        rows=rows(comparison),
        rates=rate_table(comparison),
        rate_figure=rate_figure(comparison),
        domain_rows=domain_rows(comparison),
        forest=forest(comparison),
        curves=learning_curves(comparison),
        learnt=learnt_rows(comparison),
        experts=expert_figures(comparison),
        moe_recipes=moe_recipes(comparison),
        say=sentences,
    )
