"""Inner products between the outputs of one token's experts, in fp32 and without an fp32 copy of the outputs."""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from moestro.losses.per_sequence import full_precision

CHUNK, CPU_CHUNK = 2**24, 2**18
"""Numbers converted to fp32 at a time: 64 MiB; on a CPU what stays in its cache, and in memory that is not returned."""

SHORTEST = 1e-20
"""Squared lengths are taken as at least this, so that cosines with a zero vector are 0 and have finite gradients."""


def gram(
    outputs: Float[Tensor, "tokens k dim"], used: Bool[Tensor, "tokens k"] | None = None
) -> Float[Tensor, "tokens k k"]:
    """G_jk = <y_j, y_k> of each token's outputs.

    Slots that are not `used` count as zero vectors, whatever they hold (NaN included), and get no gradient. Sums are
    fp32, also of bf16 outputs and under autocast. Kept for the backward pass are the outputs themselves.
    """
    return _Gram.apply(outputs, used)  # pyright: ignore[reportReturnType]


def correlation(gram: Float[Tensor, "*batch k k"]) -> Float[Tensor, "*batch k k"]:
    """cos(y_j, y_k) = G_jk / sqrt(G_jj G_kk); 0 where either is a zero vector, on the diagonal too."""
    inverse = gram.diagonal(dim1=-2, dim2=-1).clamp_min(SHORTEST).rsqrt()
    return gram * inverse[..., :, None] * inverse[..., None, :]


def off_diagonal(matrix: Float[Tensor, "*batch k k"]) -> Float[Tensor, "*batch k k"]:
    """The same with zeros on the diagonal."""
    size = matrix.shape[-1]
    return matrix.masked_fill(torch.eye(size, dtype=torch.bool, device=matrix.device), 0.0)


class _Gram(torch.autograd.Function):
    """Written out, because autograd would keep whatever dtype the product is taken in: a copy of all outputs."""

    @staticmethod
    def forward(ctx: Any, outputs: Tensor, used: Tensor | None) -> Tensor:
        ctx.save_for_backward(outputs, used)
        tokens, k, _ = outputs.shape
        dtype = torch.promote_types(outputs.dtype, torch.float32)
        result = torch.empty(tokens, k, k, dtype=dtype, device=outputs.device)
        with torch.autocast(outputs.device.type, enabled=False):
            for part in _parts(outputs):
                rows = _rows(outputs, used, part)
                result[part] = torch.bmm(rows, rows.mT)
        return result

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        """dY = (dG + dG^T) Y."""
        (grad_gram,) = grad_outputs
        outputs, used = ctx.saved_tensors
        result = torch.empty_like(outputs)
        with torch.autocast(outputs.device.type, enabled=False):
            for part in _parts(outputs):
                both = grad_gram[part] + grad_gram[part].mT
                rows = _rows(outputs, used, part)
                if result.dtype == rows.dtype and used is None and not torch.is_grad_enabled():
                    torch.bmm(both, rows, out=result[part])  # one pass over memory less
                else:
                    result[part] = _masked(torch.bmm(both, rows), used, part).to(outputs.dtype)
        return result, None


def _parts(outputs: Tensor) -> list[slice]:
    """The tokens in chunks."""
    tokens, k, dim = outputs.shape
    chunk = CPU_CHUNK if outputs.device.type == "cpu" else CHUNK
    step = max(1, chunk // max(1, k * dim))
    return [slice(start, start + step) for start in range(0, tokens, step)]


def _rows(outputs: Tensor, used: Tensor | None, part: slice) -> Tensor:
    """One chunk in full precision, zero where a slot is not used: zero times NaN would be NaN."""
    return _masked(full_precision(outputs[part]), used, part)


def _masked(rows: Tensor, used: Tensor | None, part: slice) -> Tensor:
    return rows if used is None else rows.masked_fill(~used[part, :, None], 0.0)
