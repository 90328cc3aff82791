"""`padded_mm`: an experts implementation that is quick where experts in bf16 on a CPU are slow.

transformers' own `grouped_mm` has two costs under bf16 autocast on a CPU. It casts the tokens to the dtype of the
*weights*, so experts run in fp32. And where the weights are bf16, oneDNN generates a kernel for every group size that
it has not met, and routing makes new sizes at every step. So here the weights are cast as well, and each expert's group
of rows is rounded up to a multiple of 32 with rows of zeros: few sizes, few kernels. Small groups are all made as large
as the largest, and multiplied in one batched product. docs/log.md has the measurements.

The vocabulary: a *pair* is one (token, choice), numbered token * k + choice; a *row* is a line of the matrices that the
experts multiply: pairs sorted by expert, and the zero rows. Pairs and rows are only ever gathered, in the backward pass
as well, so results are deterministic. While compiling, no shape depends on the routing, so
`torch.compile(fullgraph=True)` works.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moestro.models.autocast_mm import AUTOCAST_MM

PADDED_MM = "padded_mm"
_MULTIPLE = 32
_MOST_EQUAL_ROWS, _MOST_ZEROS = 512, 2.0
"""Largest groups that are multiplied in one batched product, and how many times the rows it may have."""


def register() -> None:
    """Make `experts_implementation="padded_mm"` known to transformers. Calling it again changes nothing."""
    ALL_EXPERTS_FUNCTIONS.register(PADDED_MM, padded_mm_experts_forward)


def padded_mm_experts_forward(
    self: nn.Module,
    hidden_states: Float[Tensor, "tokens dim"],
    top_k_index: Int[Tensor, "tokens k"],
    top_k_weights: Float[Tensor, "tokens k"],
) -> Float[Tensor, "tokens dim"]:
    """Run each token through its chosen experts and mix their outputs: transformers' experts interface.

    Args:
        self: any module decorated with `use_experts_implementation`; all the decorator's flags are obeyed.
        hidden_states: the tokens.
        top_k_index: the chosen experts. Under expert parallelism ids >= `num_experts` live on another rank and add 0.
        top_k_weights: how much each expert's output counts. Under autocast they are rounded as everything else is.

    Returns:
        Per token, the sum over its experts of weight * output, in the dtype of `hidden_states`.
    """
    experts: Any = self  # the decorator and the model's own class set what is read below
    layout, rows = _run(experts, hidden_states, top_k_index, compute_dtype(experts, PADDED_MM))
    mixed = _Mix.apply(rows, top_k_weights, layout.row_of_pair, layout.pair_of_row, layout.token_of_row)
    return mixed.to(hidden_states.dtype)


def unmixed(
    self: nn.Module, hidden_states: Float[Tensor, "tokens dim"], top_k_index: Int[Tensor, "tokens k"], backend: str
) -> Float[Tensor, "tokens k out"]:
    """Return each chosen expert's own output, before `backend` weights and sums them.

    `backend` is "padded_mm", "autocast_mm" or transformers' "grouped_mm". The matrix products are the same row by row,
    without the copies that a call of the backend with one expert per row would need.
    """
    experts: Any = self
    dtype, padded = compute_dtype(experts, backend), backend == PADDED_MM
    layout, rows = _run(experts, hidden_states, top_k_index, dtype, padded=padded)
    return _Collect.apply(rows, layout.row_of_pair, layout.pair_of_row)


def _run(
    experts: Any,
    hidden_states: Float[Tensor, "tokens dim"],
    top_k_index: Int[Tensor, "tokens k"],
    dtype: torch.dtype,
    *,
    padded: bool = True,
) -> tuple["_Layout", Float[Tensor, "rows out"]]:
    """Each row's output, not yet weighted."""
    up = "gate_up_proj" if experts.has_gate else "up_proj"
    layout = _lay_out(top_k_index, experts, dtype, padded=padded)
    rows = _Dispatch.apply(hidden_states, layout.row_of_pair, layout.token_of_row, dtype)
    rows = _linear(layout.mask(rows), experts, up, layout)
    rows = experts._apply_gate(rows) if experts.has_gate else experts.act_fn(rows)
    rows = _linear(rows, experts, "down_proj", layout)
    if experts.has_post_expert_norm:
        rows = experts.post_expert_norm(rows)
    return layout, rows


