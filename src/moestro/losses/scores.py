"""Losses on the router's scores at the chosen experts: the variance that makes routing decided.

s_ij is token i's simplex score at its chosen expert j over the sum of its chosen experts' scores, 0 elsewhere. It is
kept as [tokens k], never as [tokens experts]; that takes the chosen experts of a token to be distinct.
"""

from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moestro.errors import Misuse
from moestro.losses.per_sequence import PerSequence, full_precision, sum_per_sequence
from moestro.routing import LayerRecord, chosen

VarianceForm = Literal["column", "row"]
"""column: over tokens, the paper's; row: over experts within each token, the public code's."""

VANISHED = 1e-20
"""Chosen scores with a sum of this or less are left as they are: dividing would give gradients without bound."""


def learned_scores(record: LayerRecord, loss: str) -> Float[Tensor, "tokens experts"]:
    """The router's scores on the simplex, or Misuse where the router learns nothing."""
    if record.routing.scores is None:
        raise Misuse(f"{loss} needs a router that learns its scores, but {record.layer.name} has none: set it to 0")
    return record.routing.scores


def slot_scores(record: LayerRecord, loss: str = "variance") -> Float[Tensor, "tokens k"]:
    """Return s: the router's scores at the chosen experts, normalised to sum to 1 over a token's edges.

    It is 0 in unused slots and at padding. The Misuse for a router without scores names `loss`.
    """
    used = chosen(record.routing, record.batch) > 0
    scores = full_precision(learned_scores(record, loss))
    return renormalised(scores.gather(-1, record.routing.expert.masked_fill(~used, 0)).masked_fill(~used, 0.0))


def renormalised(share: Float[Tensor, "tokens k"]) -> Float[Tensor, "tokens k"]:
    """Each row over its sum; rows of (next to) nothing stay."""
    total = share.sum(-1, keepdim=True)
    return share / total.masked_fill(total <= VANISHED, 1.0)


def mean_scores(record: LayerRecord) -> tuple[Float[Tensor, " experts"], Float[Tensor, ""]]:
    """Sum of s over the valid tokens, and their number: both add up over micro-batches and ranks. Detached.

    Their quotient is the `mean` that `variance` wants.
    """
    everything = torch.zeros_like(record.batch.sequence)
    total, count = _scores_per_group(record, slot_scores(record).detach(), everything, 1)
    return total[0], count[0]


def variance(
    record: LayerRecord,
    mean: Float[Tensor, " experts"],
    form: VarianceForm = "column",
    cap: float | None = None,
) -> PerSequence:
    """Negative variance of the routing: each token contributes -(1/n) sum_j (s_ij - mean_j)^2, n experts.

    `mean` is a constant. If it is the mean of s over the whole batch and every token has equal weight, the loss has
    Eq. 7's value and exact gradient, because sum_i (s_ij - mean_j) = 0: `AuxLosses(variance_over="batch")`. If tokens
    are weighted by their row's labels, as with the previous step's mean, it is a variance with those weights, exact
    under any cut of the batch. The row form has 1/n in the mean's place: it is content with all tokens on one expert.
    A token whose sum_j (s_ij - mean_j)^2 exceeds `cap` counts as `cap` and has no gradient: the loss pushes s to
    one-hot and would never stop. With one expert per token s is 1, whatever the router says: no gradient at all.

    Paper: Guo et al. 2025, arXiv:2505.22323, Eq. 7.
    Departs from the paper: averaged over tokens, where its sum grows with their number; s from scores on the simplex
    before any selection bias or scale; `cap` and the row form (what the public code does) are additions.
    """
    one_group = torch.zeros_like(record.batch.sequence)
    return _variance(record, slot_scores(record), mean[None], one_group, form, cap)


def variance_per_sequence(record: LayerRecord, form: VarianceForm = "column", cap: float | None = None) -> PerSequence:
    """`variance` with the mean of each token's own sequence.

    Departs from the paper (Guo et al. 2025, arXiv:2505.22323, Eq. 7): its mean is over the batch.
    """
    batch, share = record.batch, slot_scores(record)
    total, count = _scores_per_group(record, share.detach(), batch.sequence, batch.num_sequences)
    return _variance(record, share, total / count.clamp_min(1)[:, None], batch.sequence, form, cap)


def _variance(
    record: LayerRecord,
    share: Float[Tensor, "tokens k"],
    mean: Float[Tensor, "groups experts"],
    group: Int[Tensor, " tokens"],
    form: VarianceForm,
    cap: float | None,
) -> PerSequence:
    if form not in get_args(VarianceForm):
        raise Misuse(f"form must be one of {', '.join(get_args(VarianceForm))}, got {form!r}")
    if cap is not None and not cap > 0:
        raise Misuse(f"cap must be above 0, got {cap}")
    num_experts = record.layer.num_experts
    mean = full_precision(mean.detach())
    if form == "row":
        mean = torch.full_like(mean, 1 / num_experts)
    squared = _squared_deviation(record, share, mean, group)
    if cap is not None:
        squared = squared.clamp(max=cap)
    return sum_per_sequence(record, -squared / num_experts)


def _squared_deviation(
    record: LayerRecord,
    share: Float[Tensor, "tokens k"],
    mean: Float[Tensor, "groups experts"],
    group: Int[Tensor, " tokens"],
) -> Float[Tensor, " tokens"]:
    """sum_j (s_j - mean_j)^2, mean being the token's group's: over edges (s - mean)^2 - mean^2, plus sum_j mean_j^2."""
    used = chosen(record.routing, record.batch) > 0
    at_slot = mean[group[:, None], record.routing.expert.masked_fill(~used, 0)].masked_fill(~used, 0.0)
    return ((share - at_slot).square() - at_slot.square()).sum(-1) + mean.square().sum(-1)[group]


def _scores_per_group(
    record: LayerRecord, share: Float[Tensor, "tokens k"], group: Int[Tensor, " tokens"], num_groups: int
) -> tuple[Float[Tensor, "groups experts"], Float[Tensor, " groups"]]:
    """Sum of s over the valid tokens of each group, and their number."""
    num_experts, valid = record.layer.num_experts, record.batch.valid
    expert = record.routing.expert.masked_fill(chosen(record.routing, record.batch) == 0, 0)
    cell = (group[:, None] * num_experts + expert).flatten()
    total = share.new_zeros(num_groups * num_experts).index_add(0, cell, share.flatten())
    weight = share.new_ones(len(share)) if valid is None else valid.to(share.dtype)
    return total.view(num_groups, num_experts), share.new_zeros(num_groups).index_add(0, group, weight)
