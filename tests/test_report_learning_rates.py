"""The learning-rate sweep in the report and in the terminal."""

import io
import json
import re
from dataclasses import replace

import plotly.graph_objects as go
import pytest
from rich.cells import cell_len
from rich.console import Console

from comparison_fixture import HOSTILE, hostile, make_comparison, swept
from moestro.comparison import Comparison, Screened
from moestro.errors import Misuse
from moestro.records import dumps, loads
from moestro.report import sentences
from moestro.report.html import render
from moestro.report.learning_rates import rate_figure, rate_table
from moestro.report.summary import rows
from moestro.report.terminal import print_comparison

SWEPT = swept(make_comparison())


def with_results(name: str, *results: Screened, chosen: float) -> Comparison:
    """The swept comparison with other results of one recipe."""
    found = SWEPT.sweep
    assert found is not None
    changed = replace(found, screened=found.screened | {name: tuple(results)}, chosen=found.chosen | {name: chosen})
    return replace(SWEPT, sweep=changed)


def printed(comparison: Comparison, width: int, encoding: str = "utf-8") -> str:
    raw = io.BytesIO()
    console = Console(file=io.TextIOWrapper(raw, encoding=encoding), width=width)
    print_comparison(comparison, console, verbose=True)
    console.file.flush()
    return raw.getvalue().decode(encoding)


def visible_text(comparison: Comparison) -> str:
    """What a reader of the page sees, roughly."""
    body = render(comparison).partition("<main>")[2].partition("</main>")[0]
    return " ".join(re.sub(r"<[^>]*>", " ", body).split())


def test_a_sweep_is_written_and_read_back():
    assert loads(Comparison, dumps(SWEPT)) == SWEPT


def test_a_sweep_holds_every_recipe():
    found = SWEPT.sweep
    assert found is not None
    with pytest.raises(Misuse, match="must hold every recipe of its comparison, and lacks smoe"):
        replace(SWEPT, sweep=replace(found, chosen={"dense": 1e-3, "fine-grained": 1e-3}))


def test_the_table_marks_the_best_and_says_what_failed():
    table = rate_table(SWEPT)
    assert table is not None
    assert table.rates == ("0.001", "0.002", "0.004", "0.008")
    assert [[cell.best for cell in row].index(True) for row in table.rows] == [0, 1, 2]
    assert [cell.difference for cell in table.rows[1]] == ["+0.033", "", "+0.020", "+1.081"]
    assert (table.rows[2][3].loss, table.rows[2][3].difference) == ("failed", "")


def test_rates_are_sorted_however_they_were_typed():
    results = (Screened(learning_rate=8e-3, loss=5.0), Screened(learning_rate=5e-4, loss=4.0))
    comparison = with_results("smoe", *results, chosen=5e-4)
    table = rate_table(comparison)
    assert table is not None
    assert table.rates == ("0.0005", "0.001", "0.002", "0.004", "0.008")
    assert [cell.loss for cell in table.rows[1]] == ["4.000", "–", "–", "–", "5.000"]
    figure = rate_figure(comparison)
    assert figure is not None
    assert figure["data"][1]["x"] == [5e-4, 8e-3]


def test_the_figure_leaves_out_what_failed_and_enlarges_the_best():
    figure = rate_figure(SWEPT)
    assert figure is not None
    assert [trace["line"]["color"] for trace in figure["data"]] == ["--series-0", "--series-1", "--series-2"]
    assert [len(trace["x"]) for trace in figure["data"]] == [4, 4, 3]
    assert [trace["marker"]["size"].index(11) for trace in figure["data"]] == [0, 1, 2]
    low, high = figure["layout"]["yaxis"]["range"]
    assert low < 4.088
    assert 4.152 < high < 4.2  # neighbours of the best are shown, not what lies far above


@pytest.mark.parametrize("comparison", [SWEPT, hostile(SWEPT)], ids=["plain", "hostile"])
def test_the_figure_is_what_plotly_takes(comparison: Comparison):
    written = json.dumps(rate_figure(comparison), allow_nan=False)
    go.Figure(json.loads(re.sub(r'"--[a-z0-9-]+"', '"#000000"', written)))
    assert "<script" not in written
    assert "\\u00" not in written


