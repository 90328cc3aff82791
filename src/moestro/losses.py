"""Auxiliary losses as pure functions of records.

A loss over tokens returns, for every sequence of the batch, a sum over its valid tokens and their number. How these
are weighted into one scalar, so that the gradient does not depend on how a batch is cut, is decided in one place:
`moestro.adapters.aux_losses`. Everything is computed in fp32, under autocast too.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from moestro.errors import Misuse
from moestro.routing import LayerRecord, choices, choices_per_group


@dataclass(frozen=True, slots=True, kw_only=True)
class PerSequence:
    """A loss over the tokens of each sequence."""

    sum: Float[Tensor, " sequences"]
    count: Float[Tensor, " sequences"]
    """Valid tokens of each sequence."""


def sum_per_sequence(record: LayerRecord, value: Float[Tensor, " tokens"]) -> PerSequence:
    """Add up a per-token value over the valid tokens of each sequence."""
    batch = record.batch
    valid = torch.ones_like(value) if batch.valid is None else batch.valid.to(value.dtype)
    zeros = torch.zeros(batch.num_sequences, dtype=value.dtype, device=value.device)
    # A padded token's value may be anything, NaN included: it is replaced, not multiplied by zero.
    value = value if batch.valid is None else value.masked_fill(~batch.valid, 0.0)
    return PerSequence(
        sum=zeros.index_add(0, batch.sequence, value), count=zeros.index_add(0, batch.sequence, valid.detach())
    )


def learned_scores(record: LayerRecord, loss: str) -> Float[Tensor, "tokens experts"]:
    """The router's scores on the simplex, or Misuse where the router learns nothing."""
    if record.routing.scores is None:
        raise Misuse(f"{loss} needs a router that learns its scores, but {record.layer.name} has none: set it to 0")
    return record.routing.scores


def balance_per_sequence(record: LayerRecord) -> PerSequence:
    """Load balance within each sequence: E sum_e f_e P_e, times the sequence's valid tokens.

    f_e is the share of the sequence's choices (over all k) that fall on expert e, P_e the mean score. It is 1 where
    either is uniform. Paper: DeepSeek-V3, arXiv:2412.19437, Eq. 17 to 20.
    """
    scores = learned_scores(record, "balance")
    batch, num_experts = record.batch, record.layer.num_experts
    edges = choices_per_group(record.routing, batch, batch.sequence, batch.num_sequences, num_experts)
    load = edges / edges.sum(-1, keepdim=True).clamp_min(1)
    return sum_per_sequence(record, num_experts * (load[batch.sequence] * scores).sum(-1))


def balance_against(record: LayerRecord, load: Float[Tensor, " experts"]) -> PerSequence:
    """Load balance against a given load (shares that sum to 1): each token contributes E sum_e f_e p_e.

    With the load of a whole batch this is the global-batch balance; with the previous step's it is exact under any cut
    of the batch. Paper: Qiu et al. 2025, arXiv:2501.11873, Eq. 4; Fedus et al. 2021 (Switch), arXiv:2101.03961, Eq. 4.
    """
    scores = learned_scores(record, "balance")
    return sum_per_sequence(record, record.layer.num_experts * (scores * load.to(scores)).sum(-1))


def load_share(record: LayerRecord) -> Float[Tensor, " experts"]:
    """Share of the batch's choices that fall on each expert; uniform where there is no choice at all."""
    edges = choices(record.routing, record.batch, record.layer.num_experts)
    total = edges.sum()
    return torch.where(total > 0, edges / total.clamp_min(1), torch.full_like(edges, 1 / len(edges)))


def router_z(record: LayerRecord) -> PerSequence:
    """Squared log-sum-exp of each token's logits, which keeps them small.

    Paper: Zoph et al. 2022 (ST-MoE), arXiv:2202.08906, Eq. 5.
    """
    if record.routing.logits is None:
        raise Misuse(f"router_z needs a router with logits, but {record.layer.name} has none: set it to 0")
    return sum_per_sequence(record, record.routing.logits.float().logsumexp(-1).square())
