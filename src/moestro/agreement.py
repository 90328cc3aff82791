"""How well a router knows what competition would choose: figures of tokens that all experts answered."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moestro.competition.inference import sample_statistics
from moestro.competition.scaling import scaled
from moestro.competition.settings import Compete
from moestro.competition.winners import preferences, strongest


@dataclass(frozen=True, slots=True, kw_only=True)
class AgreementFigures:
    """A router beside competition in one layer. Winners and target are those of the competition's rule."""

    tokens: int
    agreement: float
    """Share of the winners that the router chose too."""
    static_agreement: float
    """What the k experts that win most often, chosen for every token, would have: a router that sees nothing."""
    regret: float
    """Share of the winners' responses, each over its expert's mean, that is lost by the router's choice; below 0 where
    that has more of them, for winners are found on another scale."""
    target_entropy: float
    """Mean entropy of the target, over that of an even one: 1 where it says nothing."""
    spread: float
    """Mean over tokens of the standard deviation, over experts, of responses over their expert's mean."""
    response: float
    """Mean over tokens and experts; with l2 it is the length of outputs, which shows whether they grow."""
    winners_max_vio: float
    """Wins of the expert that wins most over the mean, minus 1, were winners not balanced: how far competition would
    collapse."""

    @property
    def corrected_agreement(self) -> float | None:
        """Agreement above the static one, as a share of what is left above it; None where nothing is."""
        left = 1 - self.static_agreement
        return (self.agreement - self.static_agreement) / left if left > 1e-9 else None


@torch.no_grad()
def agreement_figures(
    response: Float[Tensor, "tokens experts"], chosen: Int[Tensor, "tokens k"], rule: Compete
) -> AgreementFigures:
    """The figures of tokens whose experts all responded, and that a router sent to those `chosen`.

    Responses are brought on one scale by these very tokens.
    """
    tokens, num_experts = response.shape
    k = chosen.shape[1]
    statistics = sample_statistics(response, rule, k)
    strength = scaled(response, rule.response_scale, statistics)
    winner = strongest(strength, k)
    target = preferences(strength, winner, rule.target, rule.temperature)
    over_mean = response / response.mean(0).abs().clamp_min(1e-12)
    won, lost = over_mean.gather(-1, winner).sum(), over_mean.gather(-1, chosen).sum()
    wins = torch.bincount(winner.flatten(), minlength=num_experts).double()
    unbalanced = torch.bincount(strongest(strength - statistics.offset, k).flatten(), minlength=num_experts).double()
    static = wins.topk(k).values.sum() / (tokens * k)
    entropy = torch.special.entr(target.double()).sum(-1).mean() / max(1e-12, torch.tensor(num_experts).log().item())
    return AgreementFigures(
        tokens=tokens,
        agreement=float((chosen[:, :, None] == winner[:, None, :]).any(1).double().mean()),
        static_agreement=float(static),
        regret=float(1 - lost / won) if won != 0 else 0.0,
        target_entropy=float(entropy),
        spread=float(over_mean.std(-1, correction=0).mean()),
        response=float(response.mean()),
        winners_max_vio=float(unbalanced.max() / unbalanced.mean() - 1),
    )
