"""A whole MoE layer against plain loops over tokens and experts: the output and every gradient, for every backend."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import Tensor

from agreement import CPU_BACKENDS, MARGIN, assert_all_equal, assert_equal, gradients, randomise
from moestro import MoE, MoestroConfig, RouterRule, reference
from moestro.models.layers import DenseFeedForward, SparseMoE
from test_routers import margin, rules

DIM = 16


@dataclass(frozen=True, kw_only=True)
class Case:
    """A layer and how many tokens go through it."""

    spec: MoE
    tokens: int = 5
    seed: int = 0


@st.composite
def cases(draw: st.DrawFn) -> Case:
    rule, num_experts, top_k = draw(rules())
    num_shared = draw(st.integers(0, 2))
    spec = MoE(
        num_experts=num_experts,
        top_k=top_k,
        width=draw(st.sampled_from([8, 24])),
        router=rule,
        num_shared=num_shared,
        shared_width=draw(st.sampled_from([None, 3])),
        mix=draw(st.sampled_from(["sum", "convex"])) if num_shared else "sum",
    )
    return Case(spec=spec, tokens=draw(st.integers(1, 6)), seed=draw(st.integers(0, 2**32)))


SPEC = MoE(num_experts=6, top_k=2, width=8)
BY_GROUPS = RouterRule(scores="sigmoid", scale=2.5, selection_bias=True, num_groups=3, top_groups=2)
ONE_TOKEN = Case(spec=SPEC, tokens=1)
ONE_EXPERT = Case(spec=MoE(num_experts=1, top_k=1, width=8))
ALL_EXPERTS = Case(spec=replace(SPEC, top_k=6))
IDLE_EXPERTS = Case(spec=MoE(num_experts=16, top_k=1, width=8, router=RouterRule(renormalise=False)), tokens=3)
GROUPS = Case(spec=replace(SPEC, top_k=3, router=BY_GROUPS, num_shared=2))
CONVEX = Case(spec=replace(SPEC, num_shared=2, shared_width=24, mix="convex"))


def build(spec: MoE, backend: str = "eager") -> SparseMoE:
    config = MoestroConfig(hidden_size=DIM, num_hidden_layers=1, feed_forward=[[spec]], num_attention_heads=2)
    config._experts_implementation = backend
    layer = SparseMoE(config, spec)
    randomise(layer)
    return layer


def run(layer: SparseMoE | DenseFeedForward, hidden: Tensor, cotangent: Tensor) -> dict[str, Tensor]:
    """The output, and the gradients of <output, cotangent>."""
    hidden = hidden.clone().requires_grad_()
    layer.zero_grad()
    output = layer(hidden)
    output.backward(cotangent)
    assert hidden.grad is not None
    return {"output": output.detach(), "hidden": hidden.grad} | gradients(layer)


def split_shared(weights: dict[str, Tensor], number: int) -> list[reference.ExpertWeights]:
    """The shared experts, which stand side by side in one network."""
    gate, up, down = (weights[f"shared_expert.{name}_proj.weight"] for name in ("gate", "up", "down"))
    parts = zip(gate.chunk(number), up.chunk(number), down.chunk(number, dim=1), strict=True)
    return [reference.ExpertWeights(*part) for part in parts]


def routed_experts(weights: dict[str, Tensor]) -> list[reference.ExpertWeights]:
    """The routed experts, which stand on top of each other in fused weights."""
    fused = zip(weights["experts.gate_up_proj"], weights["experts.down_proj"], strict=True)
    return [reference.ExpertWeights(*gate_up.chunk(2), down) for gate_up, down in fused]


def reference_parts(layer: SparseMoE, spec: MoE, weights: dict[str, Tensor]) -> dict[str, Any]:
    """What the reference takes beside router and experts."""
    rule, bias = spec.router, layer.router.selection_bias
    return {
        "shared": split_shared(weights, spec.num_shared) if spec.num_shared else (),
        "mix": (weights["mix.proj.weight"], weights["mix.proj.bias"]) if spec.mix == "convex" else None,
        "rule": {
            "top_k": spec.top_k,
            "scores": rule.scores,
            "renormalise": rule.renormalise,
            "scale": rule.scale,
            "bias": None if bias is None else bias.tolist(),
            "num_groups": rule.num_groups,
            "top_groups": rule.top_groups,
        },
    }


def run_reference(layer: SparseMoE, spec: MoE, hidden: Tensor, cotangent: Tensor) -> dict[str, Tensor]:
    """The same as `run`, by the reference in float64."""
    weights = {name: w.detach().double().requires_grad_() for name, w in layer.named_parameters()}
    hidden = hidden.double().requires_grad_()
    parts = reference_parts(layer, spec, weights)
    rule = parts.pop("rule")
    flat, _ = reference.moe_layer(
        hidden.flatten(0, -2), weights["router.weight"], routed_experts(weights), **parts, **rule
    )
    output = flat.view_as(hidden)
    output.backward(cotangent.double())
    assert hidden.grad is not None
    by_name = {name: torch.zeros_like(w) if w.grad is None else w.grad for name, w in weights.items()}
    return {"output": output.detach(), "hidden": hidden.grad} | by_name


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@given(cases())
@example(ONE_TOKEN)
@example(ONE_EXPERT)
@example(ALL_EXPERTS)
@example(IDLE_EXPERTS)
@example(GROUPS)
@example(CONVEX)
def test_layer_agrees_with_the_reference(backend, case):
    torch.manual_seed(case.seed)
    layer = build(case.spec, backend)
    hidden, cotangent = torch.randn(2, case.tokens, 1, DIM).unbind()
    logits = F.linear(hidden.flatten(0, 1), layer.router.weight).detach()
    assume(margin(logits, case.spec.router, case.spec.top_k, layer.router.selection_bias) > MARGIN)
    assert_all_equal(run(layer, hidden, cotangent), run_reference(layer, case.spec, hidden, cotangent))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_idle_experts_get_no_gradient(backend):
    layer = build(IDLE_EXPERTS.spec, backend)
    hidden = torch.randn(1, 3, DIM)
    chosen = set(layer.router(hidden[0])[2].flatten().tolist())
    idle = [e for e in range(16) if e not in chosen]
    results = run(layer, hidden, torch.randn(1, 3, DIM))
    assert len(idle) >= 13
    assert results["experts.gate_up_proj"][idle].abs().max() == results["experts.down_proj"][idle].abs().max() == 0
    assert all(results["experts.down_proj"][e].abs().max() > 0 for e in chosen)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_one_expert_is_a_dense_network(backend):
    layer = build(ONE_EXPERT.spec, backend)
    dense = DenseFeedForward(MoestroConfig(hidden_size=DIM, num_attention_heads=2), 8)
    state = layer.state_dict()
    gate, up = state["experts.gate_up_proj"][0].chunk(2)
    down = state["experts.down_proj"][0]
    dense.load_state_dict({"gate_proj.weight": gate, "up_proj.weight": up, "down_proj.weight": down})
    hidden, cotangent = torch.randn(2, 2, 3, DIM).unbind()
    actual, expected = run(layer, hidden, cotangent), run(dense, hidden, cotangent)
    assert_equal(actual["output"], expected["output"])
    assert_equal(actual["hidden"], expected["hidden"])
    gate_up = torch.cat([expected["gate_proj.weight"], expected["up_proj.weight"]])
    assert_equal(actual["experts.gate_up_proj"][0], gate_up)
    assert_equal(actual["experts.down_proj"][0], expected["down_proj.weight"])


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_all_experts_are_a_weighted_sum(backend):
    """With k = experts nothing is left out, so the layer is a plain softmax mixture, gradients included."""
    layer = build(ALL_EXPERTS.spec, backend)

    def mixture(hidden: Tensor) -> Tensor:
        gate, up = torch.einsum("...d,ewd->...ew", hidden, layer.experts.gate_up_proj).chunk(2, dim=-1)
        outputs = torch.einsum("...ew,edw->...ed", F.silu(gate) * up, layer.experts.down_proj)
        return torch.einsum("...e,...ed->...d", F.linear(hidden, layer.router.weight).softmax(-1), outputs)

    hidden, cotangent = torch.randn(2, 2, 3, DIM).unbind()
    actual = run(layer, hidden, cotangent)
    hidden.requires_grad_()
    layer.zero_grad()
    output = mixture(hidden)
    output.backward(cotangent)
    assert hidden.grad is not None
    assert_all_equal(actual, {"output": output.detach(), "hidden": hidden.grad} | gradients(layer))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_a_token_does_not_depend_on_its_neighbours(backend):
    """Padding, other sequences and the order of rows change nothing."""
    layer = build(replace(SPEC, num_shared=1, mix="convex"), backend)
    hidden = torch.randn(2, 4, DIM)
    together = layer(hidden)
    assert_equal(layer(hidden[:1]), together[:1])
    assert_equal(layer(hidden.flip(1)), together.flip(1))


def test_the_router_ignores_autocast():
    layer = build(SPEC)
    hidden = torch.randn(7, DIM)
    plain = layer.router(hidden)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = layer.router(hidden)
        assert layer(hidden[None]).isfinite().all()
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(plain, under_autocast, strict=True))


def test_shared_experts_of_the_convex_mix_are_averaged():
    """Doubling the number of equal shared experts changes nothing; summed, it doubles their part."""
    hidden = torch.randn(1, 3, DIM)
    for mix, factor in (("convex", 1.0), ("sum", 2.0)):
        one, two = (build(replace(SPEC, num_shared=number, mix=mix)) for number in (1, 2))
        state = one.state_dict()
        for name in ("gate", "up", "down"):
            key = f"shared_expert.{name}_proj.weight"
            state[key] = torch.cat([state[key]] * 2, dim=1 if name == "down" else 0)
        two.load_state_dict(state)
        without = build(SPEC)
        without.load_state_dict(one.state_dict(), strict=False)
        common = one(hidden) - without(hidden)
        expected = one(hidden) if factor == 1.0 else without(hidden) + 2 * common
        assert_equal(two(hidden), expected)
