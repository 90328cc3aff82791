"""The dtype of the experts' matrix products, which a backend may choose regardless of autocast."""

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from moestro.adapters.layers import inner_model, moe_layers
from moestro.routing import MoELayer

logger = logging.getLogger(__name__)

# Position of the left factor among each operator's arguments.
PRODUCTS = {"mm": 0, "addmm": 1, "bmm": 0, "baddbmm": 1, "_grouped_mm": 0, "grouped_mm_fallback": 0}


class Products(TorchDispatchMode):
    """Record the dtype of every matrix product within the context, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        place = PRODUCTS.get(func.overloadpacket.__name__)
        if place is not None:
            self.dtypes.add(args[place].dtype)
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def experts_dtypes(model: nn.Module) -> set[torch.dtype]:
    """Run the experts of each MoE layer on zeros, and return the dtypes of their matrix products."""
    config: Any = inner_model(model).config
    width = config.get_text_config().hidden_size
    with Products() as seen:
        for layer in moe_layers(model):
            weight = next(p for p in layer.experts.parameters() if p.ndim > 1)
            hidden = torch.zeros(layer.num_experts, width, dtype=weight.dtype, device=weight.device)
            index = torch.arange(layer.num_experts, device=weight.device)[:, None].expand(-1, layer.top_k)
            layer.experts(hidden, index, torch.ones_like(index, dtype=hidden.dtype))
    return seen.dtypes


def warn_of_full_precision(layers: Iterable[MoELayer]) -> None:
    """Warn if transformers' `grouped_mm` runs experts in the dtype of their weights despite autocast."""
    for layer in layers:
        backend = getattr(getattr(layer.experts, "config", None), "_experts_implementation", None)
        weight = next((p for p in layer.experts.parameters() if p.ndim > 1), None)
        if backend != "grouped_mm" or weight is None or weight.is_meta:  # offloaded: it computes elsewhere
            continue
        if not torch.is_autocast_enabled(weight.device.type):
            continue
        if weight.dtype != (wanted := torch.get_autocast_dtype(weight.device.type)):
            names = [str(dtype).removeprefix("torch.") for dtype in (weight.dtype, wanted)]
            logger.warning(
                "experts run in %s despite %s autocast, because the backend grouped_mm ignores autocast: write "
                'model.set_experts_implementation("autocast_mm")',
                *names,
            )
            return
