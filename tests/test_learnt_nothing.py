"""A run that learnt nothing is said to have learnt nothing, and an ordinary short one is not accused."""

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from command_line import SMALL, moestro, sources, write_corpus
from comparison_fixture import make_comparison
from moestro.comparison import Comparison, Run
from moestro.records import read_record
from moestro.report import sentences
from moestro.report.html import render
from moestro.training import held_out

COMPARISON = make_comparison()


def changed(run: Run, *, loss: float, steps: int | None = 640, known: bool = True) -> Run:
    uniform, unigram = (8.3, 6.0) if known else (None, None)
    return replace(run, steps=steps, held_out=replace(run.held_out, loss=loss, uniform=uniform, unigram=unigram))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"loss": 5.98}, ""),
        (
            {"loss": 5.995},
            "learnt nothing: its held-out loss of 5.995 is not 0.01 below token frequencies alone (6.000)",
        ),
        ({"loss": 8.28, "steps": 99}, ""),  # a short run may be on its way
        (
            {"loss": 8.295, "steps": 99},
            "learnt nothing: its held-out loss of 8.295 is not 0.01 below a blind guess (8.300)",
        ),
        ({"loss": 9.0, "steps": None, "known": False}, ""),  # a record of an earlier version
    ],
)
def test_the_rule(changes, said):
    assert sentences.learnt_nothing(changed(COMPARISON.recipes[0].runs[0], **changes)) == said


DEAD = [(8, 51_200, ""), (9, 51_200, "36 of 64 experts are dead"), (9, 42, "")]


@pytest.mark.parametrize(("dead", "tokens", "said"), DEAD)
def test_most_experts_dead(dead, tokens, said):
    """Four layers of 16 experts; too few tokens say nothing."""
    run = COMPARISON.recipes[1].runs[0]
    layers = tuple(replace(layer, figures=layer.figures | {"dead_experts": float(dead)}) for layer in run.layers)
    domains = {name: replace(loss, tokens=tokens) for name, loss in run.held_out.domains.items()}
    assert sentences.most_are_dead(replace(run, layers=layers, held_out=replace(run.held_out, domains=domains))) == said


def test_the_report_says_it_first():
    def dead(comparison: Comparison, recipes: range) -> Comparison:
        results = [
            replace(r, runs=tuple(changed(run, loss=8.3) for run in r.runs)) if index in recipes else r
            for index, r in enumerate(comparison.recipes)
        ]
        return replace(comparison, recipes=tuple(results))

    one, every = dead(COMPARISON, range(1, 2)), dead(COMPARISON, range(3))
    assert sentences.warnings(COMPARISON) == []
    assert [words.partition(":")[0] for words in sentences.warnings(one)] == [f"smoe seed {seed}" for seed in range(3)]
    assert sentences.headline(one) == sentences.headline(COMPARISON)
    assert sentences.headline(every) == "No run learnt anything: none predicts held-out text better than chance"
    page = render(one)
    assert page.index("Runs that did not learn") < page.index("Results")
    assert "Runs that did not learn" not in render(COMPARISON)


def test_unigram_loss_is_that_of_smoothed_frequencies():
    train, predicted = [0, 1, 1, 2, 1], [1, 3, 1]
    counts = Counter(train) + Counter(range(5))
    expected = -sum(math.log(counts[token] / counts.total()) for token in predicted) / 3
    found = held_out.unigram_loss(np.array(train, dtype=np.uint16), np.array(predicted, dtype=np.uint16), 5)
    assert found == pytest.approx(expected)


def test_a_run_at_an_absurd_rate_is_said_to_have_learnt_nothing(tmp_path: Path, monkeypatch, capsys):
    """Beside one that is as short and learns."""
    corpus = sources(write_corpus(tmp_path / "corpus", documents=8))
    monkeypatch.setenv("MOESTRO_CACHE", str(tmp_path / "cache"))
    arguments = [*corpus, "--tokens", "1280", "--allow-unequal", *SMALL]
    hot = "smoe:learning_rate=1e3"
    place = ["--seeds", "1", "--out", str(tmp_path / "out")]
    assert moestro(monkeypatch, "compare", "smoe", hot, *arguments, *place) == 0
    said = " ".join("".join(capsys.readouterr()).split())
    assert f"{hot} seed 0: warning: learnt nothing: its held-out loss of" in said
    found = read_record(Comparison, tmp_path / "out" / "comparison.json")
    assert [words.partition(":learning")[0] for words in sentences.warnings(found)] == ["smoe"]
    sound, lost = (result.runs[0].held_out for result in found.recipes)
    assert sound.unigram is not None
    assert sound.uniform == pytest.approx(math.log(300))
    assert sound.unigram < sound.uniform < lost.loss + 0.01
