"""A comparison in which runs failed, in its record, in the report and in the terminal."""

import io
import json
import re
from dataclasses import replace

import pytest
from rich.cells import cell_len
from rich.console import Console

from comparison_fixture import HOSTILE, competing, failing, make_comparison, swept
from moestro.comparison import Comparison, FailedRun
from moestro.errors import Misuse
from moestro.gate.visible import visible
from moestro.records import dumps, loads
from moestro.report import sentences
from moestro.report.curves import learning_curves
from moestro.report.forest import forest
from moestro.report.heatmaps import expert_figures, moe_recipes
from moestro.report.html import render
from moestro.report.learning_rates import rate_figure, rate_table
from moestro.report.summary import rows
from moestro.report.terminal import print_comparison

WHOLE = competing(swept(make_comparison()))
ALL = (0, 1, 2)
NAMES = ("dense", "smoe", "fine-grained")
CASES = {
    "an arm once": {"smoe": (1,)},
    "an arm always": {"smoe": ALL},
    "the first once": {"dense": (0,)},
    "the first always": {"dense": ALL},
    "the others always": {"smoe": ALL, "fine-grained": ALL},
    "no seed in common": {"dense": (0,), "smoe": (1, 2)},
    "everything": dict.fromkeys(NAMES, ALL),
}


def shown(comparison: Comparison, width: int = 100) -> str:
    raw = io.BytesIO()
    console = Console(file=io.TextIOWrapper(raw, encoding="utf-8"), width=width)
    print_comparison(comparison, console, verbose=True)
    console.file.flush()
    return raw.getvalue().decode()


@pytest.mark.parametrize("case", CASES)
def test_any_runs_may_fail(case: str):
    comparison = failing(WHOLE, CASES[case])
    assert loads(Comparison, dumps(comparison)) == comparison
    page = render(comparison).partition("<main>")[2].partition("</main>")[0]
    assert page.count('data-verdict="failed"') >= 2 * len(CASES[case]) - 1
    assert "<script>window" not in page
    assert "\x1b" not in page
    assert visible(HOSTILE[0] + "\x1b[31m").replace("<", "&lt;").replace(">", "&gt;") in page
    words = re.sub(r"<[^>]*>", " ", page)
    for name, seeds in CASES[case].items():
        assert name in words
        assert words.count("diverged at step") >= len([seed for seed in seeds if seed])
    for width in (100, 40):
        lines = shown(comparison, width).splitlines()
        assert max(cell_len(line) for line in lines) <= width
    assert "failed runs" in shown(comparison)
    json.dumps([learning_curves(comparison), expert_figures(comparison), rate_figure(comparison)], allow_nan=False)
    forest(comparison)


@pytest.mark.parametrize(
    ("case", "headline"),
    [
        ("an arm once", "fine-grained beats dense by 0.0305 nats per token; smoe failed"),
        ("the first once", "Too few seeds to rank: 2 of the 3 that it takes"),
        ("the first always", "dense failed with every seed: there is nothing to compare with"),
        ("the others always", "smoe and fine-grained failed: there is nothing to compare with dense"),
        ("no seed in common", "Too few seeds to rank: 2 of the 3 that it takes; smoe failed"),
        ("everything", "Every run failed"),
    ],
)
def test_the_headline_says_what_failed(case: str, headline: str):
    assert sentences.headline(failing(make_comparison(), CASES[case])) == headline


def test_verdicts_and_sentences():
    comparison = failing(make_comparison(), {"dense": (0,), "smoe": (1, 2)})
    dense, smoe, fine = comparison.recipes
    assert [sentences.verdict(comparison, result) for result in comparison.recipes] == [
        "failed",
        "failed",
        "too few seeds to rank",
    ]
    assert sentences.difference(comparison, dense) == "what the others are compared to"
    assert sentences.difference(comparison, smoe) == "no seed with which both it and dense finished"
    assert sentences.difference(comparison, fine).endswith("lower than dense, 2 seeds")
    assert sentences.reason(comparison, dense).startswith("seed 0: the loss is nan")
    assert sentences.failed(smoe) == ["seed 1 diverged at step 1,201", "seed 2 diverged at step 1,202"]
    assert sentences.failed(dense) == ["seed 0 failed"]
    assert sentences.failures(comparison) == (
        "3 of 9 runs failed: dense (seed 0 failed), smoe (seed 1 diverged at step 1,201; seed 2 diverged at step 1,202)"
    )
    assert sentences.failures(make_comparison()) == ""
    nobody = failing(make_comparison(), {"dense": ALL})
    assert [sentences.verdict(nobody, result) for result in nobody.recipes] == [
        "failed",
        "not answered",
        "not answered",
    ]


