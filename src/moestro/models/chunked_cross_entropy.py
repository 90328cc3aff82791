"""The language model's head and its cross-entropy in one, chunk by chunk, without ever holding all logits.

The gradient of the logits is softmax - one_hot: it is known as soon as they are, needs no graph, and is used at once.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

_CACHED_ELEMENTS = 2**18
"""Logits per thread that the softmax works on at a time: 1 MiB in fp32, so that its passes stay in the L2 cache."""


def chunked_cross_entropy(
    hidden: Float[Tensor, "tokens dim"],
    weight: Float[Tensor, "vocabulary dim"],
    labels: Int[Tensor, " tokens"],
    *,
    num_items: Tensor | int,
    ignore_index: int = -100,
    chunk: int = 512,
) -> Float[Tensor, ""]:
    """`F.cross_entropy(hidden @ weight.T, labels, reduction="sum") / num_items`, in nats.

    The gradients of `hidden` and `weight` (those that are wanted) are computed here too; the backward pass only scales
    them. Matrix products run in the autocast dtype where autocast is on, the softmax in fp32.

    Args:
        hidden: what the head reads.
        weight: the head.
        labels: the token to predict at each position: shifting is up to the caller.
        num_items: what the sum is divided by, usually the label tokens of the whole batch.
        ignore_index: the label of positions that do not count.
        chunk: tokens whose logits are held at once.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    wanted = [torch.is_grad_enabled() and tensor.requires_grad for tensor in (hidden, weight)]
    total = _CrossEntropySum.apply(hidden, weight, labels, ignore_index, chunk, dtype, wanted)
    return total / num_items


class _CrossEntropySum(Function):
    """Sum of the cross-entropies in fp32 (fp64 if the head is)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        ignore_index: int,
        chunk: int,
        dtype: torch.dtype,
        wanted: list[bool],
    ) -> Tensor:
        exact = torch.promote_types(dtype, torch.float32)
        tokens, head = hidden.to(dtype), weight.to(dtype)
        grad_hidden = torch.empty_like(tokens) if wanted[0] else None
        grad_weight = torch.zeros_like(weight, dtype=exact) if wanted[1] else None
        total = hidden.new_zeros((), dtype=exact)
        for start in range(0, len(tokens), chunk):
            some = slice(start, start + chunk)
            logits = tokens[some] @ head.t()
            total += _softmax_minus_one_hot_(logits, labels[some], ignore_index, any(wanted))
            if grad_hidden is not None:
                grad_hidden[some] = logits @ head
            if grad_weight is not None:
                grad_weight += logits.t() @ tokens[some]
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtypes = hidden.dtype, weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        pairs = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        gradients = (None if saved is None else (saved * grad).to(dtype) for saved, dtype in pairs)
        return *gradients, None, None, None, None, None


def _softmax_minus_one_hot_(logits: Tensor, labels: Tensor, ignore_index: int, wanted: bool) -> Tensor:
    """The summed cross-entropy of a chunk; if `wanted`, its gradient takes the place of the logits."""
    total = logits.new_zeros((), dtype=torch.promote_types(logits.dtype, torch.float32))
    rows = _rows_in_cache(logits)
    for some, label in zip(logits.split(rows), labels.split(rows), strict=True):
        counts = (label != ignore_index).unsqueeze(-1)
        label = label.unsqueeze(-1).where(counts, 0)
        exact = some.to(total.dtype)  # the logits themselves where their dtype is exact already
        label_logit, top = exact.gather(1, label), exact.amax(1, keepdim=True)
        sums = exact.sub_(top).exp_().sum(1, keepdim=True)
        total += (sums.log() + top - label_logit).where(counts, 0.0).sum()
        if wanted:
            softmax = exact.mul_(counts / sums)
            some.copy_(softmax.scatter_(1, label, softmax.gather(1, label) - counts.to(softmax.dtype)))
    return total


def _rows_in_cache(logits: Tensor) -> int:
    """How many rows at a time the softmax does: on a CPU few enough for its caches, elsewhere and compiled all."""
    if logits.device.type != "cpu" or torch.compiler.is_compiling():
        return max(len(logits), 1)
    return max(_CACHED_ELEMENTS * torch.get_num_threads() // logits.shape[1], 1)
