"""Auxiliary losses on two gloo ranks equal those of one process: data parallel, and expert parallel with FSDP2."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models
import torch
from transformers import PreTrainedModel

from moestro import Dense, MoE, MoestroConfig, MoestroForCausalLM
from test_aux_losses import assert_equal

OURS = ["moestro serial", "moestro parallel", "moestro tied", "moestro shared-pool"]
WORKER = Path(__file__).parent / "sharded_worker.py"


def our_model(composition: str) -> PreTrainedModel:
    moe = MoE(num_experts=4, top_k=2, width=16, num_shared=1, mix="convex")
    config = MoestroConfig(
        vocab_size=tiny_models.VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        feed_forward=[[Dense(width=16), moe], [moe, moe]],
        composition=composition,
    )
    model = MoestroForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def run(folder: Path, how: str) -> dict:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    launcher = [] if how == "one" else ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"]
    command = [sys.executable, *launcher, str(WORKER), str(folder), how]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / f"{how}.pt")


@pytest.mark.slow
@pytest.mark.parametrize("package", ["mixtral", "olmoe", "deepseek_v3", "gpt_oss", *OURS])
def test_two_ranks_equal_one(package: str, tmp_path: Path):
    inputs = tiny_models.build("mixtral", padded=True).inputs
    model = our_model(package.partition(" ")[2]) if package in OURS else tiny_models.build(package).model
    model.save_pretrained(tmp_path)
    torch.save(inputs, tmp_path / "inputs.pt")
    one = run(tmp_path, "one")
    assert one["state"]["steps"] == 2
    for how in ("ddp", "expert-parallel", *(["fsdp"] if package in OURS else [])):
        two = run(tmp_path, how)
        torch.testing.assert_close(two["loss"], one["loss"], rtol=1e-5, atol=1e-6)
        assert_equal(two["gradients"], one["gradients"])
        for name, state in one["state"]["layers"].items():
            for statistic, value in state.items():
                assert two["state"]["layers"][name][statistic] == pytest.approx(value, abs=1e-6)
