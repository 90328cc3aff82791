"""Runs: killed and resumed they end as if nothing had happened, and bad input costs one line and nothing else."""

import json
import shutil
import signal
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from command_line import SMALL, moestro, sources, start, write_corpus
from moestro import Misuse
from moestro.training.recipes import recipe
from moestro.training.runs import open_run

pytestmark = pytest.mark.xdist_group("runs")  # they share the uninterrupted run
TRAIN = ["--tokens", "5120", *SMALL]  # 40 steps, a checkpoint every 10


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return sources(write_corpus(tmp_path_factory.mktemp("corpus")))


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOESTRO_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module")
def uninterrupted(corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    process = start("train", RECIPE, "--out", str(folder), *corpus, *TRAIN)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return folder


RECIPE = (
    "deepseek-v3+compete:balance_over=lagged,balance=0.05,orthogonality=1e-3,variance=1e-3,scaling=relative,"
    "start=0,rate=0.1,micro_batch_tokens=64"
)
"""It has all the state that a resumed run must restore: lagged statistics, scales, selection biases, accumulation, who
competes and what is known of responses."""


def losses(folder: Path) -> list[tuple]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    names = ["step", "loss", "held_out_loss", "max_vio", "aux/balance", "aux/distillation", "competition/agreement"]
    names.append("competition/changed")
    layer = "competing/model.layers.1.feed_forward.0"
    assert sum(line[layer] for line in lines) == 40 * 4 * 4  # steps, sequences, a tenth of their tokens rounded up
    return [tuple(line.get(name) for name in [*names, layer]) for line in lines]


def assert_same_run(a: Path, b: Path) -> None:
    one, two = (load_file(folder / "model" / "model.safetensors") for folder in (a, b))
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name
    assert losses(a) == losses(b)
    assert (
        json.loads((a / "summary.json").read_text())["held_out"]
        == json.loads((b / "summary.json").read_text())["held_out"]
    )


KILL_IN_TRAINING = """
import os, signal
import moestro.training.trainer as t
original = t.PretrainingTrainer.training_step
def step(self, *args, **kwargs):
    if self.state.global_step == 26:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, *args, **kwargs)
t.PretrainingTrainer.training_step = step
"""
KILL_IN_CHECKPOINT = """
import os, signal
import moestro.training.trainer as t
original = t.mark_complete
def mark(folder):
    if folder.name == "checkpoint-20":
        os.kill(os.getpid(), signal.SIGKILL)
    original(folder)
t.mark_complete = mark
"""


@pytest.mark.parametrize(
    "prelude",
    [
        pytest.param(KILL_IN_TRAINING, id="in training"),
        pytest.param(KILL_IN_CHECKPOINT, id="in a checkpoint", marks=pytest.mark.slow),
    ],
)
def test_killed_and_resumed_is_bit_equal(prelude: str, corpus: list[str], uninterrupted: Path, tmp_path: Path):
    arguments = ["train", RECIPE, "--out", str(tmp_path / "run"), *corpus, *TRAIN]
    killed = start(*arguments, prelude=prelude)
    killed.communicate(timeout=300)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "run" / "summary.json").exists()
    resumed = start(*arguments)
    _, errors = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, errors
    expected = "checkpoint-20" if prelude == KILL_IN_TRAINING else "checkpoint-10"
    assert f"resuming from {tmp_path / 'run' / expected}" in errors.replace("\n", "")
    assert ("was never finished" in errors) == (prelude == KILL_IN_CHECKPOINT)
    assert_same_run(tmp_path / "run", uninterrupted)


def test_interrupt_saves_and_resumes(corpus: list[str], uninterrupted: Path, tmp_path: Path):
    # Once: in the second micro-batch of step 14. A second signal would end the process at once.
    prelude = KILL_IN_TRAINING.replace("SIGKILL", "SIGINT").replace("== 26", "== 13 and self._task_loss")
    arguments = ["train", RECIPE, "--out", str(tmp_path / "run"), *corpus, *TRAIN]
    stopped = start(*arguments, prelude=prelude)
    _, errors = stopped.communicate(timeout=300)
    assert stopped.returncode == 130, errors
    assert "stopped at step 14; the same command goes on from there" in errors
    assert "Traceback" not in errors
    resumed = start(*arguments)
    _, errors = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, errors
    one, two = (load_file(f / "model" / "model.safetensors") for f in (tmp_path / "run", uninterrupted))
    assert all(torch.equal(one[name], two[name]) for name in two)


@pytest.fixture
def half_done(uninterrupted: Path, tmp_path: Path) -> Path:
    """A run with checkpoints that is not finished."""
    folder = tmp_path / "half"
    shutil.copytree(uninterrupted, folder)
    (folder / "summary.json").unlink()
    return folder


