"""A small run that is finished, copies of it to damage, and whether two runs are the same."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from command_line import SMALL, moestro, sources, write_corpus

RECIPE = "deepseek-v3:balance_over=lagged,balance=0.05,micro_batch_tokens=64"
STEPS = 8
TIMES = {"seconds", "tokens_per_second", "peak_memory_bytes"}


def finished_run(place: Path) -> tuple[Path, list[str]]:
    """Train for `STEPS` steps in `place`; returns the run's folder and the arguments without --out."""
    arguments = ["train", RECIPE, *sources(write_corpus(place / "corpus")), "--tokens", str(128 * STEPS), *SMALL]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOESTRO_CACHE", str(place / "cache"))
        assert moestro(patch, *arguments, "--out", str(place / "whole")) == 0
    return place / "whole", arguments


def unfinished_copy(run: Path, place: Path) -> Path:
    """The run as it is when its process is killed in its last evaluation."""
    shutil.copytree(run, place)
    (place / "summary.json").unlink()
    return place


def endings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let an interruption end like other endings: with SystemExit."""

    def leave(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", leave)


def without_times(record: dict) -> dict:
    return {name: value for name, value in record.items() if name not in TIMES}


def assert_same_run(a: Path, b: Path) -> None:
    """Bit by bit: weights, losses per document, metrics and summary without times."""
    one, two = (load_file(folder / "model" / "model.safetensors") for folder in (a, b))
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name
    losses = [np.load(folder / "held_out.npz") for folder in (a, b)]
    for name in ("nll", "tokens"):
        np.testing.assert_array_equal(losses[0][name], losses[1][name])
    metrics = [(folder / "metrics.jsonl").read_text().splitlines() for folder in (a, b)]
    assert [without_times(json.loads(line)) for line in metrics[0]] == [
        without_times(json.loads(line)) for line in metrics[1]
    ]
    one, two = (without_times(json.loads((folder / "summary.json").read_text())) for folder in (a, b))
    assert one == two
