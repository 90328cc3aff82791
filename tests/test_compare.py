"""`moestro compare` from end to end: trained, written, printed; called again, only read."""

import time
from dataclasses import replace
from pathlib import Path

import pytest

from command_line import SMALL, moestro, sources, write_corpus
from comparison_fixture import make_comparison
from moestro import Misuse
from moestro.compare import budget
from moestro.comparison import Comparison, CurvePoint, RecipeResult
from moestro.planning import plan, run_folder
from moestro.records import read_record
from moestro.sweep import Grid, at_rate
from moestro.training.recipes import recipe

COMPARE = ["compare", "dense:width=24", "smoe", "--tokens", "1280", "--seeds", "2", *SMALL]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("compare")
    write_corpus(place / "corpus")
    return place


@pytest.mark.xdist_group("compare")
def test_compare_trains_writes_prints_and_repeats(folder: Path, monkeypatch, capsys):
    monkeypatch.setenv("MOESTRO_CACHE", str(folder / "cache"))
    arguments = [*COMPARE, *sources(folder / "corpus"), "--out", str(folder / "out")]
    # One --set holds all fields: a later one would replace it.
    arguments.remove("width=8")
    arguments[arguments.index("smoe")] = "smoe:width=8"
    arguments.append("--allow-unequal")  # at this size the router alone is more than 2 % of the parameters
    assert moestro(monkeypatch, *arguments) == 0
    printed = capsys.readouterr().out
    comparison = read_record(Comparison, folder / "out" / "comparison.json")
    assert [result.name for result in comparison.recipes] == ["dense:width=24", "smoe:width=8"]
    assert comparison.seeds == (0, 1)
    assert not comparison.budget.equal
    assert "active parameters differ" in comparison.budget.differences[0]
    assert comparison.budget.tokens == 1280
    assert set(comparison.recipes[0].runs[0].held_out.domains) == {"domain0", "domain1"}
    assert comparison.recipes[0].runs[0].layers == ()
    assert len(comparison.recipes[1].runs[0].layers) == 2
    difference = comparison.recipes[1].difference
    assert difference is not None
    losses = [[run.held_out.loss for run in result.runs] for result in comparison.recipes]
    assert difference.by_seed == pytest.approx([b - a for a, b in zip(*losses, strict=True)])
    assert difference.verdict == "too few seeds to rank"
    assert "smoe:width=8" in printed
    assert "report.html" in printed
    report = (folder / "out" / "report.html").read_text()
    assert "smoe:width=8" in report

    before = {path: path.stat().st_mtime_ns for path in (folder / "out").rglob("summary.json")}
    assert len(before) == 4
    start = time.perf_counter()
    assert moestro(monkeypatch, *arguments) == 0
    assert {path: path.stat().st_mtime_ns for path in (folder / "out").rglob("summary.json")} == before
    assert time.perf_counter() - start < 30
    again = read_record(Comparison, folder / "out" / "comparison.json")
    assert replace(again, created=comparison.created, environment=comparison.environment) == comparison


def test_match_flops_gives_every_recipe_the_same_flops():
    chosen = [recipe("smoe"), recipe("fine-grained:top_k=8")]
    the_plan = plan(chosen, seeds=[0], match="flops", allow_unequal=True)
    first, second = (r.training.tokens * r.training_flops() for r in the_plan.recipes)
    assert second == pytest.approx(first, rel=1e-4)
    assert the_plan.recipes[1].training.tokens < the_plan.recipes[0].training.tokens


def test_unequal_is_refused_or_marked():
    chosen = [recipe("smoe"), recipe("smoe:top_k=4")]
    with pytest.raises(Misuse, match="active parameters differ: smoe has 2,528,000, smoe:top_k=4 has"):
        plan(chosen, seeds=[0])
    the_plan = plan(chosen, seeds=[0], allow_unequal=True)
    assert len(the_plan.differences) == 1


def test_budgets_are_checked_by_what_was_trained():
    """A run of an earlier version that trained a step too many shows by its learning curve."""
    found = make_comparison()
    chosen = [recipe("smoe"), recipe("fine-grained")]
    planned = chosen[0].training.steps * chosen[0].training.batch_tokens
    the_plan = plan(chosen, seeds=[0, 1], allow_unequal=True)

    def results(*tokens: int | None) -> list[RecipeResult]:
        runs = [replace(found.recipes[0].runs[0], seed=i % 2, tokens=count, curve=()) for i, count in enumerate(tokens)]
        pairs = zip(found.recipes, chosen, (runs[:2], runs[2:]), strict=False)
        return [replace(result, name=r.name, runs=tuple(of_recipe)) for result, r, of_recipe in pairs]

    assert budget(the_plan, results(*[planned] * 4)).equal
    assert budget(the_plan, results(*[None] * 4)).equal
    shorter = budget(the_plan, results(*[planned - 128] * 4))  # all alike: passes over a short text
    assert (shorter.equal, shorter.tokens) == (True, planned - 128)
    longer = budget(the_plan, results(planned, planned, planned, planned + 128))
    assert not longer.equal
    assert f"fine-grained seed 1 was trained on {planned + 128:,} of {planned:,} tokens" in longer.differences[0]
    old = results(*[None] * 4)
    last = CurvePoint(step=1, tokens=planned + 128, loss=1.0)
    old[1] = replace(old[1], runs=(old[1].runs[0], replace(old[1].runs[1], curve=(last,))))
    assert budget(the_plan, [replace(old[0], runs=results(planned, planned)[0].runs), old[1]]).differences


@pytest.mark.parametrize("size", ["tiny", "small"])
def test_the_recipes_of_a_size_are_a_fair_comparison(size: str):
    the_plan = plan([recipe(name, size) for name in ("dense", "smoe", "fine-grained", "deepseek-v3")], seeds=[0])
    assert the_plan.differences == ()


def test_run_folders_are_safe_names(tmp_path: Path):
    hostile = replace(recipe("smoe"), name="../../smoe:a=b/<x>")
    place = run_folder(tmp_path, hostile, 0, plan([hostile], seeds=[0]))
    assert place.parent.parent == tmp_path
    assert "<" not in str(place)


def test_a_sweep_has_a_folder_per_learning_rate_and_budget(tmp_path: Path):
    grid = Grid(learning_rates=(1e-3,))
    the_plan = plan([recipe("smoe")], seeds=[0], grid=grid)
    place = run_folder(tmp_path, at_rate(the_plan.recipes[0], 1e-3, grid), 1000, the_plan)
    assert place == tmp_path / "smoe" / "learning_rate=0.001,tokens=350000" / "seed-1000"


def test_dry_run_counts_what_does_not_fit_here(monkeypatch, capsys, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    assert moestro(monkeypatch, "compare", "smoe", "fine-grained", "--size", "7b", "--dry-run") == 0
    output = capsys.readouterr().out
    assert "7,245,203,456" in output
    assert "1,608,058,880" in output
    assert not any(tmp_path.iterdir())
