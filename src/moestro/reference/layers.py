"""A whole MoE layer, and a block of several, in plain loops over tokens and experts."""

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class ExpertWeights(NamedTuple):
    """One SwiGLU network: y = down(silu(gate x) * (up x))."""

    gate: Float[Tensor, "width dim"]
    up: Float[Tensor, "width dim"]
    down: Float[Tensor, "dim width"]


class Choice(NamedTuple):
    """One token's routing."""

    experts: list[int]
    weights: list[Tensor]
    probabilities: Float[Tensor, " experts"]
    logits: Float[Tensor, " experts"]


def swiglu(x: Float[Tensor, " dim"], w: ExpertWeights) -> Float[Tensor, " dim"]:
    """One expert on one token."""
    gate, up = w.gate @ x, w.up @ x
    return w.down @ (gate * torch.sigmoid(gate) * up)


def choose(
    x: Float[Tensor, " dim"],
    router: Float[Tensor, "experts dim"],
    *,
    top_k: int,
    scores: str = "softmax",
    renormalise: bool = True,
    scale: float = 1.0,
    bias: Sequence[float] | None = None,
    num_groups: int = 1,
    top_groups: int = 1,
    banned: Sequence[int] = (),
) -> Choice:
    """Route one token: rank the experts one by one, in Python."""
    logits = torch.stack([row @ x for row in router])
    num_experts = len(logits)
    if scores == "softmax":
        shifted = (logits - logits.max()).exp()
        affinity = shifted / shifted.sum()
        probabilities = affinity
    else:
        affinity = 1 / (1 + torch.exp(-logits))
        probabilities = affinity / affinity.sum()
    select = [affinity[e].item() + (float(bias[e]) if bias is not None else 0.0) for e in range(num_experts)]
    select = [-math.inf if e in banned else s for e, s in enumerate(select)]

    size = num_experts // num_groups
    members = [list(range(g * size, (g + 1) * size)) for g in range(num_groups)]
    allowed = [[select[e] for e in group if e not in banned] for group in members]
    group_score = [sum(sorted(group, reverse=True)[:2]) if group else -math.inf for group in allowed]
    best = sorted(range(num_groups), key=lambda g: -group_score[g])[:top_groups]
    eligible = [e for g in best for e in members[g]]

    experts = sorted(eligible, key=lambda e: -select[e])[:top_k]
    weights = [affinity[e] for e in experts]
    if renormalise:
        total = torch.stack(weights).sum()
        weights = [w / total for w in weights]
    return Choice(experts, [w * scale for w in weights], probabilities, logits)


class SubLayer(NamedTuple):
    """A feed-forward sub-layer of a block, with the norm before it; without a router its one expert is a dense one."""

    norm: Float[Tensor, " dim"]
    experts: Sequence[ExpertWeights]
    router: Float[Tensor, "experts dim"] | None = None
    shared: Sequence[ExpertWeights] = ()
    mix: tuple[Float[Tensor, "2 dim"], Float[Tensor, " 2"]] | None = None
    rule: Mapping[str, Any] = MappingProxyType({})


def mixed(
    x: Float[Tensor, " dim"],
    choice: Choice,
    experts: Sequence[ExpertWeights],
    shared: Sequence[ExpertWeights],
    mix: tuple[Float[Tensor, "2 dim"], Float[Tensor, " 2"]] | None,
) -> Float[Tensor, " dim"]:
    """One token's routed experts, and the shared ones added or convexly mixed in.

    `mix` holds V and b of the convex mix c = softmax(V x + b); shared experts are averaged under it and summed
    without it (papers: CartesianMoE arXiv:2410.16077 section 1; DeepSeekMoE arXiv:2401.06066).
    """
    y = torch.zeros_like(x)
    for e, weight in zip(choice.experts, choice.weights, strict=True):
        y = y + weight * swiglu(x, experts[e])
    if not shared:
        return y
    common = torch.zeros_like(x)
    for w in shared:
        common = common + swiglu(x, w)
    if mix is None:
        return y + common
    share = torch.softmax(mix[0] @ x + mix[1], dim=-1)
    return share[0] * y + share[1] * common / len(shared)


def moe_layer(
    hidden: Float[Tensor, "tokens dim"],
    router: Float[Tensor, "experts dim"],
    experts: Sequence[ExpertWeights],
    *,
    shared: Sequence[ExpertWeights] = (),
    mix: tuple[Float[Tensor, "2 dim"], Float[Tensor, " 2"]] | None = None,
    **rule,
) -> tuple[Float[Tensor, "tokens dim"], list[Choice]]:
    """A whole layer: route each token, run its experts, add (or convexly mix in) the shared experts."""
    choices = [choose(x, router, **rule) for x in hidden]
    outputs = [mixed(x, choice, experts, shared, mix) for x, choice in zip(hidden, choices, strict=True)]
    return torch.stack(outputs), choices


def rms_norm(x: Float[Tensor, " dim"], weight: Float[Tensor, " dim"], eps: float = 1e-6) -> Float[Tensor, " dim"]:
    """One token over the root of the mean of its squares, times a weight."""
    return weight * x / torch.sqrt((x @ x) / len(x) + eps)


def moe_block(
    stream: Float[Tensor, "tokens dim"], sub_layers: Sequence[SubLayer], *, composition: str = "serial"
) -> tuple[Float[Tensor, "tokens dim"], list[list[Choice]]]:
    """The feed-forward of a block: u' = u + M(RMSNorm(u)) for each sub-layer; and each token's choices.

    Paper: CartesianMoE, arXiv:2410.16077, section 1. Of its controls, parallel sub-layers all read the first u, tied
    ones all use the first choice, and those with a shared pool all run the first one's experts.
    """
    outputs, choices = [], []
    for start in stream:
        u, made = start, []
        pool = next((sub.experts for sub in sub_layers if sub.router is not None), ())
        for sub in sub_layers:
            x = rms_norm(start if composition == "parallel" else u, sub.norm)
            if sub.router is None:
                u = u + swiglu(x, sub.experts[0])
                continue
            made.append(made[0] if composition == "tied" and made else choose(x, sub.router, **sub.rule))
            u = u + mixed(x, made[-1], pool if composition == "shared-pool" else sub.experts, sub.shared, sub.mix)
        outputs.append(u)
        choices.append(made)
    return torch.stack(outputs), choices
