"""The norm against transformers': values and both gradients, at drawn sizes."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRMSNorm

from moestro.models.norm import RMSNorm


def run(norm_class, hidden, weight, gradient, *, backward_autocast=False):
    norm = norm_class(hidden.shape[-1]).to(weight.dtype)
    norm.weight.data.copy_(weight)
    hidden = hidden.clone().requires_grad_()
    out = norm(hidden)
    with torch.autocast("cpu", torch.bfloat16, enabled=backward_autocast):
        out.backward(gradient)
    return {"out": out.detach(), "hidden": hidden.grad, "weight": norm.weight.grad}


def assert_equal_norms(ours, theirs, rtol=1e-5, atol=1e-5):
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype, name
        torch.testing.assert_close(ours[name], value, rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    dim=st.integers(1, 17),
    seed=st.integers(0, 999),
    zeros=st.booleans(),
    autocast=st.booleans(),
)
def test_values_and_gradients_are_those_of_transformers(shape, dim, seed, zeros, autocast):
    """Rows of zeros, where only epsilon stands below the root, included."""
    generator = torch.Generator().manual_seed(seed)
    hidden, gradient = (torch.randn(*shape, dim, generator=generator) for _ in range(2))
    weight = torch.randn(dim, generator=generator)
    if zeros:
        hidden[0] = 0
        gradient[0] *= 1e-3
    ours = run(RMSNorm, hidden, weight, gradient, backward_autocast=autocast)
    assert_equal_norms(ours, run(Qwen3MoeRMSNorm, hidden, weight, gradient))


def test_reduced_precision_goes_in_and_out():
    torch.manual_seed(0)
    hidden, gradient = (torch.randn(3, 7, 16, dtype=torch.bfloat16) for _ in range(2))
    weight = torch.randn(16, dtype=torch.bfloat16)
    theirs = run(Qwen3MoeRMSNorm, hidden, weight, gradient)
    assert_equal_norms(run(RMSNorm, hidden, weight, gradient), theirs, rtol=2e-2, atol=5e-2)


def test_frozen_weights_and_frozen_inputs():
    torch.manual_seed(0)
    norm, hidden = RMSNorm(8), torch.randn(3, 8, requires_grad=True)
    norm.requires_grad_(False)
    norm(hidden).sum().backward()
    assert hidden.grad is not None
    assert norm.weight.grad is None
    assert not norm(hidden.detach()).requires_grad
