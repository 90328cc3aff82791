"""Finding the MoE layers of a model, and making records of what their routers return."""

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from moestro.adapters import families
from moestro.adapters.wrappers import inner_model, innermost, module_at, plain_name
from moestro.errors import Misuse
from moestro.routers import simplex
from moestro.routing import MoELayer, Routing


def moe_layers(model: nn.Module) -> list[MoELayer]:
    """Handles on every MoE layer of a model of transformers (ours among them), in order.

    Found by the experts' arguments, so a new model package needs nothing from us as long as a router beside the experts
    returns (logits, weights, indices, ...). Raises Misuse where there is no MoE layer that can be watched.
    """
    model = inner_model(model)
    layers = [layer_of(model, name, experts) for name, experts in experts_modules(model)]
    refuse_shared_experts(model, layers)
    if not layers:
        families.refuse_if_outside(model)
        raise Misuse(f"{type(model).__name__} has no experts: auxiliary losses and routing metrics need an MoE layer")
    return layers


def labels(layers: Sequence[MoELayer]) -> list[str]:
    """A label per layer: its block's number, and which of the block's MoE layers it is where there are several."""
    blocks = [layer.block for layer in layers]
    return [
        f"{block_number(layer)}.{blocks[:i].count(layer.block)}"
        if blocks.count(layer.block) > 1
        else str(block_number(layer))
        for i, layer in enumerate(layers)
    ]


def block_number(layer: MoELayer) -> int:
    """Index of the layer's block in its stack."""
    found = re.search(r"(\d+)$", layer.block)
    return int(found.group(1)) if found else 0


def experts_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield plain name and module of all experts that run: modules that take (hidden_states, index, weight).

    Those of vision and audio towers are left alone: what a batch's sequences and labels are says nothing of them.
    """
    for name, module in model.named_modules():
        arguments = [name for name in inspect.signature(type(module).forward).parameters if name != "self"]
        takes_routing = tuple(arguments[:3]) in families.EXPERTS_ARGUMENTS
        of_another_tower = re.search(r"(^|\.)(vision|visual|audio|image)", name)
        if takes_routing and not of_another_tower and families.package(module) not in families.OUTSIDE:
            plain = plain_name(name)
            if module_at(model, plain) is module:  # skips the original module that PEFT keeps beside its trained copy
                yield plain, module


def refuse_shared_experts(model: nn.Module, layers: Sequence[MoELayer]) -> None:
    """Raise Misuse if several routers share experts: the experts cannot tell which router chose them."""
    known = {layer.experts: layer for layer in layers}
    for name, module in model.named_modules(remove_duplicate=False):
        if (layer := known.get(module)) is not None:
            parent = module_at(model, plain_name(name).rpartition(".")[0])
            if find_router(parent, name) is not layer.router:
                raise Misuse(f"{layer.name} and {name} share their experts, but not their router: give each its own")


def layer_of(model: nn.Module, name: str, experts: nn.Module) -> MoELayer:
    """Return the handle on the layer of `experts`, whose plain name is `name`."""
    parent_name = name.rpartition(".")[0]
    parent = module_at(model, parent_name)
    router = find_router(parent, name)
    return families.describe(
        MoELayer(
            name=parent_name,
            block=block_name(name),
            router=router,
            experts=experts,
            num_experts=families.number_of_experts(experts),
            top_k=0,
        ),
        parent,
    )


def find_router(parent: nn.Module, path: str) -> nn.Module:
    """Return the router that stands beside the experts, without wrappers."""
    for child in map(innermost, parent.children()):
        if re.search(r"(Router|Gate)$", type(child).__name__):
            return child
    raise Misuse(f"no router was found beside {path}: {families.HOW_TO_ADAPT}")


def moved(layer: MoELayer, names: Mapping[nn.Module, str], model: nn.Module) -> MoELayer:
    """Return the layer with each module replaced by the one that now runs under the same plain name."""

    def now(module: nn.Module) -> nn.Module:
        return module_at(model, names[module]) if module in names else module

    def at(place: tuple[nn.Module, str] | None) -> tuple[nn.Module, str] | None:
        return None if place is None else (now(place[0]), place[1])

    return replace(
        layer,
        router=now(layer.router),
        experts=now(layer.experts),
        weight_at=at(layer.weight_at),
        bias_at=at(layer.bias_at),
    )


def block_name(path: str) -> str:
    """Name of the decoder block that a module's name points into: all up to its first number."""
    found = re.match(r".*?\.\d+(?=\.)", path)
    return found.group(0) if found else path


def routing_of(layer: MoELayer, routed: Any, expert: Tensor, weight: Tensor) -> Routing:
    """The record of what a router returned and the experts were given."""
    logits, scores = None, None
    if layer.scores is not None:
        if routed is None:
            raise Misuse(f"the router of {layer.name} did not run before its experts: {families.HOW_TO_ADAPT}")
        # By index: some routers return more than (logits, weights, indices). By width: some score more than experts.
        returned = (routed if isinstance(routed, Tensor) else routed[0]).reshape(len(expert), -1)[
            :, : layer.num_experts
        ]
        scores = simplex(returned, layer.scores)
        logits = None if layer.scores == "probabilities" else returned.float()
    edge = weight != 0 if families.package(layer.router) in families.SKIPPING else None
    return Routing(expert=expert, weight=weight, logits=logits, scores=scores, edge=edge)
