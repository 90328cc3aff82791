import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from comparison_fixture import HOSTILE, hostile, make_comparison
from moestro.gate.visible import visible
from moestro.report.html import render, write_report


class Page(HTMLParser):
    """The elements of a page, and the text that a reader sees."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        if self.cdata_elem is None:
            self.text.append(data)


def _without_plotly(html: str) -> str:
    return re.sub(r"<script>\s*/\*\*\s*\n\* plotly\.js.*?</script>", "<script></script>", html, flags=re.DOTALL)


def test_hostile_text_adds_no_element_and_no_attribute():
    plain, attacked = (Page(render(c)) for c in (make_comparison(), hostile(make_comparison())))
    assert plain.tags.count("script") == 3
    assert not {"img", "a", "iframe", "object", "link", "base"} & set(attacked.tags)
    assert set(attacked.tags) <= {*plain.tags, "strong", "ul", "li"}
    assert attacked.tags.count("script") == 3
    assert {name for name, _ in attacked.attributes} <= {*(name for name, _ in plain.attributes)}
    assert not [name for name, _ in attacked.attributes if name.startswith("on") or name in ("src", "href")]


def test_hostile_text_is_shown_as_text():
    shown = "".join(Page(render(hostile(make_comparison()))).text)
    for name in HOSTILE:
        assert visible(name) in shown
    assert "{{ 7 * 7 }}" in shown
    assert "\x1b" not in shown
    assert "\u202e" not in shown


def test_nothing_is_fetched():
    page = Page(render(make_comparison()))
    policy = next(value for _, value in page.attributes if value and "default-src" in value)
    assert "default-src 'none'" in policy
    assert "unsafe-inline" not in policy.split("script-src")[1].split(";")[0]
    assert not [(name, value) for name, value in page.attributes if value and re.match(r"\s*(https?:)?//", value)]
    assert "url(" not in _without_plotly(render(make_comparison()))


@pytest.mark.parametrize("seeds", [(0,), (0, 1), (4, 5, 6, 7)])
def test_any_number_of_seeds_makes_a_report_under_ten_megabytes(seeds, tmp_path):
    path = tmp_path / "report.html"
    write_report(make_comparison(seeds), path)
    assert path.stat().st_size < 10e6


def test_a_lone_dense_recipe_has_a_report():
    comparison = make_comparison((0,))
    shown = "".join(Page(render(replace(comparison, recipes=comparison.recipes[:1]))).text)
    assert "dense reaches" in shown
    assert "Where the tokens went" not in shown
    assert "What is only noise" not in shown


def test_unequal_budgets_are_said_first():
    comparison = make_comparison((0,))
    budget = replace(comparison.budget, equal=False, differences=("parameters differ: dense 8,000, smoe 9,000",))
    shown = "".join(Page(render(replace(comparison, budget=budget))).text)
    assert shown.index("The budgets are not equal.") < shown.index("Results")
    assert "parameters differ: dense 8,000, smoe 9,000" in shown
    assert "budgets are not equal" not in render(comparison)


def test_the_report_says_what_was_asked_for():
    shown = "".join(Page(render(make_comparison())).text)
    for part in (
        "fine-grained beats dense by 0.03",
        "nats lower than dense [0.0",
        "gzip -9",
        "1 of 64",
        "moestro compare dense smoe fine-grained --seeds 3 --size tiny",
        "sha256:5d1f0c6b",
        "2.13.0+cpu",
        "detects a true difference of 0.0056 nats four times in five",
        "shaded: less than the margin of 0.02 nats",
        "at most 5 % of comparisons claim a difference of any recipe",
        "one that excludes zero may accompany “not answered”",
    ):
        assert part in shown, part
