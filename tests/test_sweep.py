"""The learning-rate sweep: one grid for all, the best of each, on a seed that stays out of the comparison."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from rich.console import Console

from command_line import SMALL, moestro, sources, write_corpus
from comparison_fixture import make_comparison
from moestro import Misuse, listing
from moestro.compare import after_sweep, with_one_dtype
from moestro.comparison import Comparison, FailedRun, Run, Screened
from moestro.errors import Diverged, Interrupted, TrainingFailed
from moestro.planning import plan, run_folder
from moestro.records import read_record
from moestro.sweep import Grid, best, sweep
from moestro.training import train as training
from moestro.training.failures import FAILED, noted_divergence
from moestro.training.recipe import Recipe
from moestro.training.recipes import recipe

GRID = Grid(learning_rates=(4e-3, 1e-3, 2e-3))
RECIPES = [recipe("smoe"), recipe("cartesian")]


def finished(loss: float) -> Run:
    run = make_comparison((0,)).recipes[0].runs[0]
    return replace(run, held_out=replace(run.held_out, loss=loss))


def one_by_one(run: Callable[[Recipe, int], Run]) -> Callable[[Sequence[Recipe], int], list[Run | FailedRun]]:
    """What trains all runs of a sweep, from what trains one."""

    def make(arm: Recipe, seed: int) -> Run | FailedRun:
        try:
            return run(arm, seed)
        except TrainingFailed as error:
            return FailedRun(seed=seed, reason=str(error))

    return lambda arms, seed: [make(arm, seed) for arm in arms]


def best_near(rates: dict[str, float]):
    """A `run` whose loss grows with the distance from each recipe's own learning rate."""

    def run(recipe: Recipe, seed: int) -> Run:
        return finished(4.0 + abs(recipe.training.learning_rate - rates[recipe.name]))

    return run


def test_every_recipe_is_chosen_at_its_own_best():
    asked = []

    def run(recipe: Recipe, seed: int) -> Run:
        asked.append((recipe.name, recipe.training.learning_rate, recipe.training.tokens, seed))
        return best_near({"smoe": 1e-3, "cartesian": 3.9e-3})(recipe, seed)

    found = sweep(RECIPES, replace(GRID, seed=7, tokens=5000), one_by_one(run))
    assert sorted(asked) == sorted((r.name, rate, 5000, 7) for r in RECIPES for rate in GRID.learning_rates)
    assert found.chosen == {"smoe": 1e-3, "cartesian": 4e-3}
    assert found.seed == 7
    assert found.tokens == {"smoe": 4608, "cartesian": 4608}  # whole steps
    assert [result.learning_rate for result in found.screened["smoe"]] == list(GRID.learning_rates)


def test_of_equal_rates_the_lower_one():
    tied = [Screened(learning_rate=rate, loss=4.0) for rate in (4e-3, 1e-3, 2e-3)]
    assert best(tied) == best(tied[::-1]) == 1e-3


def test_a_rate_at_which_training_fails_is_an_answer():
    def run(recipe: Recipe, seed: int) -> Run:
        if recipe.training.learning_rate > 1e-3:
            raise TrainingFailed("the loss is nan at step 3")
        return finished(9.0)

    found = sweep(RECIPES, GRID, one_by_one(run))
    assert found.chosen == {"smoe": 1e-3, "cartesian": 1e-3}
    assert [result.loss for result in found.screened["smoe"]] == [None, 9.0, None]


def test_a_recipe_that_fails_at_every_rate_has_no_best():
    assert best([Screened(learning_rate=1.0, loss=None)]) is None

    def run(recipe: Recipe, seed: int) -> Run:
        if recipe.name == "smoe":
            raise Diverged("the loss is nan at step 3", step=3)
        return finished(9.0)

    found = sweep(RECIPES, GRID, one_by_one(run))
    assert found.chosen == {"cartesian": 1e-3}
    assert [result.loss for result in found.screened["smoe"]] == [None, None, None]


def test_an_interruption_is_no_answer():
    def run(recipe: Recipe, seed: int) -> Run:
        raise Interrupted("stopped at step 3")

    with pytest.raises(Interrupted):
        sweep(RECIPES, GRID, one_by_one(run))


def test_a_run_that_the_machine_stopped_is_no_answer_either():
    def run(arms: Sequence[Recipe], seed: int) -> list[FailedRun]:
        return [FailedRun(seed=seed, reason="no space left", cause="machine") for _ in arms]

    with pytest.raises(TrainingFailed, match=r"smoe at learning rate 0\.004: no space left"):
        sweep(RECIPES, GRID, run)


