"""Which tokens, or which layers' whole steps, compete: functions without a state."""

import math
from functools import cache

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from moestro.competition.amounts import ROUNDING, number_competing, share_of_steps
from moestro.randomness import hashed, number_of
from moestro.routing import Batch


def competing_tokens(
    batch: Batch, key: Int[Tensor, " tokens"], rate: float
) -> tuple[Int[Tensor, " competing"], Bool[Tensor, " competing"]]:
    """Return the indices of the tokens that compete, and which of these indices are filled.

    In a sequence of n valid tokens, the ceil(rate * n) with the smallest hashed `key` compete. If every row is one
    sequence, the result has as many indices as unpadded rows need, and those that padding leaves over are not filled.
    The competing tokens of packed sequences are counted instead, which waits for the device.
    """
    tokens, sequence = len(key), batch.sequence
    valid = torch.ones_like(sequence, dtype=torch.bool) if batch.valid is None else batch.valid
    per_sequence = torch.zeros(batch.num_sequences, dtype=torch.long, device=key.device)
    length = per_sequence.index_add(0, sequence, valid.long())
    by_key = hashed(key).masked_fill(~valid, 2**63 - 1).argsort()
    order = by_key[sequence[by_key].argsort(stable=True)]  # sequence by sequence, each in the order of its keys
    everything = per_sequence.index_add(0, sequence, torch.ones_like(sequence))
    start = everything.cumsum(0) - everything
    rank = torch.arange(tokens, device=key.device) - start[sequence[order]]
    number = (rate * length.double() - ROUNDING).ceil()
    competes = torch.zeros_like(valid).scatter(0, order, rank < number[sequence[order]])
    if batch.num_sequences < tokens:
        rows = batch.num_sequences * number_competing(rate, tokens // batch.num_sequences)
    else:
        rows = int(competes.sum())
    token = competes.int().argsort(descending=True, stable=True)[:rows]
    return token, competes[token]


def competes_in_step(step: int, layer: int, num_layers: int, rate: float, max_layers: int | None, seed: int) -> bool:
    """Whether a layer competes in a step, with all tokens.

    Each layer does so in its share of the steps, evenly spaced, and layers take turns in an order drawn by the seed: a
    step has the rounded mean number of competing layers, never more than `max_layers`, and no layer starves.

    Paper: Nguyen et al. 2025, arXiv:2505.13380. Departs from the paper: there each layer flips a coin in each step, and
    flips above the cap move to a free step; the public code drops those of the last layers.
    """
    share = share_of_steps(rate, max_layers, num_layers)
    phase = turns(num_layers, seed)[layer] / num_layers
    return math.floor((step + 1) * share + phase + ROUNDING) > math.floor(step * share + phase + ROUNDING)


@cache
def turns(num_layers: int, seed: int) -> tuple[int, ...]:
    """Return each layer's place in an order drawn from the seed."""
    order = sorted(range(num_layers), key=lambda layer: number_of(f"turn {seed} {layer}"))
    return tuple(order.index(layer) for layer in range(num_layers))
