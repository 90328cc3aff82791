"""When two results are the same: to rounding, or bit for bit."""

import torch
from torch import Tensor

ROUNDING = 1e-5
"""fp32, relative."""

Gradients = dict[str, Tensor]


def far(ours: Tensor, right: Tensor, rounding: float = ROUNDING) -> bool:
    """Whether numbers differ by more than rounding, relative to the largest of them."""
    return float((ours - right).detach().abs().max()) > rounding * float(right.detach().abs().max())


def distance(ours: Gradients, right: Gradients) -> tuple[float, str]:
    """How far a gradient is off, and which: relative to its own norm, or to a hundredth of that of all parameters.

    Some gradients are what is left of sums of large numbers, and know no more digits than these have.
    """
    whole, zero = torch.stack([gradient.norm() for gradient in right.values()]).norm(), torch.zeros(())
    both = {name: (ours.get(name, zero), right.get(name, zero)) for name in ours.keys() | right.keys()}
    return max((float((a - b).norm() / torch.maximum(b.norm(), whole / 100)), name) for name, (a, b) in both.items())


def difference(ours: Gradients, right: Gradients, rounding: float = ROUNDING) -> str | None:
    """Where gradients differ by more than rounding."""
    error, name = distance(ours, right)
    return None if error <= rounding else f"the gradient of {name} is off by {error:.0e}"


def unequal(ours: Gradients, right: Gradients) -> str | None:
    """The first gradient that is not bit-identical."""
    if ours.keys() != right.keys():
        return f"gradients of {sorted(ours.keys() ^ right.keys())[0]}"
    return next((f"the gradient of {name}" for name in right if not torch.equal(ours[name], right[name])), None)
