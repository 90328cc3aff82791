import json
from dataclasses import replace
from typing import Any

import plotly.graph_objects as go
import pytest
from hypothesis import given
from hypothesis import strategies as st

from comparison_fixture import HOSTILE, competing, hostile, make_comparison
from moestro.comparison import CurvePoint
from moestro.report.curves import MAX_POINTS, learning_curves
from moestro.report.forest import forest
from moestro.report.heatmaps import domain_figure, expert_figures, load_figure, moe_recipes


def _with_curve(comparison, curve):
    recipes = tuple(replace(r, runs=tuple(replace(run, curve=curve) for run in r.runs)) for r in comparison.recipes)
    return replace(comparison, recipes=recipes)


def _painted(value: Any) -> Any:
    """The figure as plotly gets it, with black for every colour."""
    if isinstance(value, list):
        return [_painted(item) for item in value]
    if isinstance(value, dict):
        return {key: _painted(item) for key, item in value.items()}
    return "#000000" if isinstance(value, str) and value.startswith("--") else value


def _all_figures(comparison):
    yield from learning_curves(comparison).values()
    for run in expert_figures(comparison).values():
        yield run["load"]
        yield from (shown["figure"] for shown in (*run["domains"], *run["pairs"]))


@pytest.mark.parametrize(
    "comparison",
    [make_comparison(), hostile(make_comparison((0,))), competing(make_comparison())],
    ids=["plain", "hostile", "competing"],
)
def test_figures_are_what_plotly_takes(comparison):
    for figure in _all_figures(comparison):
        go.Figure(_painted(figure))  # raises where an attribute or value is unknown
        json.dumps(figure, allow_nan=False)


def test_no_name_reaches_plotly_as_markup():
    written = json.dumps(list(_all_figures(hostile(make_comparison()))), ensure_ascii=False)
    ours = written.replace("<br>", "").replace("<extra>", "").replace("</extra>", "")
    assert "<" not in ours
    assert not any(name in written for name in HOSTILE[:5])
    assert "\\u00" not in written  # JSON's way to write a control character


def test_curves_are_means_with_their_seeds_behind():
    traces = learning_curves(make_comparison())["held-out"]["data"]
    smoe = [trace for trace in traces if trace["meta"] == 1]
    assert [trace["opacity"] for trace in smoe] == [0.3, 0.3, 0.3, 1.0]
    assert {trace["line"]["color"] for trace in smoe} == {"--series-1"}
    middle = [sum(values) / 3 for values in zip(*(trace["y"] for trace in smoe[:3]), strict=True)]
    assert smoe[3]["y"] == pytest.approx(middle, abs=1e-4)


def test_what_routers_know_of_competition_is_drawn_where_experts_compete():
    assert {"agreement", "regret"}.isdisjoint(learning_curves(make_comparison()))
    figures = learning_curves(competing(make_comparison()))
    ends = {trace["meta"]: trace["y"][-1] for trace in figures["agreement"]["data"] if trace["opacity"] == 1}
    assert ends == pytest.approx({1: 0.3, 2: 0.7})  # the dense recipe has nothing to choose
    assert {trace["meta"] for trace in figures["regret"]["data"]} == {1, 2}


def test_one_seed_is_drawn_once():
    traces = learning_curves(make_comparison((0,)))["held-out"]["data"]
    assert [trace["opacity"] for trace in traces] == [1.0, 1.0, 1.0]


def test_the_difference_is_paired_by_seed():
    comparison = make_comparison((0, 1))
    traces = [t for t in learning_curves(comparison)["difference"]["data"] if t["meta"] == 2]
    runs = [recipe.runs[1] for recipe in (comparison.recipes[2], comparison.recipes[0])]
    ends = [[p.held_out_loss for p in run.curve if p.held_out_loss is not None][-1] for run in runs]
    assert traces[1]["y"][-1] == pytest.approx(ends[0] - ends[1], rel=1e-4)
    assert not [t for t in learning_curves(comparison)["difference"]["data"] if t["meta"] == 0]


def test_long_curves_are_thinned_without_losing_the_end_or_the_mean():
    curve = tuple(CurvePoint(step=i, tokens=i * 10, loss=float(i % 2), held_out_loss=float(i)) for i in range(10_001))
    figures = learning_curves(_with_curve(make_comparison((0,)), curve))
    for name in ("held-out", "training"):
        (trace, *_) = figures[name]["data"]
        assert len(trace["x"]) <= MAX_POINTS
        assert trace["x"][-1] == 100_000
    assert figures["training"]["data"][0]["y"][5] == pytest.approx(0.5, abs=0.05)


