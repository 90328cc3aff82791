"""Bringing the responses of all experts to one scale.

An expert whose outputs are large would win everywhere, and be trained to be larger still. Its own mean over tokens
takes that away. The mean over a token's experts would not: it leaves large experts large.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Scale = Literal["none", "mean", "standard", "log"]
"""Responses as they are; over each expert's running mean; less that mean, over its running standard deviation; the same
of their logarithms."""

DECAY = 0.9
"""Of what was seen, per optimiser step: a mean over about ten steps' tokens."""
EVEN_STEPS, EVEN_RATE = 64, 0.1
"""How the offsets are found under which experts win a sample equally often."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseStatistics:
    """Mean and standard deviation of each expert's response to the tokens that competed lately, the same for all.

    Of its logarithm where the scale is log.
    """

    mean: Float[Tensor, " experts"]
    std: Float[Tensor, " experts"]
    offset: Float[Tensor, " experts"]
    """Is added where responses are standardised, so that an expert that won too often wins less: 0 unless balanced."""


def response_sums(
    response: Float[Tensor, "competing experts"],
    filled: Bool[Tensor, " competing"],
    scale: Scale,
    winner: Int[Tensor, "competing k"] | None = None,
) -> Float[Tensor, "4 experts"]:
    """Number, sum, sum of squares and wins over the tokens that competed.

    In float64: they add up over batches and ranks.
    """
    number = units(response, scale).double().masked_fill(~filled[:, None], 0.0)
    wins = torch.zeros_like(number[0]) if winner is None else wins_of(winner, filled, response.shape[1])
    return torch.stack([filled.double().sum().expand_as(wins), number.sum(0), number.square().sum(0), wins])


def wins_of(
    winner: Int[Tensor, "competing k"], filled: Bool[Tensor, " competing"], num_experts: int
) -> Float[Tensor, " experts"]:
    """How often each expert won."""
    once = filled.double()[:, None].expand(winner.shape).flatten()
    return torch.zeros(num_experts, dtype=torch.float64, device=winner.device).index_add(0, winner.flatten(), once)


def toward_even(
    offset: Float[Tensor, " experts"], wins: Float[Tensor, " experts"], rate: float
) -> Float[Tensor, " experts"]:
    """Offsets lower by `rate` times what an expert won above the mean, as a share of that; where nobody won, as before.

    Selection biases of routers that are balanced without a loss move alike (Wang et al. 2024, arXiv:2408.15664), by the
    sign alone.
    """
    mean = wins.mean()
    return offset - rate * torch.where(mean > 0, wins / mean.clamp_min(1e-9) - 1, 0.0).to(offset.dtype)


def statistics_of(
    sums: Float[Tensor, "rows experts"], offset: Float[Tensor, " experts"] | None = None
) -> ResponseStatistics:
    """Mean and deviation from the sums; both 1 where no token competed. Does not wait for the device to know that."""
    seen = sums[0] > 0
    number = torch.where(seen, sums[0], 1.0)
    mean = sums[1] / number
    variance = (sums[2] / number - mean.square()).clamp_min(0)
    return ResponseStatistics(
        mean=torch.where(seen, mean, 1.0).float(),
        std=torch.where(seen, variance.sqrt(), 1.0).float(),
        offset=torch.zeros_like(mean).float() if offset is None else offset.float(),
    )


def sample_statistics(
    response: Float[Tensor, "tokens experts"], scale: Scale, k: int, *, even: bool
) -> ResponseStatistics:
    """Those of a sample by itself; `even`: with the offsets under which all experts win equally often, nearly."""
    everyone = torch.ones(len(response), dtype=torch.bool, device=response.device)
    found = statistics_of(response_sums(response, everyone, scale))
    if not even:
        return found
    strength, offset = scaled(response, scale, found), found.offset
    for _ in range(EVEN_STEPS):
        winner = (strength + offset).topk(k, dim=-1).indices
        offset = toward_even(offset, wins_of(winner, everyone, response.shape[1]), EVEN_RATE)
    return replace(found, offset=offset)


def scaled(
    response: Float[Tensor, "competing n"],
    scale: Scale,
    statistics: ResponseStatistics | None,
    expert: Int[Tensor, "competing n"] | None = None,
) -> Float[Tensor, "competing n"]:
    """Responses of all experts, or of those that `expert` names, on one scale."""
    response = units(response, scale)
    if scale == "none":
        return response
    assert statistics is not None
    known = (statistics.mean, statistics.std, statistics.offset)
    mean, std, offset = (v.to(response.device) if expert is None else v.to(response.device)[expert] for v in known)
    if scale == "mean":
        return response / mean.abs().clamp_min(1e-12)
    standard = (response - mean) / (std + 1e-6 * mean.abs()).clamp_min(1e-12)  # an expert that answers all alike: 0
    return standard + offset


def units(response: Float[Tensor, "competing n"], scale: Scale) -> Float[Tensor, "competing n"]:
    """What is scaled: responses, or their logarithms. Lengths are nearly log-normal, with few that are very large."""
    return response.clamp_min(torch.finfo(response.dtype).tiny).log() if scale == "log" else response
