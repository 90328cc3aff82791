"""Runs that fail do not end a comparison: they are named, noted, left out of pairs, and shown."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from command_line import SMALL, moestro, sources, write_corpus
from comparison_fixture import make_comparison
from moestro import attempts
from moestro.comparison import Comparison, Run
from moestro.errors import Diverged, TrainingFailed
from moestro.records import read_record
from moestro.training import train as training
from moestro.training.failures import FAILED
from moestro.training.recipe import Recipe

pytestmark = pytest.mark.xdist_group("failed-runs")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("failed") / "corpus", documents=8)


@pytest.fixture
def run(corpus: Path, tmp_path: Path, monkeypatch, capsys):
    """`moestro compare` with small runs: (exit code, comparison or None, what was printed, error lines)."""
    monkeypatch.setenv("MOESTRO_CACHE", str(corpus.parent / "cache"))

    def compare(*arguments: str, seeds: int = 3) -> tuple[int, Comparison | None, str, list[str]]:
        place = ["--seeds", str(seeds), "--out", str(tmp_path / "out"), "--tokens", "256", "--allow-unequal"]
        code = moestro(monkeypatch, "compare", *arguments, *place, *sources(corpus), *SMALL)
        printed = capsys.readouterr()
        record = tmp_path / "out" / "comparison.json"
        errors = [line for line in printed.err.splitlines() if line.startswith("moestro:")]
        found = read_record(Comparison, record) if record.exists() else None
        return code, found, " ".join((printed.out + printed.err).split()), errors

    return compare


def instead_of_training(monkeypatch, fails: Callable[[Recipe, int], Exception | None]) -> list[tuple[str, int]]:
    """Let runs return at once, or fail as `fails` says; returns the list of runs that were begun."""
    begun: list[tuple[str, int]] = []

    def train(recipe: Recipe, data, folder: Path, *, seed: int, **others) -> Run:
        begun.append((recipe.name, seed))
        if (error := fails(recipe, seed)) is not None:
            raise error
        np.savez(folder / "held_out.npz", nll=np.array([4.0 + seed, 5.0]), tokens=np.array([3, 4]))
        finished = make_comparison(tuple(range(5))).recipes[0].runs[seed]
        return replace(
            finished, curve=(), held_out=replace(finished.held_out, loss=4 + seed / 7 + len(recipe.name) / 99)
        )

    monkeypatch.setattr(attempts, "train", train)
    return begun


def test_one_arm_that_diverges_is_shown_and_the_others_go_on(run, monkeypatch, tmp_path: Path):
    """A real divergence; called again, nothing is trained."""
    trained, build_trainer = [], training.build_trainer

    def counting(model, recipe, data, folder: Path, **others):
        trained.append(folder.name)
        return build_trainer(model, recipe, data, folder, **others)

    monkeypatch.setattr(training, "build_trainer", counting)
    hot = "smoe:learning_rate=1e30,max_grad_norm=0"
    code, found, said, errors = run("dense", hot, "smoe", seeds=1)
    assert code == 1
    assert len(trained) == 3
    assert errors == [f"moestro: 1 of 3 runs failed: {hot} (seed 0 diverged at step 2)"]
    assert f"{hot} seed 0: parameter model.embed_tokens.weight is not finite after step 2; try a lower" in said
    assert found is not None
    assert [(len(result.runs), len(result.failed)) for result in found.recipes] == [(1, 0), (0, 1), (1, 0)]
    assert found.recipes[1].failed[0].step == 2
    assert "try a lower learning_rate" in found.recipes[1].failed[0].reason
    report = (tmp_path / "out" / "report.html").read_text()
    assert "seed 0 diverged at step 2" in report
    assert 'data-verdict="failed"' in report

    trained.clear()
    code, again, said, errors = run("dense", hot, "smoe", seeds=1)
    assert (code, trained) == (1, [])
    assert f"{hot} seed 0: failed before: parameter model.embed_tokens.weight is not finite" in said
    assert "to try again, remove" in said
    assert again is not None
    assert again.recipes[1].failed[0].step == 2
    assert errors == [f"moestro: 1 of 3 runs failed: {hot} (seed 0 diverged at step 2)"]


def test_pairs_are_seeds_with_which_both_finished(run, monkeypatch):
    fails = {("dense", 1), ("fine-grained", 4)}
    instead_of_training(monkeypatch, lambda r, s: Diverged("nan", step=s) if (r.name, s) in fails else None)
    code, found, said, errors = run("dense", "smoe", "fine-grained", seeds=5)
    assert code == 1
    assert errors == [
        "moestro: 2 of 15 runs failed: dense (seed 1 diverged at step 1), fine-grained (seed 4 diverged at step 4)"
    ]
    assert found is not None
    dense, smoe, fine = found.recipes
    assert [run.seed for run in dense.runs] == [0, 2, 3, 4]
    assert smoe.difference is not None
    assert len(smoe.difference.by_seed) == 4
    assert smoe.difference.verdict == "not answered"  # the made-up losses differ by the same with every seed
    assert smoe.document_bootstrap is not None
    assert fine.difference is not None
    assert (len(fine.difference.by_seed), fine.difference.verdict, fine.difference.p) == (3, "failed", None)
    assert "higher than dense, 4 seeds" in said or "lower than dense, 4 seeds" in said


@pytest.mark.parametrize(
    ("failing", "headline"),
    [
        ({"dense", "smoe"}, "Every run failed"),
        ({"dense"}, "dense failed with every seed: there is nothing to compare with"),
        ({"smoe"}, "smoe failed: there is nothing to compare with dense"),
    ],
)
def test_whole_recipes_may_fail(run, monkeypatch, tmp_path: Path, failing: set[str], headline: str):
    instead_of_training(monkeypatch, lambda r, s: Diverged("nan", step=3) if r.name in failing else None)
    code, found, said, errors = run("dense", "smoe")
    assert code == 1
    assert len(errors) == 1
    assert found is not None
    assert said.count("diverged at step 3") >= 3 * len(failing)
    assert headline in said
    assert headline in (tmp_path / "out" / "report.html").read_text()
    assert found.recipes[1].difference is None
    assert found.recipes[1].document_bootstrap is None


def test_what_may_pass_is_tried_again(run, monkeypatch, tmp_path: Path):
    """A failure that is not the run's own numbers, such as a file that cannot be written, is not noted."""
    begun = instead_of_training(monkeypatch, lambda r, s: TrainingFailed("lost") if r.name == "smoe" else None)
    assert run("dense", "smoe", seeds=1)[0] == 1
    assert not list((tmp_path / "out").rglob(FAILED))
    begun.clear()
    code, found, _, errors = run("dense", "smoe", seeds=1)
    assert ("smoe", 0) in begun
    assert errors == ["moestro: 1 of 2 runs failed: smoe (seed 0 failed)"]
    instead_of_training(monkeypatch, lambda r, s: None)
    code, found, _, errors = run("dense", "smoe", seeds=1)
    assert (code, errors) == (0, [])
    assert found is not None
    assert found.recipes[1].failed == ()


