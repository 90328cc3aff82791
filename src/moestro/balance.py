"""Loss-free load balance: a selection bias that moves between optimiser steps, outside autograd."""

from jaxtyping import Float
from torch import Tensor


def next_bias(
    bias: Float[Tensor, " experts"], load: Float[Tensor, " experts"], rate: float = 1e-3
) -> Float[Tensor, " experts"]:
    """Return the bias after one step: up by `rate` for experts below the mean load, down for those above it.

    `load` counts the choices of a whole optimiser step (all micro-batches, all ranks); its unit does not matter.
    Paper: Wang et al. 2024, arXiv:2408.15664, Algorithm 1; DeepSeek-V3, arXiv:2412.19437, section 2.1.2.
    """
    return bias + rate * (load.mean() - load).sign().to(bias)
