"""Bringing the responses of all experts to one scale.

An expert whose outputs are large would win everywhere, and be trained to be larger still. Its own mean over tokens
takes that away. The mean over a token's experts would not: it leaves large experts large.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Scale = Literal["none", "mean", "standard", "log"]
"""Responses as they are; over each expert's running mean; less that mean, over its running standard deviation; the same
of their logarithms."""

DECAY = 0.9
"""Of what was seen, per optimiser step: a mean over about ten steps' tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseStatistics:
    """Mean and standard deviation of each expert's response to the tokens that competed lately, the same for all.

    Of its logarithm where the scale is log.
    """

    mean: Float[Tensor, " experts"]
    std: Float[Tensor, " experts"]


def response_sums(
    response: Float[Tensor, "competing experts"], filled: Bool[Tensor, " competing"], scale: Scale
) -> Float[Tensor, "3 experts"]:
    """Number, sum and sum of squares over the tokens that competed, in float64: they add up over batches and ranks."""
    number = units(response, scale).double().masked_fill(~filled[:, None], 0.0)
    return torch.stack([filled.double().sum().expand(response.shape[1]), number.sum(0), number.square().sum(0)])


def statistics_of(sums: Float[Tensor, "3 experts"]) -> ResponseStatistics:
    """Mean and deviation from the sums; both 1 where no token competed. Does not wait for the device to know that."""
    seen = sums[0] > 0
    number = torch.where(seen, sums[0], 1.0)
    mean = sums[1] / number
    variance = (sums[2] / number - mean.square()).clamp_min(0)
    return ResponseStatistics(
        mean=torch.where(seen, mean, 1.0).float(), std=torch.where(seen, variance.sqrt(), 1.0).float()
    )


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
    mean, std = statistics.mean.to(response.device), statistics.std.to(response.device)
    if expert is not None:
        mean, std = mean[expert], std[expert]
    if scale == "mean":
        return response / mean.abs().clamp_min(1e-12)
    return (response - mean) / (std + 1e-6 * mean.abs()).clamp_min(1e-12)  # an expert that answers all alike: 0


def units(response: Float[Tensor, "competing n"], scale: Scale) -> Float[Tensor, "competing n"]:
    """What is scaled: responses, or their logarithms. Lengths are nearly log-normal, with few that are very large."""
    return response.clamp_min(torch.finfo(response.dtype).tiny).log() if scale == "log" else response
