"""Routers as pure functions: logits to a `Routing`, by a rule that a frozen record describes (`RouterRule`).

One rule covers the softmax and the sigmoid families (definitions and papers: docs/papers.md). The learned part, a
weight matrix, lives in `moestro.models.layers.Router`; what is here has no weights, so a reroute or a test can apply
a family's own rule to any logits.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from moestro.architecture.router_rule import RouterRule
from moestro.routing import Routing

EPS = 1e-20
"""Keeps a renormalisation finite where every chosen sigmoid score underflows (as DeepSeek-V3's own code does)."""


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