def test_a_recipe_that_failed_once_is_not_judged_and_not_counted():
    whole = make_comparison((0, 1, 2, 3, 4))
    comparison = failing(whole, {"smoe": (1,)})  # the seeds that are left would do for a test
    found, other = comparison.recipes[1].difference, comparison.recipes[2].difference
    assert found is not None
    assert other is not None
    assert (found.verdict, found.p, found.interval, len(found.by_seed)) == ("failed", None, None, 4)
    assert other.p_holm == other.p  # alone: in the whole comparison it is one of two
    assert whole.recipes[2].difference is not None
    assert whole.recipes[2].difference.p == other.p
    assert sentences.noise(comparison, comparison.recipes[1]).startswith("It failed with some seeds")


def test_means_and_figures_are_of_the_runs_that_finished():
    comparison = failing(make_comparison(), {"smoe": (0,), "dense": (2,)})
    losses = [run.held_out.loss for run in make_comparison().recipes[1].runs[1:]]
    row = rows(comparison)[1]
    assert row.loss == f"{sum(losses) / 2:.3f}"
    assert row.failed == ("seed 0 failed",)
    assert set(expert_figures(comparison)) == {"1/1", "1/2", "2/0", "2/1", "2/2"}  # by the seed's place, not the run's
    assert 'data-run="1/1"' in render(comparison)
    assert 'data-run="1/0"' not in render(comparison)
    differences = [t for t in learning_curves(comparison)["difference"]["data"] if t["meta"] == 1]
    assert len(differences) == 1  # one seed with which both finished
    ends = [make_comparison().recipes[index].runs[1].curve[-1].held_out_loss for index in (0, 1)]
    assert differences[0]["y"][-1] == pytest.approx((ends[1] or 0) - (ends[0] or 0), rel=1e-4)


def test_a_recipe_without_a_run_has_no_heat_maps():
    comparison = failing(make_comparison(), {"smoe": ALL})
    assert moe_recipes(comparison) == [(2, "fine-grained")]
    assert [row.dead_experts for row in rows(comparison)][1] == "–"


def test_a_recipe_that_failed_at_every_rate():
    comparison = failing(WHOLE, {"smoe": ALL})
    found = comparison.sweep
    assert found is not None
    lost = tuple(replace(result, loss=None) for result in found.screened["smoe"])
    chosen = {name: rate for name, rate in found.chosen.items() if name != "smoe"}
    comparison = replace(comparison, sweep=replace(found, screened=found.screened | {"smoe": lost}, chosen=chosen))
    table, figure = rate_table(comparison), rate_figure(comparison)
    assert table is not None
    assert [cell.loss for cell in table.rows[1]] == ["failed"] * 4
    assert figure is not None
    assert {trace["meta"] for trace in figure["data"]} == {0, 2}
    assert [row.learning_rate for row in rows(comparison)] == ["0.001", "–", "0.004"]
    assert "failed" in shown(comparison)
    assert loads(Comparison, dumps(comparison)) == comparison
    with pytest.raises(Misuse, match="must hold every recipe of its comparison, and lacks smoe"):
        replace(comparison, recipes=make_comparison().recipes)


@pytest.mark.parametrize(
    ("finished", "failed"), [((0, 1, 2), (1,)), ((0, 1), ()), ((1, 0), (2,)), ((0,), (2, 1)), ((0, 1), (3,)), ((), ())]
)
def test_every_seed_finished_or_failed_once_and_in_order(finished, failed):
    comparison = make_comparison()
    runs = tuple(comparison.recipes[1].runs[seed] for seed in finished)
    lost = tuple(FailedRun(seed=seed, reason="nan") for seed in failed)
    recipes = (comparison.recipes[0], replace(comparison.recipes[1], runs=runs, failed=lost))
    with pytest.raises(Misuse, match=r"one run per seed \[0, 1, 2\], in that order; smoe has"):
        replace(comparison, recipes=recipes)


def test_records_of_earlier_versions_are_read():
    """They know of no margin and no failed runs, and keep the verdicts that they hold."""
    content = json.loads(dumps(make_comparison()))
    for recipe in content["recipes"]:
        del recipe["failed"]
        for field in ("margin", "p_equivalence", "p_equivalence_holm", "minimum_margin"):
            if recipe["difference"]:
                del recipe["difference"][field]
    content["recipes"][1]["difference"]["verdict"] = "not answered"
    old = loads(Comparison, json.dumps(content))
    assert old.recipes[1].difference is not None
    assert old.recipes[1].difference.margin is None
    assert "no difference is shown" in shown(old)
    assert "margin of" not in render(old).partition("<main>")[2].partition("<script")[0]