def test_finished_run_is_only_read(uninterrupted: Path, corpus: list[str], monkeypatch, capsys):
    before = (uninterrupted / "summary.json").stat().st_mtime_ns
    assert moestro(monkeypatch, "train", RECIPE, "--out", str(uninterrupted), *corpus, *TRAIN) == 0
    assert "held-out loss" in capsys.readouterr().out
    assert (uninterrupted / "summary.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("damage", ["truncate", "flip a byte", "remove"])
def test_corrupt_checkpoint_is_an_error(damage: str, half_done: Path, corpus: list[str], monkeypatch, capsys):
    file = half_done / "checkpoint-40" / "model.safetensors"
    content = file.read_bytes()
    if damage == "truncate":
        file.write_bytes(content[:-7])
    elif damage == "flip a byte":
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    else:
        file.unlink()
    assert moestro(monkeypatch, "train", RECIPE, "--out", str(half_done), *corpus, *TRAIN) == 2
    errors = capsys.readouterr().err
    assert "checkpoint-40 is corrupt" in errors.replace("\n", "")
    assert "Traceback" not in errors


def test_folder_of_another_recipe_is_refused(uninterrupted: Path, corpus: list[str], monkeypatch, capsys):
    arguments = ["train", RECIPE, "--out", str(uninterrupted), *corpus, *TRAIN]
    assert moestro(monkeypatch, *arguments, "--learning-rate", "0.001") == 2
    assert "holds another run: learning_rate is 0.002 there and 0.001 here" in capsys.readouterr().err
    assert (uninterrupted / "summary.json").exists()


def test_other_words_for_a_recipe_are_no_other_run(tmp_path: Path):
    description = {"recipe": asdict(recipe("smoe")), "seed": 0, "data": "hash"}
    open_run(tmp_path / "run", description)
    reworded = replace(recipe("smoe"), description="said better")
    open_run(tmp_path / "run", description | {"recipe": asdict(reworded)})
    other = replace(recipe("smoe"), name="another")
    with pytest.raises(Misuse, match="name is 'smoe' there and 'another' here"):
        open_run(tmp_path / "run", description | {"recipe": asdict(other)})


def test_folder_with_other_files_is_refused(corpus: list[str], tmp_path: Path, monkeypatch, capsys):
    (tmp_path / "thesis.txt").write_text("mine")
    assert moestro(monkeypatch, "train", RECIPE, "--out", str(tmp_path), *corpus, *TRAIN) == 2
    assert "must be empty or hold a run" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_loss_that_is_not_finite_stops_the_run(corpus: list[str], tmp_path: Path, monkeypatch, capsys):
    arguments = ["train", "smoe", "--out", str(tmp_path / "run"), *corpus, *TRAIN]
    assert moestro(monkeypatch, *arguments, "--learning-rate", "1e30", "--set", *SMALL[-4:], "max_grad_norm=0") == 1
    errors = capsys.readouterr().err
    assert "the loss is nan at step" in errors
    assert "first in " in errors
    assert "Traceback" not in errors


BAD = [
    (["train", "smeo"], "unknown recipe 'smeo' (did you mean 'smoe'?)"),
    (["train", "smoe:topk=3"], "unknown field 'topk' (did you mean 'top_k'?)"),
    (["train", "smoe:top_k=17"], "top_k must lie between 1 and num_experts (16), got 17"),
    (["train", "smoe:top_k"], "an override must read field=value, got 'top_k'"),
    (["train", "smoe", "--size", "tniy"], "unknown size 'tniy' (did you mean 'tiny'?)"),
    (["train", "smoe", "--tokens", "100"], "tokens must be at least batch_tokens (512), got 100"),
    (["train", "smoe", "--max-bytes", "0"], "max_bytes must be at least 1, got 0"),
    (["train", "smoe", "--max-held-out-bytes", "0"], "max_held_out_bytes must be at least 1, got 0"),
    (["train", "smoe", "--batch-tokens", "300"], "batch_tokens must be a multiple of sequence_length (128), got 300"),
    (["train", "smoe", "--data", "nowhere/at/all.txt"], "nowhere/at/all.txt"),
    (["compare", "smoe", "smoe"], "every recipe must be named once, got 'smoe' 2 times"),
    (["compare", "smoe", "smoe:width=64"], "budgets must be equal: active parameters differ"),
    (["compare", "smoe", "dense:tokens=4096"], "budgets must be equal: tokens differ"),
    (["compare", "smoe", "dense:dtype=float32"], "budgets must be equal: dtype differs"),
    (["train", "dense:bias_rate=0.1"], "bias_rate needs a router with a selection bias, and this recipe has none"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(a) for a, _ in BAD])
def test_misuse_is_one_line(arguments: list[str], message: str, monkeypatch, capsys, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    assert moestro(monkeypatch, *arguments) == 2
    output = capsys.readouterr()
    assert message in output.err
    assert len(output.err.strip().splitlines()) == 1
    assert output.out == ""
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_a_compiled_run_learns_the_same(corpus: list[str], tmp_path: Path):
    found = []
    for compiled in ("True", "False"):
        folder = tmp_path / compiled
        process = start("train", RECIPE, "--compile", compiled, "--out", str(folder), *corpus, *TRAIN)
        _, errors = process.communicate(timeout=900)
        assert process.returncode == 0, errors
        assert "recompile_limit" not in errors
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        found.append([json.loads(line)["loss"] for line in lines])
    assert found[0] == pytest.approx(found[1], rel=2e-3)