def compute_dtype(experts: Any, backend: str) -> torch.dtype:
    """What `backend` multiplies in. transformers' grouped_mm takes the weights' dtype, under autocast too."""
    weight = experts.down_proj
    autocast = backend in (PADDED_MM, AUTOCAST_MM) and torch.is_autocast_enabled(weight.device.type)
    return torch.get_autocast_dtype(weight.device.type) if autocast else weight.dtype


def _linear(rows: Float[Tensor, "rows in"], experts: Any, name: str, layout: "_Layout") -> Float[Tensor, "rows out"]:
    """Each row through the linear map `name` of its expert."""
    rows = _grouped_matmul(rows, getattr(experts, name), layout, experts.is_transposed)
    if experts.has_bias:
        # Cast after the gather, so that the bias's gradient is summed in its own dtype.
        rows = rows + getattr(experts, f"{name}_bias")[layout.expert_of_row()].to(rows.dtype)
    return layout.mask(rows)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Layout:
    """Which pair stands in which row.

    Attributes:
        row_of_pair: "tokens k".
        pair_of_row: "rows"; the number of pairs in a row of zeros.
        token_of_row: "rows"; the number of tokens in a row of zeros.
        ends: "experts", int32, where each expert's group of rows ends.
        foreign: "rows"; which ones no expert of this rank multiplies, so that what stands there is uninitialised
            memory, forward and backward. None without expert parallelism: then there are none.
        equal: True if all groups have equally many rows, so that one batched product multiplies them.
    """

    row_of_pair: Tensor
    pair_of_row: Tensor
    token_of_row: Tensor
    ends: Tensor
    foreign: Tensor | None
    equal: bool

    def mask(self, rows: Float[Tensor, "rows dim"]) -> Float[Tensor, "rows dim"]:
        """Zeros in the foreign rows, and in their gradient."""
        return rows if self.foreign is None else rows.masked_fill(self.foreign.unsqueeze(-1), 0.0)

    def expert_of_row(self) -> Int[Tensor, " rows"]:
        """Whose bias each row gets."""
        row = torch.arange(len(self.pair_of_row), device=self.ends.device, dtype=self.ends.dtype)
        return torch.searchsorted(self.ends, row, right=True).clamp(max=len(self.ends) - 1)


