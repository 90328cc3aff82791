"""What the routing of a layer looks like, in numbers: sums over tokens that can be added up, and figures made of them.

`RoutingSums` of two batches (or two ranks) add; `RoutingFigures` are computed once at the end. Definitions:
docs/papers.md.
"""

from dataclasses import dataclass, fields

import torch
from jaxtyping import Float
from torch import Tensor

from moestro.routing import LayerRecord, choices_per_group


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingSums:
    """Sums over the valid tokens that one layer saw; float64, so that long runs lose no count."""

    choices: Float[Tensor, "domains experts"]
    """Edges from each domain's tokens to each expert (one domain where none are known)."""
    score: Float[Tensor, " experts"]
    entropy: Float[Tensor, ""]
    confidence: Float[Tensor, ""]
    tokens: Float[Tensor, ""]
    batch_max_vio: Float[Tensor, ""]
    batches: Float[Tensor, ""]

    def __add__(self, other: "RoutingSums") -> "RoutingSums":
        return RoutingSums(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingFigures:
    """One layer's routing, summed up."""

    load: list[float]
    """Share of choices per expert; sums to 1."""
    domain_load: list[list[float]]
    """The same within each domain; all zero for a domain without tokens."""
    max_vio_batch: float
    """Mean over batches of (largest load - mean load) / mean load."""
    max_vio_data: float
    """The same for the load over all batches together."""
    dead_experts: int
    """Experts that nobody chose."""
    entropy: float
    """Mean entropy of a token's scores, in nats: 0 when certain, log(num_experts) when uniform."""
    confidence: float
    """Mean score of a token's first choice."""
    mutual_information: float
    """Between token and expert, in nats: entropy of the mean scores minus mean entropy of the scores."""
    domain_mutual_information: float
    """Between domain and expert, in nats, from the counts of choices (biased upwards where tokens are few)."""


@torch.no_grad()
def routing_sums(record: LayerRecord, num_domains: int = 1) -> RoutingSums:
    """The sums of one layer in one batch. Tokens whose domain is unknown count as the first."""
    batch, routing, num_experts = record.batch, record.routing, record.layer.num_experts
    domain = torch.zeros_like(batch.sequence) if batch.domain is None else batch.domain
    edges = choices_per_group(routing, batch, domain, num_domains, num_experts).double()
    scores = routing.scores
    if scores is None:
        scores = torch.zeros(len(domain), num_experts, device=domain.device).scatter(1, routing.expert, 1.0)
        scores = scores / scores.sum(-1, keepdim=True)
    if batch.valid is not None:  # what stands at padding may be anything, NaN included
        scores = scores.masked_fill(~batch.valid[:, None], 0.0)
    tokens = torch.tensor(float(len(domain))) if batch.valid is None else batch.valid.sum()
    return RoutingSums(
        choices=edges,
        score=scores.sum(0, dtype=torch.float64),
        entropy=torch.special.entr(scores).sum(dtype=torch.float64),
        confidence=scores.amax(-1).sum(dtype=torch.float64),
        tokens=tokens.to(edges),
        batch_max_vio=max_violation(edges.sum(0)),
        batches=torch.ones_like(edges[0, 0]),
    )


def max_violation(load: Float[Tensor, " experts"]) -> Float[Tensor, ""]:
    """(largest load - mean load) / mean load: 0 when balanced, num_experts - 1 when one expert gets everything.

    Paper: Wang et al. 2024, arXiv:2408.15664, Eq. 4 (MaxVio). 0 where there is no load at all.
    """
    mean = load.mean()
    return torch.where(mean > 0, (load.amax() - mean) / mean.clamp_min(1e-12), torch.zeros_like(mean))


def routing_figures(sums: RoutingSums) -> RoutingFigures:
    """The figures of one layer from its sums."""
    load = sums.choices.sum(0)
    tokens = sums.tokens.clamp_min(1)
    mean_entropy = sums.entropy / tokens
    return RoutingFigures(
        load=normalised(load).tolist(),
        domain_load=normalised(sums.choices).tolist(),
        max_vio_batch=float(sums.batch_max_vio / sums.batches.clamp_min(1)),
        max_vio_data=float(max_violation(load)),
        dead_experts=int((load == 0).sum()),
        entropy=float(mean_entropy),
        confidence=float(sums.confidence / tokens),
        mutual_information=float(torch.special.entr(sums.score / tokens).sum() - mean_entropy),
        domain_mutual_information=float(mutual_information(sums.choices)),
    )


def normalised(count: Float[Tensor, "*rows experts"]) -> Float[Tensor, "*rows experts"]:
    """Counts as shares of their row; a row without counts stays zero."""
    return count / count.sum(-1, keepdim=True).clamp_min(1)


def mutual_information(count: Float[Tensor, "rows columns"]) -> Float[Tensor, ""]:
    """Mutual information of rows and columns of a table of counts, in nats."""
    joint = count / count.sum().clamp_min(1)
    entropy = torch.special.entr
    return entropy(joint.sum(0)).sum() + entropy(joint.sum(1)).sum() - entropy(joint).sum()