def test_a_single_rate_needs_no_figure():
    single = {name: (Screened(learning_rate=1e-3, loss=4.0),) for name in ("dense", "smoe", "fine-grained")}
    found = SWEPT.sweep
    assert found is not None
    comparison = replace(SWEPT, sweep=replace(found, screened=single, chosen=dict.fromkeys(single, 1e-3)))
    assert rate_figure(comparison) is None
    assert sentences.edge(comparison) == ""
    assert "trained at one learning rate with seed 1000" in visible_text(comparison)


def test_the_sentence_says_seed_and_tokens():
    assert sentences.sweep(SWEPT) == (
        "Every recipe was first trained at each of 4 learning rates with seed 1000 on 655k tokens, then compared at "
        "its best. No interval contains that seed."
    )
    alone = sentences.sweep(swept(make_comparison((0,)), seed=0))
    assert "What is compared are these very runs, each recipe's best: one seed." in alone
    assert sentences.sweep(make_comparison()) == ""
    found = SWEPT.sweep
    assert found is not None
    unlike = replace(SWEPT, sweep=replace(found, tokens=found.tokens | {"smoe": 500_000}))
    assert "on 500k to 655k tokens" in sentences.sweep(unlike)


def test_recipes_at_the_edge_of_the_grid_are_named():
    assert sentences.edge(SWEPT).startswith("Best at the lowest learning rate: dense. The true best may lie beyond")
    results = [Screened(learning_rate=rate, loss=loss) for rate, loss in ((1e-3, 5.0), (8e-3, 4.0))]
    said = sentences.edge(with_results("smoe", *results, chosen=8e-3))
    assert said.startswith("Best at the lowest learning rate: dense; at the highest learning rate: smoe.")
    inside = with_results("dense", Screened(learning_rate=1e-3, loss=4.0), chosen=1e-3)
    assert sentences.edge(inside) == ""  # fine-grained failed above its best: no edge


def test_the_report_has_a_section_only_after_a_sweep():
    shown = visible_text(SWEPT)
    for part in ("Learning rates Every recipe was first trained", "The grid may be too narrow.", "failed"):
        assert part in shown, part
    plain = visible_text(make_comparison())
    assert "Learning rates" not in plain
    assert "learning rate" not in plain
    assert [row.learning_rate for row in rows(SWEPT)] == ["0.001", "0.002", "0.004"]
    assert [row.learning_rate for row in rows(make_comparison())] == ["", "", ""]


def test_every_row_of_the_results_has_a_cell_per_column():
    for comparison in (SWEPT, make_comparison()):
        table = render(comparison).partition('aria-label="Results per recipe"')[2].partition("</table>")[0]
        columns = table.count('<th scope="col">')
        body = table.partition("<tbody>")[2].split("</tr>")[:-1]
        assert [row.count("<td>") + 1 for row in body] == [columns] * 4


@pytest.mark.parametrize("width", [140, 80, 40])
def test_the_terminal_shows_every_rate_at_every_width(width: int):
    shown = printed(SWEPT, width)
    assert max(cell_len(line) for line in shown.splitlines()) <= width
    words = " ".join(shown.split())
    for part in ("* 4.131", "* 4.119", "* 4.088", "failed", "learning rate", "with seed 1000", "Best at the lowest"):
        assert part in words, part


def test_the_terminal_says_nothing_of_a_sweep_that_was_not():
    assert "learning rate" not in printed(make_comparison(), 80)


def test_hostile_names_are_harmless_there_too():
    shown = printed(hostile(SWEPT), 60, encoding="ascii")
    assert not any(ord(character) < 0x20 and character != "\n" for character in shown)
    page = render(hostile(SWEPT)).partition("<main>")[2].partition("</main>")[0]
    assert not any(name in page for name in HOSTILE[:5])
