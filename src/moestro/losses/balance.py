"""Load balance over a sequence or against a given load, and the z-loss on logits."""

import torch
from jaxtyping import Float
from torch import Tensor

from moestro.errors import Misuse
from moestro.losses.per_sequence import PerSequence, sum_per_sequence
from moestro.losses.scores import learned_scores
from moestro.routing import LayerRecord, choices, choices_per_group


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
