"""The routing report in a real browser: drawn, quiet, without a request, whatever names it has to show."""

import pytest

from command_line import moestro
from inspection_fixture import domains, save
from moestro.gate.visible import visible
from test_report_browser import OpenReport, _quiet, browser, pytestmark

__all__ = ["browser", "pytestmark"]  # a fixture, and the marks of every test here

NAMES = ("<script>alert(1)<", '"><img src=x onerror=alert(2)> {{ 7 * 7 }} \u202e')


@pytest.fixture(scope="module")
def opened(browser, tmp_path_factory) -> OpenReport:
    """Two checkpoints, one of them under a hostile name, on domains of hostile names."""
    folder = tmp_path_factory.mktemp("inspected")
    checkpoints = [str(save("moestro", folder / "plain")), str(save("deepseek_v3", folder / "<b>bold<i>"))]
    data = domains(folder / "text", NAMES)
    with pytest.MonkeyPatch.context() as patch:
        how = ["--robustness", "--dtype", "float32", "--out", str(folder / "out")]
        assert moestro(patch, "inspect", *checkpoints, *data, *how) == 0
    return OpenReport(browser, folder / "out" / "report.html")


@pytest.fixture
def page(opened):
    opened.page.set_viewport_size({"width": 1400, "height": 900})
    yield opened.page
    _quiet(opened)


def test_all_figures_are_drawn(page):
    for selector, count in (
        ("[data-measure]", 17),
        ("[data-robustness]", 1),
        ("[data-load]", 2),
        ("[data-domains]", 2),
    ):
        plots = page.locator(selector)
        assert plots.count() == count
        assert all(plots.nth(index).locator("svg.main-svg").count() for index in range(count)), selector
    lines = page.locator("[data-measure=entropy] .scatterlayer path.js-line")
    assert lines.count() == 2
    assert page.locator("[data-measure=domain_mutual_information] .scatterlayer path.js-line").count() == 4  # by chance
    assert page.locator("[data-load] .heatmaplayer image").count() == 2
    assert (
        page.locator("[data-robustness] .scatterlayer path.point").count() == 15
    )  # of 4 and 3 scopes, and 4 tests each


def test_hostile_names_are_text(page):
    shown = " ".join(page.locator("body").inner_text().split())
    for name in (*NAMES, "<b>bold<i>"):
        assert " ".join(visible(name).split()) in shown
    assert "{{ 7 * 7 }}" in shown
    assert "\u202e" not in shown
    assert page.locator("main img, main script, main b, .plot a").count() == 0
    labels = page.locator("[data-domains='0'] .ytick text").all_text_contents()
    assert sorted(labels)[1].startswith("<script>alert(1)")


def test_the_layer_can_be_chosen_and_stepped(page):
    loads = "i => document.querySelectorAll('[data-domains]')[i].data[0].customdata"
    page.select_option("#layer", "2")
    both = [page.evaluate(loads, index) for index in (0, 1)]
    assert [len(rows[0]) for rows in both] == [16, 8]
    assert page.locator("#next").is_disabled()
    page.click("#previous")
    assert page.locator("#layer").input_value() == "1.1"
    assert not page.locator("[data-domains='1']").is_visible()
    assert page.locator("[data-absent='1']").is_visible()  # the other has one MoE layer in each block
    assert page.locator("[data-domains='0']").is_visible()
    page.select_option("#layer", "1")
    assert page.locator("[data-absent='0']").is_visible()
    assert page.locator("[data-domains='1']").is_visible()


def test_a_phone_scrolls_down_only(page):
    page.set_viewport_size({"width": 390, "height": 844})
    page.locator("details").evaluate_all("all => all.forEach(d => { d.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    boxes = page.locator(".scroll:visible").evaluate_all("all => all.map(b => b.clientWidth)")
    assert boxes and max(boxes) <= 390


def test_dark_follows_the_system(page):
    seen = []
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        seen.append((background, page.evaluate("document.querySelector('[data-load] .xtick text').style.fill")))
    page.emulate_media(color_scheme="light")
    assert seen[0][0] != seen[1][0]
    assert seen[0][1] != seen[1][1]