def test_a_full_disk_fails_one_run_and_the_others_go_on(run, monkeypatch, tmp_path: Path):
    full = OSError(28, "No space left on device", "out/x")
    begun = instead_of_training(monkeypatch, lambda r, s: full if r.name == "smoe" else None)
    code, found, said, errors = run("dense", "smoe", "fine-grained", seeds=1)
    assert (code, begun) == (1, [("dense", 0), ("smoe", 0), ("fine-grained", 0)])
    assert "smoe seed 0: No space left on device: out/x" in said
    assert errors == ["moestro: 1 of 3 runs failed: smoe (seed 0 failed)"]
    assert found is not None
    assert found.recipes[1].failed[0].cause == "machine"
    assert not list((tmp_path / "out").rglob(FAILED))
    monkeypatch.setattr(attempts, "train", with_screening_seed(attempts.train))
    _, _, _, errors = run("dense", "smoe", "fine-grained", "--sweep", "1e-3", seeds=1)
    assert errors == ["moestro: smoe at learning rate 0.001: No space left on device: out/x"]


def test_a_recipe_that_fails_at_every_rate_of_a_sweep(run, monkeypatch):
    instead_of_training(monkeypatch, lambda r, s: Diverged("nan", step=1) if r.name == "smoe" else None)
    monkeypatch.setattr(attempts, "train", with_screening_seed(attempts.train))
    code, found, said, errors = run("dense", "smoe", "fine-grained", "--sweep", "1e-3", "2e-3", seeds=1)
    assert code == 1
    assert errors == ["moestro: 1 of 3 runs failed: smoe (seed 0 failed)"]
    assert found is not None
    assert found.sweep is not None
    assert set(found.sweep.chosen) == {"dense", "fine-grained"}
    assert found.recipes[1].failed[0].reason == "every learning rate of the sweep failed"
    assert found.recipes[2].difference is not None
    assert "every learning rate of the sweep failed" in said
    code, found, _, _ = run("dense", "smoe", "--sweep", "1e-3", "2e-3", seeds=0)
    assert code == 1
    assert found is not None
    assert [run.seed for run in found.recipes[1].failed] == [1000]


def with_screening_seed(train: Callable[..., Run]) -> Callable[..., Run]:
    """The made-up runs have seeds up to 4; a screening run is one of them under its own seed."""

    def screened(*arguments, seed: int, **others) -> Run:
        return replace(train(*arguments, seed=seed % 1000, **others), seed=seed)

    return screened


def test_a_run_whose_last_losses_are_not_finite_fails_in_one_line(corpus, tmp_path: Path, monkeypatch, capsys):
    """The last step's update can ruin the model without a training loss that shows it."""
    monkeypatch.setenv("MOESTRO_CACHE", str(corpus.parent / "cache"))
    evaluation = training.held_out_evaluation

    def ruined(*arguments, **others):
        found = evaluation(*arguments, **others)
        return replace(found, nll=found.nll * np.nan)

    monkeypatch.setattr(training, "held_out_evaluation", ruined)
    place = ["--tokens", "256", "--out", str(tmp_path / "out")]
    assert moestro(monkeypatch, "train", "dense", *place, *sources(corpus), *SMALL) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("moestro:")]
    assert errors == ["moestro: the held-out loss is nan after the last step, 2"]
