"""Bringing the responses of all experts to one scale.

An expert whose outputs are large would win everywhere, and be trained to be larger still. Its own mean over tokens
takes that away. The mean over a token's experts would not: it leaves large experts large. What is left, an expert that
wins more often than others all the same, an offset takes away.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moestro.competition.settings import Scale

DECAY = 0.9
"""Of what was seen, per step in which the layer competed: a mean over about ten steps' tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseStatistics:
    """Mean and standard deviation of each expert's response to the tokens that competed lately, the same for all.

    Of its logarithm where the scale is log.
    """

    mean: Float[Tensor, " experts"]
    std: Float[Tensor, " experts"]
    offset: Float[Tensor, " experts"]
    """Is added to standardised responses, so that an expert that won too often wins less: 0 unless balanced."""


def response_sums(
    response: Float[Tensor, "competing experts"],
    filled: Bool[Tensor, " competing"],
    scale: Scale,
    statistics: ResponseStatistics | None = None,
    winner: Int[Tensor, "competing k"] | None = None,
) -> Float[Tensor, "5 experts"]:
    """Number, sum, sum of squares, wins and deviations within tokens, over the tokens that competed.

    In float64: they add up over batches and ranks. Wins and deviations are 0 where nobody won yet.
    """
    number = units(response, scale).double().masked_fill(~filled[:, None], 0.0)
    wins = within = torch.zeros_like(number[0])
    if winner is not None and statistics is not None:
        wins = wins_of(winner, filled, response.shape[1])
        of_tokens = deviation_within(response, scale, statistics).double().masked_fill(~filled, 0.0)
        within = of_tokens.sum().expand_as(wins)
    return torch.stack([filled.double().sum().expand_as(wins), number.sum(0), number.square().sum(0), wins, within])


def wins_of(
    winner: Int[Tensor, "competing k"], filled: Bool[Tensor, " competing"], num_experts: int
) -> Float[Tensor, " experts"]:
    """How often each expert won."""
    once = filled.double()[:, None].expand(winner.shape).flatten()
    return torch.zeros(num_experts, dtype=torch.float64, device=winner.device).index_add(0, winner.flatten(), once)


def deviation_within(
    response: Float[Tensor, "competing experts"], scale: Scale, statistics: ResponseStatistics
) -> Float[Tensor, " competing"]:
    """Standard deviation of a token's standardised responses over experts: 0 where all experts are copies of one."""
    return standardised(response, scale, statistics).std(-1, correction=0)


def next_offset(
    offset: Float[Tensor, " experts"],
    wins: Float[Tensor, " experts"],
    within: Float[Tensor, ""] | Float[Tensor, " experts"],
    rate: float,
) -> Float[Tensor, " experts"]:
    """An expert's offset falls by rate * `within` * (its wins / mean wins - 1). Where nobody won all stay.

    `within`, the mean deviation within tokens, is what decides who wins: of experts that hardly differ no chance is
    blown up. Selection biases of routers that are balanced without a loss (Wang et al. 2024, arXiv:2408.15664) move
    alike, by the sign alone.
    """
    mean = wins.mean()
    above = torch.where(mean > 0, wins / mean.clamp_min(1e-9) - 1, 0.0)
    return offset - (rate * within * above).to(offset.dtype)


def statistics_of(
    sums: Float[Tensor, "rows experts"], offset: Float[Tensor, " experts"] | None = None
) -> ResponseStatistics:
    """Mean and deviation from the first three sums, 1 where no token competed: the device is not waited for to know."""
    seen = sums[0] > 0
    number = torch.where(seen, sums[0], 1.0)
    mean = sums[1] / number
    variance = (sums[2] / number - mean.square()).clamp_min(0)
    return ResponseStatistics(
        mean=torch.where(seen, mean, 1.0).float(),
        std=torch.where(seen, variance.sqrt(), 1.0).float(),
        offset=torch.zeros_like(mean).float() if offset is None else offset.float(),
    )


def scaled(
    response: Float[Tensor, "competing n"],
    scale: Scale,
    statistics: ResponseStatistics | None,
    expert: Int[Tensor, "competing n"] | None = None,
) -> Float[Tensor, "competing n"]:
    """Responses of all experts, or of those that `expert` names, on one scale."""
    if scale == "none":
        return response
    assert statistics is not None
    if scale == "mean":
        return response / of(statistics.mean, response, expert).abs().clamp_min(1e-12)
    return standardised(response, scale, statistics, expert) + of(statistics.offset, response, expert)


def standardised(
    response: Float[Tensor, "competing n"],
    scale: Scale,
    statistics: ResponseStatistics,
    expert: Int[Tensor, "competing n"] | None = None,
) -> Float[Tensor, "competing n"]:
    """Less each expert's mean, over its standard deviation; 0 of an expert that answers all alike."""
    mean, std = of(statistics.mean, response, expert), of(statistics.std, response, expert)
    return (units(response, scale) - mean) / (std + 1e-6 * mean.abs()).clamp_min(1e-12)


def of(
    value: Float[Tensor, " experts"], response: Tensor, expert: Int[Tensor, "competing n"] | None
) -> Float[Tensor, " experts"] | Float[Tensor, "competing n"]:
    """A number per expert where the responses are, or that of the experts named."""
    value = value.to(response.device)
    return value if expert is None else value[expert]


def units(response: Float[Tensor, "competing n"], scale: Scale) -> Float[Tensor, "competing n"]:
    """What is scaled: responses, or their logarithms. Lengths are nearly log-normal, with few that are very large."""
    return response.clamp_min(torch.finfo(response.dtype).tiny).log() if scale == "log" else response
