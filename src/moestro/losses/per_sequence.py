"""What a loss over tokens returns, and the precision that all of them compute in."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from moestro.routing import LayerRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class PerSequence:
    """A loss over the tokens of each sequence."""

    sum: Float[Tensor, " sequences"]
    count: Float[Tensor, " sequences"]
    """Valid tokens of each sequence."""


def sum_per_sequence(record: LayerRecord, value: Float[Tensor, " tokens"]) -> PerSequence:
    """Add up a per-token value over the valid tokens of each sequence."""
    batch = record.batch
    valid = torch.ones_like(value) if batch.valid is None else batch.valid.to(value.dtype)
    zeros = torch.zeros(batch.num_sequences, dtype=value.dtype, device=value.device)
    # A padded token's value may be anything, NaN included: it is replaced, not multiplied by zero.
    value = value if batch.valid is None else value.masked_fill(~batch.valid, 0.0)
    return PerSequence(
        sum=zeros.index_add(0, batch.sequence, value), count=zeros.index_add(0, batch.sequence, valid.detach())
    )


def full_precision(tensor: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """The same in fp32; float64 stays as it is, for gradient checks."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
