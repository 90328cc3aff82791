"""Perturbations of routing, for robustness tests: top experts disabled or replaced at random, logits disturbed.

Each function makes a `Reroute`: of a `Proposal` it makes the routing that shall run. What is drawn at random depends on
the seed, the layer's name, the tokens of the whole sequence and the place in it, and on nothing else: a sequence is
routed alike in every batch, on every rank and however it is padded.
"""

from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moestro.errors import Misuse
from moestro.gate.ranges import Positive, Seed, check
from moestro.randomness import content, hashed, number_of
from moestro.routing import Proposal, Reroute, Routing


def disable(count: int = 1) -> Reroute:
    """Each token's `count` chosen experts of largest weight cannot be chosen: the router's own rule takes others.

    Paper: Su et al. 2024 (CartesianMoE), arXiv:2410.16077: at evaluation the routed expert of the highest probability
    is disabled for every token, and the top-K is taken from the rest. The weights are what the rule makes of the new
    choice: where it does not renormalise, they sum to less.
    """

    def without_the_first(proposal: Proposal) -> Routing:
        num_experts, top_k = proposal.layer.num_experts, check_count(count, proposal)
        if num_experts - count < top_k:
            raise Misuse(
                f"disabling {count} of {num_experts} experts in {proposal.layer.name} must leave top_k ({top_k})"
            )
        routing = proposal.routing
        return proposal.select(banned=among(routing.expert, largest(routing, count), num_experts))

    return without_the_first


def replace_at_random(count: int = 1, seed: int = 0) -> Reroute:
    """Experts that the token did not choose, drawn evenly, take the place of its `count` of largest weight."""

    def at_random(proposal: Proposal) -> Routing:
        num_experts, top_k, routing = proposal.layer.num_experts, check_count(count, proposal), proposal.routing
        if num_experts - top_k < count:
            raise Misuse(
                f"replacing {count} of each token's experts in {proposal.layer.name} must not need more than the "
                f"{num_experts - top_k} that it did not choose"
            )
        first = largest(routing, count)
        taken = among(routing.expert, edges(routing), num_experts)
        drawn = random_bits(proposal, seed).masked_fill(taken, -1).topk(count, dim=-1).indices
        number = (first.long().cumsum(-1) - 1).clamp_min(0)  # of each slot among those to be filled
        filled = torch.where(first, drawn.gather(-1, number).to(routing.expert.dtype), routing.expert)
        return replace(routing, expert=filled)

    return at_random


def add_noise(scale: float, seed: int = 0) -> Reroute:
    """Gaussian noise on each token's logits, of `scale` times their standard deviation over experts."""
    check("the scale of noise", scale, Positive)
    check("seed", seed, Seed)
    return lambda proposal: proposal.select(noise=scale * random_normal(proposal, seed))


def check_count(count: int, proposal: Proposal) -> int:
    """The number of experts of each token, of which `count` must be some; else Misuse."""
    top_k = proposal.routing.expert.shape[1]
    check("count", count, int)
    if not 1 <= count <= top_k:
        raise Misuse(f"count must lie between 1 and top_k ({top_k}) of {proposal.layer.name}, got {count}")
    return top_k


def edges(routing: Routing) -> Bool[Tensor, "tokens k"]:
    """Return which slots are used."""
    return torch.ones_like(routing.expert, dtype=torch.bool) if routing.edge is None else routing.edge


def largest(routing: Routing, count: int) -> Bool[Tensor, "tokens k"]:
    """True at the `count` used slots of largest weight, or at all where a token uses fewer."""
    used = edges(routing)
    slot = routing.weight.float().masked_fill(~used, float("-inf")).topk(count, dim=-1).indices
    return torch.zeros_like(used).scatter(-1, slot, True) & used


def among(
    expert: Int[Tensor, "tokens k"], slot: Bool[Tensor, "tokens k"], num_experts: int
) -> Bool[Tensor, "tokens experts"]:
    """True for the experts that stand in the slots."""
    count = torch.zeros(len(expert), num_experts, dtype=torch.int32, device=expert.device)
    return count.scatter_add(-1, expert.long(), slot.to(torch.int32)) > 0


def random_normal(proposal: Proposal, seed: int) -> Float[Tensor, "tokens experts"]:
    """Independent standard normal numbers."""
    uniform = ((random_bits(proposal, seed) >> 40).float() + 0.5) / 2**22  # exact in float32, and neither 0 nor 1
    return 2**0.5 * torch.erfinv(2 * uniform - 1)


def random_bits(proposal: Proposal, seed: int) -> Int[Tensor, "tokens experts"]:
    """62 random bits for every token and expert, the same whatever else is in the batch and however it is padded."""
    layer, batch = proposal.layer, proposal.batch
    if batch.input_ids is None:
        raise Misuse(f"random choices depend on the tokens: the model must be called with input_ids ({layer.name})")
    key = content(batch) + number_of(f"{seed} {layer.name}")
    expert = torch.arange(layer.num_experts, device=key.device)
    return hashed(hashed(key)[:, None] + expert) & (2**62 - 1)
