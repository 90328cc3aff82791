"""What "equal" means in these tests, and which experts backends must be."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import moestro.models  # noqa: F401  # registers our backends
from moestro import Dense, MoE, MoestroConfig, MoestroForCausalLM, RouterRule

NEED_CUDA = {"deepgemm", "sonicmoe"}
"""Backends whose kernels exist for CUDA alone (transformers downloads them)."""

CPU_BACKENDS = ["eager", *sorted(set(ALL_EXPERTS_FUNCTIONS) - NEED_CUDA)]

TOLERANCE = 1e-5
"""Relative, in the norm of each tensor, fp32."""

MARGIN = 1e-4
"""Scores nearer than this may be ranked either way, so drawn cases keep further apart."""


def assert_equal(actual: Tensor, expected: Tensor, *, floor: float = 0.0, what: str = "") -> None:
    """The norm of the difference is within `TOLERANCE` of the norm of `expected`, or of `floor` where that is more."""
    assert actual.shape == expected.shape, what
    actual, expected = actual.detach().double(), expected.detach().double()
    difference = float((actual - expected).norm())
    size = max(float(expected.norm()), floor)
    assert difference <= TOLERANCE * size, f"{what} differs by {difference:.1e}, of {size:.1e}"


def assert_all_equal(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """The same names, and equal tensors under each.

    A gradient that cancels to nothing (a router's, where one renormalised weight is always 1) leaves rounding of what
    cancelled: tensors count as at least a tenth of the largest beside them.
    """
    assert actual.keys() == expected.keys()
    floor = 0.1 * max(float(tensor.detach().norm()) for tensor in expected.values())
    for name in expected:
        assert_equal(actual[name], expected[name], floor=floor, what=name)


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """The gradient of every parameter; a parameter that got none counts as zero."""
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in module.named_parameters()
    }


def randomise(module: nn.Module, std: float = 0.3) -> None:
    """Weights large enough that everything matters; norms and biases too, so that none is left at 1 or 0."""
    with torch.no_grad():
        for name, tensor in module.named_parameters():
            tensor.normal_(std=std)
            if "norm" in name:
                tensor.add_(1.0)
        for name, tensor in module.named_buffers():
            if name.endswith("e_score_correction_bias"):
                tensor.normal_(std=0.1)
        for layer in module.modules():
            if getattr(layer, "composition", None) == "tied":
                make_biases_of_tied_routers_equal(layer)


def make_biases_of_tied_routers_equal(layer: Any) -> None:
    """They are buffers of their own, and stay equal in training, where equal choices move them equally."""
    biases = [sub.router.selection_bias for sub in layer.feed_forward if hasattr(sub, "router")]
    for bias in biases[1:]:
        if bias is not None:
            bias.copy_(biases[0])


MOE = MoE(num_experts=4, top_k=2, width=16, num_shared=1)
V3 = MoE(
    num_experts=8,
    top_k=2,
    width=8,
    num_shared=2,
    router=RouterRule(scores="sigmoid", scale=2.5, selection_bias=True, num_groups=4, top_groups=2),
)
CONVEX = MoE(num_experts=4, top_k=2, width=8, num_shared=1, mix="convex")
SHAPES = {
    "plain": {},
    "dense": {"feed_forward": [[Dense(width=24)], [Dense(width=40)]]},
    "no query-key norm, untied": {"qk_norm": False, "tie_word_embeddings": False},
    "sigmoid, dense first": {"feed_forward": [[Dense(width=24)], [V3]]},
    "two sub-layers, convex": {"feed_forward": [[CONVEX] * 2] * 2},
    "unequal sub-layers, depth not counted": {
        "feed_forward": [[MOE, Dense(width=24), V3], [CONVEX, MOE]],
        "depth_scaled_init": False,
    },
    "parallel": {"feed_forward": [[MOE, CONVEX], [Dense(width=24), V3]], "composition": "parallel"},
    "tied, untied embeddings": {
        "feed_forward": [[V3, V3], [MOE, Dense(width=24), MOE]],
        "composition": "tied",
        "tie_word_embeddings": False,
    },
    "shared pool": {"feed_forward": [[MOE, MOE, MOE], [V3, V3]], "composition": "shared-pool"},
    "one key-value head, wide heads": {"num_key_value_heads": 1, "head_dim": 16},
    "biases": {"attention_bias": True},
}
COMPOSED = [name for name, shape in SHAPES.items() if any(len(block) > 1 for block in shape.get("feed_forward", []))]
"""Names of the shapes with several sub-layers in a block."""
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


def small_config(**changes) -> MoestroConfig:
    """Two blocks of four small experts with a shared one, grouped-query attention."""
    moe = MoE(num_experts=4, top_k=2, width=16, num_shared=1)
    defaults = {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "feed_forward": [[moe], [moe]],
        "max_position_embeddings": 64,
    }
    return MoestroConfig(**(defaults | changes))


def block(model: Any, index: int) -> Any:
    """A decoder block, without the type checker's doubts about what `nn.Module` attributes are."""
    return model.model.layers[index]


def small_model(**changes) -> MoestroForCausalLM:
    """A `small_config` model with random weights, in evaluation mode."""
    model = MoestroForCausalLM(small_config(**changes)).eval()
    randomise(model)
    return model


def run_fresh(script: str, folder: Path) -> str:
    """The output of a Python script in a new interpreter, in `folder`; fails with its errors if it fails."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def some_ids(rows: int = 2, length: int = 9) -> Tensor:
    return torch.randint(1, 64, (rows, length))


def loss_and_gradients(model: MoestroForCausalLM, ids: Tensor, **inputs) -> dict[str, Tensor]:
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids, **inputs).loss
    loss.backward()
    return {"loss": loss.detach()} | gradients(model)
