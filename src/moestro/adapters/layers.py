"""Finding the MoE layers of a model, and making records of what their routers return."""

import re

from torch import Tensor, nn

from moestro.errors import Misuse
from moestro.models.layers import Router, SparseMoE
from moestro.routers import simplex
from moestro.routing import MoELayer, Routing


def moe_layers(model: nn.Module) -> list[MoELayer]:
    """Handles on every MoE layer of one of our models, in order. Raises Misuse where there is none."""
    layers = [
        MoELayer(
            name=name,
            block=block_index(name),
            router=module.router,
            experts=module.experts,
            num_experts=module.router.num_experts,
            top_k=module.router.top_k,
            bias_at=(module.router, "selection_bias") if module.router.rule.selection_bias else None,
        )
        for name, module in model.named_modules()
        if isinstance(module, SparseMoE)
    ]
    if not layers:
        raise Misuse(f"{type(model).__name__} has no experts: auxiliary losses and routing metrics need an MoE layer")
    return layers


def block_index(name: str) -> int:
    """The decoder block that a module's name points into: the first number after `layers`."""
    found = re.search(r"layers\.(\d+)\.", name)
    assert found, f"{name} is not inside a decoder block"
    return int(found.group(1))


def routing_of(router: nn.Module, output: tuple[Tensor, Tensor, Tensor]) -> Routing:
    """The record of what a router returned: (logits, weights, indices) by transformers' convention."""
    logits, weight, expert = output[0], output[1], output[2]
    assert isinstance(router, Router)
    return Routing(expert=expert, weight=weight, logits=logits, scores=simplex(logits, router.rule.scores))
