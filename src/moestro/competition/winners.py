"""Who wins a token, with which share of the output, and what the router should have preferred.

An expert's `strength` is its response on the scale of all experts.
"""

from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moestro.competition.settings import Target, Weights
from moestro.routing import Routing


def strongest(
    strength: Float[Tensor, "competing experts"], k: int, breaking: Float[Tensor, "competing experts"] | None = None
) -> Int[Tensor, "competing k"]:
    """The k experts of strongest response, the strongest first; `breaking` is added to tell ties apart."""
    return (strength if breaking is None else strength + breaking).topk(k, dim=-1).indices


def shares(
    strength: Float[Tensor, "competing k"],
    rule: Weights,
    temperature: float = 1.0,
    scores: Float[Tensor, "competing k"] | None = None,
) -> Float[Tensor, "competing k"]:
    """The winners' shares, of sum 1, from their scaled responses, or the router's `scores` at them."""
    if rule == "softmax":
        return (strength / temperature).softmax(-1)
    parts = strength if rule == "share" else scores
    assert parts is not None
    return parts / parts.sum(-1, keepdim=True).clamp_min(1e-20)


def preferences(
    strength: Float[Tensor, "competing experts"], winner: Int[Tensor, "competing k"], target: Target, temperature: float
) -> Float[Tensor, "competing experts"]:
    """What the router is taught to prefer: rows sum to 1."""
    if target == "winners":
        won = torch.zeros_like(strength, dtype=torch.bool).scatter(-1, winner, True)
        strength = strength.masked_fill(~won, float("-inf"))
    return (strength / temperature).softmax(-1)


def used_slots(
    proposed: Routing, token: Int[Tensor, " competing"], filled: Bool[Tensor, " competing"]
) -> Bool[Tensor, "competing k"]:
    """The slots that winners can take: those of tokens that compete, and where the router sent them somewhere."""
    used = filled[:, None].expand(-1, proposed.expert.shape[1])
    return used if proposed.edge is None else used & proposed.edge[token]


def to_winners(
    proposed: Routing,
    token: Int[Tensor, " competing"],
    used: Bool[Tensor, "competing k"],
    winner: Int[Tensor, "competing k"],
    share: Float[Tensor, "competing k"],
) -> Routing:
    """The routing in which competing tokens go to their winners by `share`. Each token's sum of weights stays."""
    before = proposed.weight[token]
    total = before.detach().float().masked_fill(~used, 0.0).sum(-1, keepdim=True)
    share = share.masked_fill(~used, 0.0)
    won = total * share / share.sum(-1, keepdim=True).clamp_min(1e-20)
    weight = torch.where(used, won.to(before.dtype), before)
    expert = torch.where(used, winner.to(proposed.expert.dtype), proposed.expert[token])
    return replace(
        proposed,
        expert=proposed.expert.index_copy(0, token, expert),
        weight=proposed.weight.index_copy(0, token, weight),
    )
