"""Experts multiply in the dtype of autocast, on every device and by every path, and runs say in which."""

import logging
from io import StringIO
from typing import Any

import pytest
import tiny_models
import torch
from rich.console import Console

from moestro import AuxLosses, Compete, observe
from moestro.adapters import moe_layers
from moestro.adapters.experts_dtype import Products, experts_dtypes
from moestro.models import AUTOCAST_MM, PADDED_MM
from moestro.training import train as training
from moestro.training.recipes import recipe
from test_aux_losses import assert_equal

BACKENDS = [AUTOCAST_MM, PADDED_MM, "batched_mm", "eager"]
PACKAGES = ["mixtral", "gpt_oss", "deepseek_v3"]


def run(package: str, backend: str, *, bf16: bool, device: str = "cpu", **losses: Any) -> tuple[dict, set]:
    """Gradients of one pass, and the dtypes of all products inside the experts, forward and backward."""
    tiny = tiny_models.build(package, experts_implementation=backend)
    model, inside = tiny.model.to(device), Products()
    inputs = {name: value.to(device) for name, value in tiny.inputs.items()}
    outputs = losses.pop("outputs", False)
    aux = AuxLosses(**losses)
    for layer in moe_layers(model):
        layer.experts.register_forward_pre_hook(lambda *_: inside.__enter__() and None)
        layer.experts.register_forward_hook(lambda *_: inside.__exit__(None, None, None))
    with aux.attach(model), observe(model, lambda record: None, outputs=outputs):
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            loss = model(**inputs).loss
        loss.backward()
    found = {name: p.grad.float().cpu() for name, p in model.named_parameters() if p.grad is not None}
    return found | {"loss": loss.detach().float().cpu()}, inside.dtypes


PATHS: dict[str, dict[str, Any]] = {
    "plain": {},
    "outputs": {"outputs": True},
    "compete": {"distillation": 0.1, "compete": Compete(rate=1.0)},
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_experts_multiply_in_the_dtype_of_autocast(backend: str, path: str):
    _, dtypes = run("mixtral", backend, bf16=True, **PATHS[path])
    assert dtypes == {torch.bfloat16}
    _, dtypes = run("mixtral", backend, bf16=False, **PATHS[path])
    assert dtypes == {torch.float32}


@pytest.mark.parametrize("package", PACKAGES)
def test_values_and_gradients_are_those_of_plain_experts(package: str):
    exact, _ = run(package, "eager", bf16=False)
    same, _ = run(package, AUTOCAST_MM, bf16=False)
    assert_equal(same, exact, 1e-5)
    grouped, _ = run(package, "grouped_mm", bf16=False)
    assert_equal(same, grouped, 0.0)  # without autocast it is the library's own
    rounded, _ = run(package, AUTOCAST_MM, bf16=True)
    eager, _ = run(package, "eager", bf16=True)
    for name in exact:
        scale = exact[name].norm().clamp_min(1e-6)
        assert (rounded[name] - exact[name]).norm() < 0.1 * scale + 2 * (eager[name] - exact[name]).norm(), name


def test_the_librarys_own_grouped_products_are_told_apart(caplog: Any):
    """Attached to somebody's model under autocast: nothing is changed, and it is said."""
    with caplog.at_level(logging.WARNING, "moestro"):
        _, dtypes = run("mixtral", "grouped_mm", bf16=True, balance=0.1)
    assert dtypes == {torch.float32}
    (said,) = [r.getMessage() for r in caplog.records if "experts run in" in r.getMessage()]
    assert "experts run in float32 despite bfloat16 autocast" in said and "autocast_mm" in said
    caplog.clear()
    run("mixtral", AUTOCAST_MM, bf16=True, balance=0.1)
    run("mixtral", "grouped_mm", bf16=False, balance=0.1)
    assert not [r for r in caplog.records if "experts run in" in r.getMessage()]


class Tokenizer:
    eos_token_id = 0

    def __len__(self) -> int:
        return 300

    def get_vocab(self) -> dict[str, int]:
        return {str(index): index for index in range(300)}


class Data:
    tokenizer = Tokenizer()


@pytest.mark.parametrize("cuda", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_run_says_in_which_dtype_its_experts_run(dtype: str, cuda: bool, monkeypatch: Any, unchecked: None):
    """Also with the backend that is chosen where there is CUDA, which runs on any device."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    small = recipe(f"cartesian:vocab_size=300,dtype={dtype}")
    model = training.build_model(small, Data(), 0)  # type: ignore[arg-type]
    printed = StringIO()
    training.say_experts_dtype(model, small, Console(file=printed, width=200))
    expected = {"bfloat16": AUTOCAST_MM if cuda else PADDED_MM, "float32": "grouped_mm"}[dtype]
    assert printed.getvalue() == f"experts run in {dtype} ({expected})\n"


def test_the_probe_sees_what_a_pass_does():
    model = tiny_models.build("mixtral", experts_implementation="grouped_mm").model
    with torch.autocast("cpu", torch.bfloat16):
        assert experts_dtypes(model) == {torch.float32}
        model.set_experts_implementation(AUTOCAST_MM)
        assert experts_dtypes(model) == {torch.bfloat16}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("path", PATHS)
def test_on_a_gpu(path: str):
    exact, _ = run("mixtral", "eager", bf16=False, device="cuda", **PATHS[path])
    rounded, dtypes = run("mixtral", AUTOCAST_MM, bf16=True, device="cuda", **PATHS[path])
    assert dtypes == {torch.bfloat16}
    for name in exact:
        assert (rounded[name] - exact[name]).norm() < 0.1 * exact[name].norm() + 1e-3, name
