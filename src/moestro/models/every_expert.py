"""All experts of a layer on the same tokens: dense products, where a choice of experts needs rows sorted by expert."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


def every_expert(
    self: nn.Module, hidden_states: Float[Tensor, "tokens dim"], dtype: torch.dtype
) -> Float[Tensor, "tokens experts out"]:
    """What each expert makes of each token, computed in `dtype`.

    Args:
        self: any module decorated with `use_experts_implementation`; all the decorator's flags are obeyed.
        hidden_states: the tokens.
        dtype: of the products.
    """
    experts: Any = self
    with torch.autocast(hidden_states.device.type, enabled=False):  # `dtype` alone decides
        up = "gate_up_proj" if experts.has_gate else "up_proj"
        weight, rows = getattr(experts, up).to(dtype), hidden_states.to(dtype)
        if experts.is_transposed:
            inner = torch.matmul(rows, weight).transpose(0, 1)
        else:  # one product, of all experts' rows
            inner = F.linear(rows, weight.flatten(0, 1)).unflatten(-1, weight.shape[:2])
        inner = with_bias(inner, experts, up)
        inner = experts._apply_gate(inner) if experts.has_gate else experts.act_fn(inner)
        weight = experts.down_proj.to(dtype)
        weight = weight if experts.is_transposed else weight.transpose(1, 2)
        outputs = with_bias(torch.bmm(inner.transpose(0, 1), weight).transpose(0, 1), experts, "down_proj")
        return experts.post_expert_norm(outputs) if experts.has_post_expert_norm else outputs


def with_bias(
    rows: Float[Tensor, "tokens experts out"], experts: Any, name: str
) -> Float[Tensor, "tokens experts out"]:
    """Each expert's bias added, where there is one."""
    return rows + getattr(experts, f"{name}_bias").to(rows.dtype) if experts.has_bias else rows
