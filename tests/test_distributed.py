"""Two gloo ranks train what one process trains."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from command_line import SMALL, sources, write_corpus
from moestro.training.resume import read_metrics
from test_aux_losses import assert_equal

RECIPES = [
    "deepseek-v3:balance_over=lagged,balance=0.05,bias_rate=0.01",
    "smoe+compete:balance_over=lagged,rate=0.2,distillation=0.3",
    "cartesian+compete-v2-paper:balance_over=lagged,rate=0.5,distillation=1",
]


def train(recipe: str, folder: Path, corpus: list[str], *launcher: str) -> None:
    arguments = ["train", recipe, "--out", str(folder), *corpus, "--tokens", "2560", *SMALL]
    command = [sys.executable, *launcher, "-m", "moestro.cli", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MOESTRO_CACHE": str(folder.parent / "cache")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("held-out loss") == 1


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_two_ranks_equal_one(recipe: str, tmp_path: Path):
    corpus = sources(write_corpus(tmp_path / "corpus"))
    train(recipe, tmp_path / "one", corpus)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    train(
        recipe, tmp_path / "two", corpus, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"
    )
    one, two = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("one", "two"))
    if "bias_rate" in recipe:
        assert any(tensor.any() for name, tensor in one.items() if name.endswith("e_score_correction_bias"))
    assert_equal(two, one, 1e-5)
    logged = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "two")]
    for alone, together in zip(*logged, strict=True):
        for name in alone:
            if name.startswith("aux/") or name in ("loss", "max_vio", "dead_experts"):
                assert together[name] == pytest.approx(alone[name], rel=1e-4, abs=1e-6), name
    points = [
        [line for line in read_metrics(tmp_path / name / "metrics.jsonl") if "held_out_loss" in line]
        for name in ("one", "two")
    ]
    assert len(points[0]) == len(points[1]) > 2
    for alone, together in zip(*points, strict=True):
        assert together["held_out_loss"] == pytest.approx(alone["held_out_loss"], rel=1e-5)
        # Each rank's sample is of its own rows: means of two samples, near the one sample's.
        assert together["competition/response"] == pytest.approx(alone["competition/response"], rel=0.1)
        assert together.keys() == alone.keys()
