"""The report in a real browser: nothing fails, nothing is fetched, nothing hostile runs, everything is drawn."""

import shutil
from collections.abc import Iterator

import pytest

from comparison_fixture import HOSTILE, hostile, make_comparison, swept
from moestro.gate.visible import visible
from moestro.report.html import write_report

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium")
FLAGS = (
    "--no-sandbox",  # which Chromium cannot set up for root, as whom containers run their tests
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine"),
    pytest.mark.xdist_group("browser"),
]


class OpenReport:
    """A page that shows a report, and all that the browser said and asked for meanwhile."""

    def __init__(self, browser, path) -> None:
        self.page = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme="light")
        self.page.set_default_timeout(60_000)
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.complaints.append(dialog.message), dialog.dismiss()))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def reports(browser, tmp_path_factory) -> dict[str, OpenReport]:
    """Opened once: every test sets what it looks at (size, scheme, controls) by itself."""
    folder = tmp_path_factory.mktemp("reports")
    made = {"plain": swept(make_comparison()), "hostile": hostile(swept(make_comparison((0,))))}
    for name, comparison in made.items():
        write_report(comparison, folder / f"{name}.html")
    return {name: OpenReport(browser, folder / f"{name}.html") for name in made}


@pytest.fixture
def plain(reports) -> Iterator:
    yield _at_width(reports["plain"], 1280)
    _quiet(reports["plain"])


@pytest.fixture(params=["plain", "hostile"])
def on_a_phone(request, reports) -> Iterator:
    yield _at_width(reports[request.param], 390)
    _quiet(reports[request.param])


def _at_width(report: OpenReport, width: int):
    report.page.set_viewport_size({"width": width, "height": 844})
    return report.page


def _quiet(report: OpenReport) -> None:
    assert report.complaints == []
    assert [url for url in report.requests if not url.startswith("data:")] == [report.page.url]


def test_figures_are_drawn(plain):
    for selector, count in (("[data-curve]", 3), ("#load", 1), ("#domains .plot", 4)):
        plots = plain.locator(selector)
        assert plots.count() == count
        assert all(plots.nth(index).locator("svg.main-svg").count() for index in range(count))
    lines = plain.locator("[data-curve=held-out] .scatterlayer path.js-line")
    assert lines.count() == 12  # three recipes of three seeds and a mean
    assert plain.locator("#load .heatmaplayer image").count() == 1


def test_learning_rates_are_drawn_and_say_their_losses(plain):
    figure = plain.locator("#rates")
    assert figure.locator(".scatterlayer path.js-line").count() == 3
    assert figure.locator(".xtick text").all_text_contents() == ["0.001", "0.002", "0.004", "0.008"]
    figure.locator(".nsewdrag").hover()
    figure.locator(".hoverlayer text").first.wait_for()
    assert "fine-grained : 4.0" in "".join(figure.locator(".hoverlayer text").all_text_contents())


@pytest.mark.parametrize("width", [1280, 390])
def test_hostile_text_is_text(reports, width):
    page = _at_width(reports["hostile"], width)
    shown = " ".join(page.locator("body").inner_text().split())
    for name in HOSTILE:
        assert " ".join(visible(name).split()) in shown
    assert page.locator("main img, main a, main script, .plot a, .plot b").count() == 0
    labels = page.locator("#domains .plot").first.locator(".ytick text").all_text_contents()
    assert labels[0].startswith("<script>window")
    assert labels[2].startswith("<b>bold</b> &lt;i&gt;")
    page.locator("[data-curve=difference] .nsewdrag").hover()
    hover = page.locator("[data-curve=difference] .hoverlayer")
    hover.locator("text").first.wait_for()
    assert "<b>bold</b> &lt;i&gt; <a href='" in "".join(hover.locator("text").all_text_contents())
    assert page.evaluate("window.pwned") is None
    _quiet(reports["hostile"])


def test_a_phone_scrolls_down_only(on_a_phone):
    assert on_a_phone.evaluate("document.documentElement.scrollWidth") == 390
    boxes = on_a_phone.locator(".scroll:visible").evaluate_all("all => all.map(b => [b.scrollWidth, b.clientWidth])")
    assert all(box <= 390 for _, box in boxes)
    assert any(content > box for content, box in boxes)  # wide tables scroll in their own box


def test_recipe_and_seed_change_the_heat_maps(plain):
    loads = "document.getElementById('load').data[0].customdata"
    seen = []
    for recipe, seed, run in (("smoe", "0", "1/0"), ("fine-grained", "0", "2/0"), ("fine-grained", "2", "2/2")):
        plain.select_option("#recipe", label=recipe)
        plain.select_option("#seed", label=seed)
        seen.append(plain.evaluate(loads))
        assert plain.locator("[data-run]:visible").get_attribute("data-run") == run
        assert plain.locator("#domains .plot").count() == 4
        widths = "all => all.map(plot => [plot.querySelector('svg').getBoundingClientRect().width, plot.clientWidth])"
        assert all(drawn <= box for drawn, box in plain.locator("#domains .plot").evaluate_all(widths))
        assert plain.locator("#pairs .plot:visible").count() == (2 if recipe == "fine-grained" else 0)
        assert plain.locator("[data-run]:visible").get_by_text("rerouted").count() == (recipe == "fine-grained")
    assert seen[0] != seen[1] != seen[2]


def test_the_legend_hides_and_shows_a_recipe(plain):
    lines = plain.locator("[data-curve=held-out] .scatterlayer path.js-line")
    for count in (8, 12):
        plain.click(".legend button >> nth=1")
        assert lines.count() == count


def test_domains_in_bits_per_byte_stand_beside_gzip(plain):
    for unit, other in (("bits", "nats"), ("nats", "bits")):
        plain.check(f"[value={unit}]", force=True)
        assert plain.locator(f"td .{unit}").first.is_visible()
        assert not plain.locator(f"td .{other}").first.is_visible()
        assert plain.locator("th.bits").is_visible() == (unit == "bits")


def test_dark_follows_the_system(plain):
    background = "getComputedStyle(document.body).backgroundColor"
    tick = "document.querySelector('#load .xtick text').style.fill"
    plain.emulate_media(color_scheme="light")
    light = plain.evaluate(background), plain.evaluate(tick)
    plain.emulate_media(color_scheme="dark")
    assert plain.evaluate(background) != light[0]
    plain.wait_for_function(f"before => {tick} !== before", arg=light[1])  # figures are drawn anew
    plain.emulate_media(color_scheme="light")
    plain.wait_for_function(f"before => {tick} === before", arg=light[1])
