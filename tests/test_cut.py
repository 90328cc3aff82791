"""What a run logs does not depend on how its batches are cut, and no row of a batch is left out by a cut."""

from pathlib import Path

import pytest

from command_line import SMALL, moestro, sources, write_corpus
from moestro.training.resume import read_metrics

RECIPE = "smoe:balance_over=lagged,balance=0.05,router_z=0.001"


def train(monkeypatch: pytest.MonkeyPatch, folder: Path, *more: str) -> list[dict]:
    corpus = sources(folder.parent / "corpus")
    assert moestro(monkeypatch, "train", RECIPE, "--out", str(folder), *corpus, *SMALL, "--tokens", "512", *more) == 0
    return read_metrics(folder / "metrics.jsonl")


@pytest.mark.slow
def test_micro_batches_change_nothing_in_the_log(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    write_corpus(tmp_path / "corpus")
    monkeypatch.setenv("MOESTRO_CACHE", str(tmp_path / "cache"))
    whole = train(monkeypatch, tmp_path / "whole")
    cut = train(monkeypatch, tmp_path / "cut", "--micro-batch-tokens", "32")
    assert len(whole) == len(cut) >= 4
    names = {"loss", "max_vio", "dead_experts", "aux/balance", "aux/router_z", "tokens"}
    for one, other in zip(whole, cut, strict=True):
        assert names <= one.keys() == other.keys()
        for name in names:
            assert other[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--batch-tokens 96", "batch_tokens must be a multiple of 64 (sequence_length 32 times the 2 devices), got 96"),
        ("--batch-tokens 32", "batch_tokens must be a multiple of 64 (sequence_length 32 times the 2 devices), got 32"),
        (
            "--batch-tokens 96 --micro-batch-tokens 96",
            "micro_batch_tokens times the 2 devices must divide batch_tokens (96), got 96",
        ),
    ],
)
@pytest.mark.parametrize("command", ["train smoe --out out", "compare dense smoe --out out"])
def test_rows_that_ranks_cannot_share_evenly_are_refused(
    command: str, flags: str, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    small = [*SMALL[:2], *flags.split(), "--tokens", "960"]
    assert moestro(monkeypatch, *command.split(), *small) == 2
    printed = capsys.readouterr()
    assert said in " ".join((printed.out + printed.err).split())
    assert not list(tmp_path.iterdir())
