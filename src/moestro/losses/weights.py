"""Losses on a router's weight, which has one row per expert. They look at no token: count them once per step."""

import torch
from jaxtyping import Float
from torch import Tensor

from moestro.losses.inner_products import correlation
from moestro.losses.per_sequence import full_precision


def router_orthogonality(weight: Float[Tensor, "experts dim"]) -> Float[Tensor, ""]:
    """Mean of (cos(w_i, w_j) - I_ij)^2 over all pairs of rows, i = j included. fp32.

    A zero row has cosine 0 to every row, itself included, and no gradient.

    Paper: Baidu 2025, ERNIE 4.5 technical report (not on arXiv): router orthogonalisation loss; the public code of it.
    """
    return (correlation(_row_products(weight)) - _identity(weight)).square().mean()


def simbal(weight: Float[Tensor, "experts dim"]) -> Float[Tensor, ""]:
    """Sum of |W W^T - I| over all pairs of rows: orthogonal rows of length 1 keep distances between tokens. fp32.

    Paper: Omi et al. 2025 (SimBal), arXiv:2506.14038: its R is W transposed, so R^T R = W W^T is over experts.
    """
    return (_row_products(weight) - _identity(weight)).abs().sum()


def _row_products(weight: Float[Tensor, "experts dim"]) -> Float[Tensor, "experts experts"]:
    with torch.autocast(weight.device.type, enabled=False):
        rows = full_precision(weight)
        return rows @ rows.mT


def _identity(weight: Float[Tensor, "experts dim"]) -> Float[Tensor, "experts experts"]:
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return torch.eye(len(weight), dtype=dtype, device=weight.device)