def _lay_out(
    expert_of_pair: Int[Tensor, "tokens k"], experts: Any, dtype: torch.dtype, *, padded: bool = True
) -> _Layout:
    """Sort the pairs by expert, and give each expert as many rows as its pairs need."""
    tokens, k = expert_of_pair.shape
    flat, device = expert_of_pair.flatten(), expert_of_pair.device
    multiple = _rows_multiple(len(flat), experts.num_experts, dtype, device) if padded else 1
    experts_and_foreign = torch.arange(experts.num_experts + 1, device=device)

    pair_in_order = torch.argsort(flat, stable=True)
    expert_in_order = flat[pair_in_order].clamp(max=experts.num_experts)
    begins = torch.searchsorted(expert_in_order, experts_and_foreign)
    group_sizes = (begins.diff() + multiple - 1) // multiple * multiple
    used_experts = min(experts.num_experts, len(flat))
    num_rows = -(-(len(flat) + (multiple - 1) * used_experts) // multiple) * multiple  # rounded up
    equal = multiple > 1 and not experts._is_expert_parallel and _pays_to_equalise(group_sizes, num_rows)
    if equal:
        group_sizes = group_sizes.amax().expand(experts.num_experts)
        num_rows = int(group_sizes.sum())
    padded_begins = F.pad(group_sizes.cumsum(0), (1, 0))
    row_in_order = torch.arange(len(flat), device=device) + (padded_begins - begins)[expert_in_order]

    row_of_pair = torch.empty_like(pair_in_order).scatter(0, pair_in_order, row_in_order)
    pair_of_row = pair_in_order.new_full((num_rows,), len(flat)).scatter(0, row_in_order, pair_in_order)
    ends = padded_begins[1:].int()
    if experts._is_expert_parallel:
        foreign = torch.arange(num_rows, device=device) >= ends[-1]
    else:  # The last expert multiplies what is left of the buffer, all zeros: nothing stays uninitialised.
        ends, foreign = torch.cat([ends[:-1], ends.new_full((1,), num_rows)]), None
    return _Layout(
        row_of_pair=row_of_pair.view(tokens, k),
        pair_of_row=pair_of_row,
        token_of_row=torch.div(pair_of_row, k, rounding_mode="floor"),
        ends=ends,
        foreign=foreign,
        equal=equal,
    )


def _pays_to_equalise(group_sizes: Int[Tensor, " experts"], num_rows: int) -> bool:
    """Return whether one batched product of groups as large as the largest is faster than a product per group.

    It saves about 20 microseconds per group and product, and costs the rows of zeros. Compiled graphs cannot depend on
    the routing.
    """
    if torch.compiler.is_compiling():
        return False
    rows = len(group_sizes) * int(group_sizes.amax())
    return rows <= _MOST_EQUAL_ROWS * len(group_sizes) and rows <= _MOST_ZEROS * num_rows


def _rows_multiple(pairs: int, num_experts: int, dtype: torch.dtype, device: torch.device) -> int:
    """What group sizes are rounded up to. Only half precision on a CPU has kernels that know their sizes; and small
    groups have few sizes anyway, and would be mostly zeros.
    """
    pays = device.type == "cpu" and dtype in (torch.bfloat16, torch.float16) and pairs >= _MULTIPLE * num_experts
    return _MULTIPLE if pays else 1


class _Dispatch(Function):
    """Each row's token in the compute dtype, or zeros. Its gradient sums each token's rows."""

    @staticmethod
    def forward(ctx, hidden: Tensor, row_of_pair: Tensor, token_of_row: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(row_of_pair)
        ctx.dtype = hidden.dtype
        return _take(hidden.to(dtype), token_of_row, row_of_pair)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        (row_of_pair,) = ctx.saved_tensors
        # embedding_bag is index_select and sum in one pass over memory.
        return F.embedding_bag(row_of_pair, grad, mode="sum").to(ctx.dtype), None, None, None


class _Mix(Function):
    """Each token's weighted sum of its rows. Gradients are zero in rows of zeros."""

    @staticmethod
    def forward(
        ctx, rows: Tensor, weight: Tensor, row_of_pair: Tensor, pair_of_row: Tensor, token_of_row: Tensor
    ) -> Tensor:
        ctx.save_for_backward(rows, weight, row_of_pair, pair_of_row, token_of_row)
        return F.embedding_bag(row_of_pair, rows, per_sample_weights=weight.to(rows.dtype), mode="sum")

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        rows, weight, row_of_pair, pair_of_row, token_of_row = ctx.saved_tensors
        grad_of_row = _take(grad, token_of_row, row_of_pair)
        weight_of_row = _take(weight.to(rows.dtype).view(-1, 1), pair_of_row, row_of_pair)
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (rows * grad_of_row).sum(-1, dtype=weight.dtype)[row_of_pair]
        return grad_of_row.mul_(weight_of_row), grad_weight, None, None, None


class _Collect(Function):
    """Rows in the order of pairs. Gradients are zero in rows of zeros."""

    @staticmethod
    def forward(ctx, rows: Tensor, row_of_pair: Tensor, pair_of_row: Tensor) -> Tensor:
        ctx.save_for_backward(row_of_pair, pair_of_row)
        return rows.index_select(0, row_of_pair.flatten()).view(*row_of_pair.shape, rows.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        row_of_pair, pair_of_row = ctx.saved_tensors
        return _take(grad.flatten(0, 1), pair_of_row, row_of_pair), None, None


def _take(x: Float[Tensor, "n dim"], index: Int[Tensor, " rows"], pairs: Tensor) -> Float[Tensor, "rows dim"]:
    """`x[index]`, with zeros where index is n, which occurs only where there are more rows than pairs."""
    if len(index) > pairs.numel():
        x = _append_zero_row(x)
    return x.index_select(0, index)


def _append_zero_row(x: Float[Tensor, "n dim"]) -> Float[Tensor, "n+1 dim"]:
    return torch.cat([x, x.new_zeros(1, x.shape[1])])


def _grouped_matmul(
    rows: Float[Tensor, "rows in"],
    weight: Float[Tensor, "experts out_or_in in_or_out"],
    layout: _Layout,
    transposed: bool,
) -> Float[Tensor, "rows out"]:
    """Each group of rows times its expert's weight, [out, in] or [in, out] if `transposed`."""
    if layout.equal:
        return _BatchedMatmul.apply(rows, weight, transposed)
    widths_fit = all(width * rows.element_size() % 16 == 0 for width in weight.shape[1:])
    compiled = torch.compiler.is_compiling() and rows.dtype != torch.bfloat16
    if rows.dtype == torch.float64 or compiled or not widths_fit:  # what torch's grouped_mm cannot do
        matrix = weight if transposed else weight.transpose(1, 2)
        return torch.ops.transformers.grouped_mm_fallback(rows, matrix.to(rows.dtype), layout.ends)
    return _GroupedMatmul.apply(rows, weight, layout.ends, transposed)


class _BatchedMatmul(Function):
    """One product of all groups, which have equally many rows, with the cast of the weight inside."""

    @staticmethod
    def forward(ctx, rows: Tensor, weight: Tensor, transposed: bool) -> Tensor:
        cast, groups = weight.to(rows.dtype), rows.unflatten(0, (len(weight), -1))
        ctx.save_for_backward(groups, cast)
        ctx.transposed, ctx.weight_dtype = transposed, weight.dtype
        return torch.bmm(groups, cast if transposed else cast.transpose(1, 2)).flatten(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        groups, weight = ctx.saved_tensors
        grad = grad.unflatten(0, (len(weight), -1))
        grad_rows = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_rows = torch.bmm(grad, weight.transpose(1, 2) if ctx.transposed else weight).flatten(0, 1)
        if ctx.needs_input_grad[1]:
            left, right = (groups, grad) if ctx.transposed else (grad, groups)
            grad_weight = torch.bmm(left.transpose(1, 2), right).to(ctx.weight_dtype)
        return grad_rows, grad_weight, None


class _GroupedMatmul(Function):
    """torch's grouped_mm with the cast of the weight inside, and gradients laid out as the weight is."""

    @staticmethod
    def forward(ctx, rows: Tensor, weight: Tensor, ends: Tensor, transposed: bool) -> Tensor:
        cast = weight.to(rows.dtype)
        ctx.save_for_backward(rows, cast, ends)
        ctx.transposed, ctx.weight_dtype = transposed, weight.dtype
        return F.grouped_mm(rows, cast if transposed else cast.transpose(1, 2), offs=ends)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        rows, weight, ends = ctx.saved_tensors
        grad_rows = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_rows = F.grouped_mm(grad, weight.transpose(1, 2) if ctx.transposed else weight, offs=ends)
        if ctx.needs_input_grad[1]:
            left, right = (rows, grad) if ctx.transposed else (grad, rows)
            grad_weight = F.grouped_mm(left.t(), right, offs=ends).to(ctx.weight_dtype)
        return grad_rows, grad_weight, None, None