def test_figures_without_points_are_left_out():
    comparison = make_comparison((0,))
    assert learning_curves(_with_curve(comparison, ())) == {}
    only_training = tuple(CurvePoint(step=i, tokens=i, loss=1.0) for i in range(3))
    assert list(learning_curves(_with_curve(comparison, only_training))) == ["training"]


def test_the_first_fall_does_not_flatten_the_rest():
    low, high = learning_curves(make_comparison())["held-out"]["layout"]["yaxis"]["range"]
    assert 3.9 < low < 4.1
    assert high < 6


def test_dense_recipes_have_no_heat_maps():
    comparison = make_comparison()
    assert moe_recipes(comparison) == [(1, "smoe"), (2, "fine-grained")]
    assert set(expert_figures(comparison)) == {f"{recipe}/{seed}" for recipe in (1, 2) for seed in range(3)}


def test_a_cell_is_the_load_over_the_uniform_load():
    layer = replace(make_comparison((0,)).recipes[1].runs[0].layers[0], load=(0.5, 0.25, 0.25, 0.0), domain_load={})
    (trace,) = load_figure([layer])["data"]
    assert trace["customdata"] == [[2.0, 1.0, 1.0, 0.0]]
    assert trace["z"] == [[1.0, 0.0, 0.0, -2.0]]
    assert trace["text"] == [["", "", "", "×"]]


def test_pairs_are_measured_against_independent_choices():
    runs = expert_figures(make_comparison((0,)))
    assert runs["1/0"]["pairs"] == []  # one sub-layer to a block
    shown = runs["2/0"]["pairs"]
    assert [pair["title"] for pair in shown] == ["layer 0.0 by layer 0.1", "layer 1.0 by layer 1.1"]
    (trace,) = shown[1]["figure"]["data"]
    pairs = make_comparison((0,)).recipes[2].runs[0].layers[3].pairs
    assert pairs is not None
    later = [sum(column) for column in zip(*pairs, strict=True)]
    assert trace["customdata"][0][0] == 0
    assert trace["customdata"][0][1] == pytest.approx(1 / later[1], rel=1e-3)
    assert trace["customdata"][3][4] == pytest.approx(pairs[3][4] / sum(pairs[3]) / later[4], rel=1e-3)


def test_layers_of_different_width_share_a_figure():
    layer = make_comparison((0,)).recipes[1].runs[0].layers[0]
    (trace,) = load_figure([replace(layer, load=(1.0,)), replace(layer, load=(0.5, 0.5))])["data"]
    assert trace["z"] == [[0.0, None], [0.0, 0.0]]


def test_a_domain_without_tokens_is_empty_and_not_dead():
    layer = make_comparison((0,)).recipes[1].runs[0].layers[0]
    (trace,) = domain_figure(replace(layer, domain_load={"none": (0.0, 0.0), "some": (1.0, 0.0)}))["data"]
    assert trace["z"][0] == [None, None]
    assert trace["text"] == [["", ""], ["", "×"]]


def test_the_forest_has_zero_in_the_middle_and_room_for_all():
    plot = forest(make_comparison())
    first, smoe, fine = plot.bars
    assert first is None
    assert [tick[0] for tick in plot.ticks][2] == 50
    assert smoe is not None
    assert fine is not None
    assert fine.mean < smoe.mean < 50
    assert fine.interval is not None
    assert fine.interval[0] < fine.mean < fine.interval[0] + fine.interval[1] < 50
    assert fine.margin is not None
    assert 2 * fine.margin[0] + fine.margin[1] == pytest.approx(100)
    assert plot.margin == "0.02"


@given(st.floats(1e-5, 50), st.floats(-1, 1))
def test_nothing_leaves_the_forest(scale, shift):
    comparison = make_comparison()
    recipe = comparison.recipes[1]
    assert recipe.difference is not None
    found = replace(
        recipe.difference,
        mean=shift * scale,
        by_seed=(scale, -scale),
        interval=(-scale, scale),
        margin=scale * 10 ** (2 * shift),
    )
    plot = forest(replace(comparison, recipes=(comparison.recipes[0], replace(recipe, difference=found))))
    bar = plot.bars[1]
    assert bar is not None
    assert bar.interval is not None
    assert bar.margin is not None
    edges = (bar.interval[0], sum(bar.interval), bar.margin[0], sum(bar.margin))
    for position in (bar.mean, *bar.seeds, *edges, *(at for at, _ in plot.ticks)):
        assert 0 <= position <= 100
    assert len({label for _, label in plot.ticks}) == 5
