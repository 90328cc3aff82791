"""A report as one HTML file that needs nothing else: no network, no fonts, no second file.

It shows text from users and their data, so it is safe three times over: the template engine escapes everything that it
prints, a content security policy allows only the scripts whose hashes it names (and no request at all), and labels of
figures are escaped for plotly's own markup.
"""

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from moestro.gate.visible import visible
from moestro.report.numbers import fixed, metric, signed

TEMPLATES = Path(__file__).parent / "templates"


def render_page(template: str, *, scripts: Sequence[str], styles: Sequence[str] = ("report.css",), **shown: Any) -> str:
    """A whole page from a template, with plotly and our own scripts and styles in it."""
    sources = [get_plotlyjs(), "\n".join(asset(name) for name in scripts)]
    return (
        environment()
        .get_template(template)
        .render(
            style=Markup("\n".join(asset(name) for name in styles)),
            scripts=[Markup(source) for source in sources],
            policy=content_security_policy(sources),
            **shown,
        )
    )


def environment() -> jinja2.Environment:
    """The template engine: everything that is printed is escaped, and nothing may be undefined."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"fixed": fixed, "metric": metric, "signed": signed}
    return made


def finalize(value: object) -> object:
    """What every printed expression passes: text shows its control characters; markup is ours and stays."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def content_security_policy(scripts: Sequence[str]) -> str:
    """Nothing is loaded or run but these scripts; plotly styles its elements and draws heat maps as data: images."""
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts)
    sources = f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data:"
    return f"{sources}; base-uri 'none'; form-action 'none'"


def asset(name: str) -> str:
    """The text of a file of ours that the page holds."""
    return (TEMPLATES / name).read_text(encoding="utf-8")
