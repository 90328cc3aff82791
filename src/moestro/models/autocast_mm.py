"""`autocast_mm`: transformers' `grouped_mm` experts, in the dtype of autocast.

transformers' `grouped_mm` computes in the dtype of the *weights*: under bf16 autocast with fp32 weights, experts run in
fp32. This backend casts weights and tokens, as autocast does for
any linear layer.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

AUTOCAST_MM = "autocast_mm"


def register() -> None:
    """Register `experts_implementation="autocast_mm"` with transformers. Repeated calls have no effect."""
    ALL_EXPERTS_FUNCTIONS.register(AUTOCAST_MM, autocast_mm_experts_forward)


def autocast_mm_experts_forward(
    self: nn.Module,
    hidden_states: Float[Tensor, "tokens dim"],
    top_k_index: Int[Tensor, "tokens k"],
    top_k_weights: Float[Tensor, "tokens k"],
) -> Float[Tensor, "tokens dim"]:
    """Run each token through its chosen experts and mix their outputs: transformers' experts interface.

    Without autocast the result equals that of `grouped_mm` bit for bit.
    """
    device = hidden_states.device.type
    if not torch.is_autocast_enabled(device):
        return grouped_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)
    dtype = torch.get_autocast_dtype(device)
    mixed = grouped_mm_experts_forward(
        _Cast(self, dtype),  # type: ignore[arg-type]
        hidden_states.to(dtype),
        top_k_index,
        top_k_weights,
    )
    return mixed.to(hidden_states.dtype)


class _Cast:
    """The experts with their matrices cast to `dtype`. Biases keep their dtype, in which their gradients are summed."""

    def __init__(self, experts: nn.Module, dtype: torch.dtype) -> None:
        self._experts = experts
        for name in ("gate_up_proj", "up_proj", "down_proj"):
            if (weight := getattr(experts, name, None)) is not None:
                setattr(self, name, weight.to(dtype))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._experts, name)