def test_a_divergence_is_noted_and_not_tried_again(tmp_path: Path):
    with pytest.raises(Diverged, match=r"^nan$"), noted_divergence(tmp_path, 7):
        raise Diverged("nan", step=3)
    assert read_record(FailedRun, tmp_path / FAILED) == FailedRun(seed=7, reason="nan", step=3)
    tried = []
    with pytest.raises(Diverged, match="failed before: nan") as known, noted_divergence(tmp_path, 7):
        tried.append(1)
    assert (tried, known.value.step) == ([], 3)


def test_seeds_of_the_comparison_are_kept_and_without_any_it_is_the_screening():
    found = sweep(RECIPES, GRID, one_by_one(best_near({"smoe": 1e-3, "cartesian": 2e-3})))
    for seeds, grid, compared, tokens in (
        ((0, 1), replace(GRID, tokens=4096), (0, 1), 350_000),
        ((), replace(GRID, tokens=4096), (1000,), 4096),
        ((), GRID, (1000,), 350_000),
    ):
        the_plan = after_sweep(plan(RECIPES, seeds=seeds, grid=grid), grid, found)
        assert the_plan.seeds == compared
        assert [r.training.learning_rate for r in the_plan.recipes] == [1e-3, 2e-3]
        assert [r.training.tokens for r in the_plan.recipes] == [tokens, tokens]


def test_with_equal_flops_each_recipe_is_screened_on_its_own_tokens():
    chosen = [recipe("smoe"), recipe("fine-grained:top_k=8")]
    the_plan = plan(chosen, seeds=[0], match="flops", allow_unequal=True, grid=GRID)
    found = sweep(the_plan.recipes, GRID, one_by_one(best_near({r.name: 1e-3 for r in chosen})))
    assert found.tokens["smoe"] > found.tokens["fine-grained:top_k=8"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rates": ()}, "at least one learning rate"),
        ({"learning_rates": (1e-3, 0.0)}, "learning_rates must be a tuple whose items are above 0"),
        ({"learning_rates": (1e-3, float("inf"))}, "items are a number above 0"),
        ({"learning_rates": (1e-3, float("nan"))}, "items are a number above 0"),
        ({"learning_rates": (1e-3, 2e-3, 1.0000001e-3)}, "must differ within six digits, got 0.001 twice"),
        ({"learning_rates": (1e-3,), "seed": 1}, "must not be one of the comparison's, got 1"),
        ({"learning_rates": (1e-3,), "seed": -1}, "seed must be at least 0, got -1"),
        ({"learning_rates": (1e-3,), "tokens": 100}, r"sweep_tokens must be at least batch_tokens \(512\), got 100"),
    ],
)
def test_a_grid_that_cannot_work_is_refused(options: dict, message: str):
    with pytest.raises(Misuse, match=message):
        plan(RECIPES, seeds=range(3), grid=Grid(**options))


def test_tokens_of_a_sweep_and_equal_flops_exclude_each_other():
    with pytest.raises(Misuse, match="sweep_tokens requires match"):
        plan(RECIPES, seeds=[0], match="flops", grid=replace(GRID, tokens=4096))


def test_the_dtype_of_an_earlier_start_is_kept_whatever_is_added_first(tmp_path: Path, monkeypatch):
    def measured_anew(device):
        raise AssertionError

    monkeypatch.setattr(training, "faster_dtype", measured_anew)
    earlier = plan(RECIPES[1:], seeds=[0], grid=GRID)
    folder = run_folder(tmp_path, earlier.recipes[0], 1000, earlier)
    folder.mkdir(parents=True)
    decided = replace(RECIPES[1], training=replace(RECIPES[1].training, dtype="bfloat16"))
    (folder / "run.json").write_text(json.dumps({"recipe": asdict(decided)}))
    now = plan(RECIPES, seeds=[0], grid=replace(GRID, learning_rates=(5e-4, 1e-3)))
    now = with_one_dtype(now, tmp_path, Console(quiet=True))
    assert [r.training.dtype for r in now.recipes] == ["bfloat16", "bfloat16"]


def test_a_dtype_that_a_recipe_names_is_its_own(tmp_path: Path):
    chosen = [recipe("smoe", dtype="float32"), recipe("cartesian", dtype="bfloat16")]
    the_plan = plan(chosen, seeds=[0], allow_unequal=True)
    assert with_one_dtype(the_plan, tmp_path, Console(quiet=True)) == the_plan


MISUSE = [
    (["--sweep"], "a sweep needs at least one learning rate"),
    (["--sweep", "1e-3", "--sweep", "0.001"], "must differ within six digits, got 0.001 twice"),
    (["--sweep", "1e-3", "--learning-rate", "1e-3"], "--sweep chooses every recipe's learning_rate"),
    (["--sweep", "1e-3", "--set", "training.learning_rate=1e-3"], "--sweep chooses every recipe's learning_rate"),
    (["dense:learning_rate=1e-3", "--sweep", "1e-3"], "--sweep chooses every recipe's learning_rate"),
    (["--sweep-tokens", "4096"], "--sweep-tokens needs --sweep"),
    (["--seeds", "0"], "seeds must be at least 1 (or 0 beside --sweep: the screening alone), got 0"),
    (["--seeds", "-1", "--sweep", "1e-3"], "seeds must be at least 0, got -1"),
    (["--sweep", "1e-3", "--screening-seed", "2"], "must not be one of the comparison's, got 2"),
]


