"""The report as one HTML file that needs nothing else: no network, no fonts, no second file.

It shows text from users and their data, so it is safe three times over: the template engine escapes everything that it
prints, a content security policy allows only the two scripts whose hashes it names (and no request at all), and labels
of figures are escaped for plotly's own markup.
"""

import base64
import hashlib
from pathlib import Path

import jinja2
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from moestro.comparison import Comparison
from moestro.report import sentences
from moestro.report.curves import learning_curves
from moestro.report.forest import forest
from moestro.report.heatmaps import expert_figures, moe_recipes
from moestro.report.numbers import fixed, metric, signed
from moestro.report.summary import domain_rows, rows
from moestro.report.text import visible

TEMPLATES = Path(__file__).parent / "templates"


def write_report(comparison: Comparison, path: Path) -> None:
    """Write the report of a comparison to `path`."""
    path.write_text(render(comparison), encoding="utf-8")


def render(comparison: Comparison) -> str:
    """The report of a comparison, a whole HTML page."""
    scripts = [get_plotlyjs(), _asset("report.js")]
    return (
        _environment()
        .get_template("report.html")
        .render(
            comparison=comparison,
            first=comparison.recipes[0],
            rows=rows(comparison),
            domain_rows=domain_rows(comparison),
            forest=forest(comparison),
            curves=learning_curves(comparison),
            experts=expert_figures(comparison),
            moe_recipes=moe_recipes(comparison),
            say=sentences,
            style=Markup(_asset("report.css")),
            scripts=[Markup(script) for script in scripts],
            policy=_content_security_policy(scripts),
        )
    )


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"fixed": fixed, "metric": metric, "signed": signed}
    return environment


def _finalize(value: object) -> object:
    """What every printed expression passes: text shows its control characters; markup is ours and stays."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _content_security_policy(scripts: list[str]) -> str:
    """Nothing is loaded or run but these scripts; plotly styles its elements and draws heat maps as data: images."""
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts)
    sources = f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data:"
    return f"{sources}; base-uri 'none'; form-action 'none'"


def _asset(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8")
