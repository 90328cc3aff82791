"""How the choices of two MoE layers hang together: their joint histogram over tokens, and what it tells.

Where two sub-layers are composed (CartesianMoE, arXiv:2410.16077), the pairs of their experts are what a token can
choose from. If the second one's choice followed from the first one's, k times k paths would be left of e times e.
"""

from dataclasses import dataclass, fields

import torch
from jaxtyping import Float
from torch import Tensor

from moestro.information import expected_mutual_information, mutual_information
from moestro.routing import Batch, Routing, chosen


@dataclass(frozen=True, slots=True, kw_only=True)
class JointSums:
    """Counts over valid tokens, float64; those of two batches add."""

    pairs: Float[Tensor, "experts later_experts"]
    """Tokens that chose both: an expert of the earlier layer and one of the later."""
    earlier: Float[Tensor, " experts"]
    """Tokens that chose each expert of the earlier layer."""
    later: Float[Tensor, " later_experts"]
    tokens: Float[Tensor, ""]

    def __add__(self, other: "JointSums") -> "JointSums":
        return JointSums(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})


@dataclass(frozen=True, slots=True, kw_only=True)
class JointFigures:
    """Two layers' choices together. Information is in nats, between one expert of each, drawn evenly from a token's."""

    histogram: tuple[tuple[float, ...], ...]
    """Share of all pairs, earlier expert by later expert; sums to 1."""
    mutual_information: float
    mutual_information_shuffled: float
    """Expected if the later layer's choices were dealt to tokens at random: that much is chance."""

    @property
    def mutual_information_excess(self) -> float:
        """What one layer's choice tells of the other's, above chance."""
        return self.mutual_information - self.mutual_information_shuffled


def joint_sums(earlier: Routing, later: Routing, batch: Batch, num_experts: tuple[int, int]) -> JointSums:
    """Counts of one batch; both layers must have routed the same tokens."""
    first, second = (
        torch.zeros(len(routing.expert), width, dtype=torch.float64, device=routing.expert.device).scatter_add(
            1, routing.expert, chosen(routing, batch).double()
        )
        for routing, width in zip((earlier, later), num_experts, strict=True)
    )
    return JointSums(
        pairs=first.T @ second,
        earlier=first.sum(0),
        later=second.sum(0),
        tokens=(first.sum(-1) > 0).sum(dtype=torch.float64),
    )


def no_joint_sums(num_experts: tuple[int, int], device: torch.device) -> JointSums:
    """The sums where there was no token."""
    zeros = {"pairs": num_experts, "earlier": num_experts[:1], "later": num_experts[1:], "tokens": ()}
    return JointSums(**{name: torch.zeros(shape, dtype=torch.float64, device=device) for name, shape in zeros.items()})


def joint_figures(sums: JointSums) -> JointFigures:
    """The figures from the sums."""
    share = sums.pairs / sums.pairs.sum().clamp_min(1)
    chance = expected_mutual_information(sums.earlier, torch.ones_like(sums.earlier), sums.later, among=sums.tokens)
    return JointFigures(
        histogram=tuple(map(tuple, share.tolist())),
        mutual_information=float(mutual_information(sums.pairs)),
        mutual_information_shuffled=float(chance),
    )
