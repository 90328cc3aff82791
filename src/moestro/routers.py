"""Routers as pure functions: logits to a `Routing`, by a rule that a frozen record describes.

One rule covers the softmax and the sigmoid families (definitions and papers: docs/papers.md). The learned part, a
weight matrix, lives in `moestro.models.layers.Router`; what is here has no weights, so a reroute or a test can apply
a family's own rule to any logits.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from moestro.errors import Misuse
from moestro.gate.ranges import Experts, Positive, check_fields
from moestro.routing import Routing

EPS = 1e-20
"""Keeps a renormalisation finite where every chosen sigmoid score underflows (as DeepSeek-V3's own code does)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterRule:
    """How logits become chosen experts and weights.

    Paper: DeepSeek-V3 (arXiv:2412.19437), Eq. 14 to 16 for sigmoid, bias and groups; Shazeer et al. 2017
    (arXiv:1701.06538) for softmax.
    """

    scores: Literal["softmax", "sigmoid"] = "softmax"
    renormalise: bool = True
    """Whether a token's weights are divided by their sum."""
    scale: Positive = 1.0
    """Factor on the weights after that ("routed scaling factor")."""
    selection_bias: bool = False
    """Whether a bias, moved between steps by `moestro.balance`, is added to the scores for selection (never to the
    weights).
    """
    num_groups: Experts = 1
    top_groups: Experts = 1
    """Experts come from the best `top_groups` of `num_groups` equal groups; a group's score sums its two best."""

    def __post_init__(self) -> None:
        check_fields(self)

    def validate(self, num_experts: int, top_k: int) -> None:
        """Raise Misuse unless this rule can choose `top_k` of `num_experts`."""
        if not 1 <= top_k <= num_experts:
            raise Misuse(f"top_k must lie between 1 and num_experts ({num_experts}), got {top_k}")
        if num_experts % self.num_groups:
            raise Misuse(f"num_groups must divide num_experts ({num_experts}), got {self.num_groups}")
        if not 1 <= self.top_groups <= self.num_groups:
            raise Misuse(f"top_groups must lie between 1 and num_groups ({self.num_groups}), got {self.top_groups}")
        reachable = num_experts // self.num_groups * self.top_groups
        if top_k > reachable:
            raise Misuse(
                f"top_k must not exceed the {reachable} experts in top_groups ({self.top_groups}), got {top_k}"
            )


def simplex(logits: Float[Tensor, "tokens experts"], scores: str) -> Float[Tensor, "tokens experts"]:
    """The router's preferences as probabilities, fp32: softmax, or what scores experts singly divided by its sum.

    "probabilities" are that already; they are divided by their sum too, for routers that return only some of them.
    """
    if scores == "softmax":
        return torch.softmax(logits.float(), dim=-1)
    affinity = AFFINITIES[scores](logits.float())
    return affinity / (affinity.sum(-1, keepdim=True) + EPS)


AFFINITIES = {
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": lambda logits: (torch.nn.functional.softplus(logits) + EPS).sqrt(),
    "probabilities": lambda probabilities: probabilities,
}


def route(
    logits: Float[Tensor, "tokens experts"],
    rule: RouterRule,
    top_k: int,
    *,
    bias: Float[Tensor, " experts"] | None = None,
    banned: Bool[Tensor, "tokens experts"] | None = None,
) -> Routing:
    """Choose `top_k` experts per token by `rule`; `banned` experts are masked at selection, whatever their bias.

    Each token must keep at least `top_k` experts that are not banned in its best groups; ties go as `torch.topk`
    decides.
    """
    logits = logits.float()
    affinity = logits.softmax(-1) if rule.scores == "softmax" else logits.sigmoid()
    expert = torch.topk(selection_scores(affinity, rule, bias=bias, banned=banned), top_k, dim=-1, sorted=True).indices
    weight = affinity.gather(-1, expert)
    if rule.renormalise:
        weight = weight / (weight.sum(-1, keepdim=True) + EPS)
    scores = affinity if rule.scores == "softmax" else affinity / (affinity.sum(-1, keepdim=True) + EPS)
    return Routing(expert=expert, weight=weight * rule.scale, logits=logits, scores=scores)


def selection_scores(
    affinity: Float[Tensor, "tokens experts"],
    rule: RouterRule,
    *,
    bias: Float[Tensor, " experts"] | None = None,
    banned: Bool[Tensor, "tokens experts"] | None = None,
) -> Float[Tensor, "tokens experts"]:
    """What the top-k is taken of: affinity plus bias, minus infinity outside the best groups and where banned."""
    select = affinity.detach()
    if bias is not None:
        select = select + bias.float()
    if banned is not None:
        select = select.masked_fill(banned, float("-inf"))
    if rule.num_groups > 1:
        select = select.masked_fill(~in_best_groups(select, rule), float("-inf"))
    return select


def in_best_groups(select: Float[Tensor, "tokens experts"], rule: RouterRule) -> Bool[Tensor, "tokens experts"]:
    """True for the experts of each token's best groups.

    A group's score is the sum of its two best experts; a banned one adds nothing, and a group without others is last.
    """
    grouped = select.unflatten(-1, (rule.num_groups, -1))
    two_best = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values
    banned = two_best.isneginf()
    score = two_best.masked_fill(banned, 0.0).sum(-1).masked_fill(banned.all(-1), float("-inf"))
    best = torch.zeros_like(score, dtype=torch.bool).scatter(-1, score.topk(rule.top_groups, dim=-1).indices, True)
    return best.repeat_interleave(grouped.shape[-1], dim=-1)