@pytest.mark.parametrize(("arguments", "message"), MISUSE, ids=[" ".join(a) for a, _ in MISUSE])
def test_misuse_is_one_line(arguments: list[str], message: str, monkeypatch, capsys, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    assert moestro(monkeypatch, "compare", "smoe", *arguments) == 2
    output = capsys.readouterr()
    assert message in output.err
    assert len(output.err.strip().splitlines()) == 1
    assert not any(tmp_path.iterdir())


def test_the_last_learning_rate_is_no_learning_rate(monkeypatch, capsys):
    arguments = ["--sweep", "1e-3", "--set", "final_learning_rate=0", "--dry-run"]
    assert moestro(monkeypatch, "compare", "smoe", *arguments) == 0


@pytest.mark.parametrize(
    ("arguments", "runs", "said"),
    [
        (["--sweep", "1e-3", "--sweep", "2e-3"], 5.0, "3 runs after a sweep of 2 would"),
        (["--sweep", "1e-3", "2e-3", "--sweep-tokens", "175000"], 4.0, "3 runs after a sweep of 2 on 175,000 tokens"),
        (["--sweep", "1e-3", "2e-3", "--seeds", "0"], 2.0, "2 runs would"),
        (["--seeds", "1"], 1.0, "1 run would"),
    ],
)
def test_a_dry_run_counts_the_sweep(arguments: list[str], runs: float, said: str, monkeypatch, capsys):
    counted, estimates = [], listing.estimates

    def counting(recipes, runs):
        counted.append(runs)
        return estimates(recipes, runs)

    monkeypatch.setattr(listing, "estimates", counting)
    assert moestro(monkeypatch, "compare", "smoe", *arguments, "--dry-run") == 0
    assert counted == [runs]
    assert said in " ".join(capsys.readouterr().out.split())


def test_a_sweep_from_end_to_end(tmp_path: Path, monkeypatch, capsys):
    """Screened alone, at a rate that fails too; then with a seed to compare; called again, nothing is trained."""
    monkeypatch.setenv("MOESTRO_CACHE", str(tmp_path / "cache"))
    trained, build_trainer = [], training.build_trainer

    def counting(model, recipe, data, folder: Path, **others):
        trained.append(str(folder.relative_to(tmp_path / "out")))
        return build_trainer(model, recipe, data, folder, **others)

    monkeypatch.setattr(training, "build_trainer", counting)
    corpus = sources(write_corpus(tmp_path / "corpus", documents=8))
    flags = ["--tokens", "512", "--sweep-tokens", "256", "--sweep", "4e-3", "1e30", "--allow-unequal", *SMALL]

    def compare(seeds: int) -> tuple[Comparison, set[str], str]:
        trained.clear()
        place = ["--seeds", str(seeds), "--out", str(tmp_path / "out")]
        assert moestro(monkeypatch, "compare", "smoe", "cartesian", *flags, "max_grad_norm=0", *corpus, *place) == 0
        printed = capsys.readouterr()
        said = " ".join((printed.out + printed.err).split())
        assert len(trained) == len(set(trained))
        return read_record(Comparison, tmp_path / "out" / "comparison.json"), set(trained), said

    screening, runs, said = compare(seeds=0)
    failed = {f"{name}/learning_rate=1e+30,tokens=256/seed-1000" for name in ("smoe", "cartesian")}
    assert runs == failed | {f"{name}/learning_rate=0.004,tokens=256/seed-1000" for name in ("smoe", "cartesian")}
    assert all((tmp_path / "out" / folder / FAILED).exists() for folder in failed)
    assert "Too few seeds to rank: 1 of the 3" in said
    assert said.count("smoe seed 1000 at learning rate 0.004: held-out loss") == 1
    assert (screening.seeds, screening.budget.tokens) == ((1000,), 256)
    assert screening.sweep is not None
    for result in screening.recipes:
        assert screening.sweep.screened[result.name][0].loss == result.runs[0].held_out.loss
        assert screening.sweep.screened[result.name][1].loss is None

    compared, runs, said = compare(seeds=1)
    assert runs == {f"{name}/learning_rate=0.004,tokens=512/seed-0" for name in ("smoe", "cartesian")}
    assert "smoe seed 1000 at learning rate 1e+30: failed before: " in said
    assert compared.sweep == screening.sweep
    assert (compared.seeds, compared.budget.tokens) == ((0,), 512)  # the screening seed is not among them
    again, runs, _ = compare(seeds=1)
    assert runs == set()
    assert replace(again, created=compared.created) == compared
