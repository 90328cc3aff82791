"""The records that stand between those who produce routing and those who use it.

Every MoE layer of every model does the same thing: it is given tokens, chooses experts, runs them and mixes their
outputs. A producer (one of our layers, or a hook on somebody else's) describes that as a `LayerRecord`; losses,
metrics and reports read records and never know which model they look at. Shapes are in words: `tokens` are all
positions of a batch in row order, `k` the slots of one token.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """Which experts each token goes to, and how much each counts.

    A weight of 0 (or below) is still an edge: the token is sent. Routers that choose a varying number of experts mask
    slots with `edge`.
    """

    expert: Int[Tensor, "tokens k"]
    """The chosen experts."""
    weight: Float[Tensor, "tokens k"]
    """Their share in the layer's output."""
    logits: Float[Tensor, "tokens experts"] | None
    """What the router computed, fp32; None where nothing is learned (hash)."""
    scores: Float[Tensor, "tokens experts"] | None
    """The router's preferences on the simplex (rows sum to 1), before any selection bias."""
    edge: Bool[Tensor, "tokens k"] | None = None
    """Which slots are used; None means all of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What one forward pass knows about its tokens; None is unknown."""

    sequence: Int[Tensor, " tokens"]
    """Index of the sequence that each token belongs to, below `num_sequences`."""
    num_sequences: int
    """An upper bound where sequences are told apart by their positions: counting them would wait for the device."""
    valid: Bool[Tensor, " tokens"] | None = None
    """False at padding; None means that every token is valid."""
    label: Bool[Tensor, " tokens"] | None = None
    """True where the token is a label of the language-model loss."""
    position: Int[Tensor, " tokens"] | None = None
    input_ids: Int[Tensor, " tokens"] | None = None
    domain: Int[Tensor, " tokens"] | None = None
    step: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MoELayer:
    """A handle on one MoE layer: how to read its router, and where its router weight and selection bias live.

    `moestro.adapters.moe_layers` makes these for the models of transformers; for any other model make them yourself.
    Places are (module, attribute) and not tensors: moving a model to a device, or sharding it, replaces its tensors.
    """

    name: str
    block: str
    """Name of the decoder block it belongs to: losses sum over the sub-layers of a block, and average blocks."""
    router: nn.Module
    experts: nn.Module
    num_experts: int
    top_k: int
    scores: Literal["softmax", "sigmoid", "sqrtsoftplus", "probabilities"] | None = "softmax"
    """What makes preferences of what the router returns; "probabilities" are returned as such, and None means that
    the router's choice is not learned (hash)."""
    weight_at: tuple[nn.Module, str] | None = None
    bias_at: tuple[nn.Module, str] | None = None

    @property
    def router_weight(self) -> Float[Tensor, "experts dim"] | None:
        """The matrix that makes logits of tokens; None where the router is more than a matrix."""
        return None if self.weight_at is None else getattr(*self.weight_at)

    @property
    def selection_bias(self) -> Tensor | None:
        """What is added to the scores for selection only; None where the router has no such bias."""
        return None if self.bias_at is None else getattr(*self.bias_at)


@dataclass(frozen=True, slots=True, kw_only=True)
class Competition:
    """The tokens that competed in one layer, and who won. Everything is detached: it is what a router is taught.

    The number of rows is fixed by the batch's shape; rows that are not `filled` are to be ignored.
    """

    token: Int[Tensor, " competing"]
    filled: Bool[Tensor, " competing"]
    response: Float[Tensor, "competing experts"]
    """How strongly every expert responded, as measured."""
    target: Float[Tensor, "competing experts"] | None
    """Which experts the router should prefer; rows sum to 1. None while the scale of the responses is not known: then
    nobody wins, and nothing is taught."""
    winner: Int[Tensor, "competing k"] | None
    """The experts of strongest response, the strongest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRecord:
    """One MoE layer in one forward pass. It lives inside that layer's forward: reduce it there to sums and counts.

    Keeping `hidden` or `outputs` beyond it would undo activation checkpointing.
    """

    layer: MoELayer
    batch: Batch
    hidden: Float[Tensor, "tokens dim"]
    proposed: Routing
    """What the router chose."""
    routing: Routing
    """What ran: `proposed`, unless a reroute replaced it."""
    outputs: Float[Tensor, "tokens k dim"] | None = None
    """Each chosen expert's output, not yet weighted; None where nobody asked."""
    competition: Competition | None = None
    recomputed: bool = False
    """True while a checkpointed layer is run again in the backward pass: losses count again, statistics do not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """What a reroute is given: one layer's tokens, and where the router would send them."""

    layer: MoELayer
    batch: Batch
    hidden: Float[Tensor, "tokens dim"]
    """What the experts are given."""
    routing: Routing
    """What the router chose."""
    select: Callable[..., Routing]
    """`select(banned=None, noise=None)`: the router's own rule once more, where `banned["tokens experts"]` cannot be
    chosen and `noise["tokens experts"]` is added to the logits, in units of their standard deviation over the token's
    experts. The weights are whatever the rule makes of the new choice."""
    run: Callable[..., Float[Tensor, "some k out"]]
    """`run(hidden["some dim"], expert["some k"])`: the outputs of any of the layer's experts on any tokens, not
    weighted; without `expert`, of all of them."""


Reroute = Callable[[Proposal], Routing]
"""What decides in the router's place; `proposal.routing` leaves everything as it is."""


def chosen(routing: Routing, batch: Batch) -> Float[Tensor, "tokens k"]:
    """1.0 where a slot of a valid token is an edge, else 0.0."""
    used = torch.ones(routing.expert.shape, dtype=torch.float32, device=routing.expert.device)
    if routing.edge is not None:
        used = used * routing.edge
    if batch.valid is not None:
        used = used * batch.valid[:, None]
    return used


def choices_per_group(
    routing: Routing, batch: Batch, group: Int[Tensor, " tokens"], num_groups: int, num_experts: int
) -> Float[Tensor, "groups experts"]:
    """How many edges of valid tokens lead from each group of tokens (sequences, domains) to each expert."""
    cell = (group[:, None] * num_experts + routing.expert).flatten()
    counts = torch.zeros(num_groups * num_experts, dtype=torch.float32, device=cell.device)
    return counts.index_add_(0, cell, chosen(routing, batch).flatten()).view(num_groups, num_experts)


def choices(routing: Routing, batch: Batch, num_experts: int) -> Float[Tensor, " experts"]:
    """How many edges of valid tokens lead to each expert."""
    everything = torch.zeros_like(batch.sequence)
    return choices_per_group(routing, batch, everything, 1, num_experts)[0]
