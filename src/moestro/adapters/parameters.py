"""Freezing, and learning rates of their own, for the routers and experts of any MoE model."""

from typing import Any, Literal

from torch import Tensor, nn
from transformers.trainer_pt_utils import get_parameter_names

from moestro.adapters.layers import moe_layers
from moestro.adapters.wrappers import inner_model, plain_name
from moestro.errors import Misuse
from moestro.gate.ranges import Weight, check

NOT_DECAYED = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
"""Names that the Trainer does not decay."""

Part = Literal["router", "experts", "rest"]


def parts(model: nn.Module) -> dict[str, Part]:
    """Which part of the model each of its parameters belongs to, by name; LoRA's factors to what they adapt."""
    inner = inner_model(model)
    names = {id(module): plain_name(name) for name, module in inner.named_modules()}
    prefixes: dict[str, Part] = {}
    for layer in moe_layers(inner):
        prefixes |= {f"{names[id(layer.router)]}.": "router", f"{names[id(layer.experts)]}.": "experts"}
    outer = {id(parameter): name for name, parameter in model.named_parameters()}

    def part_of(name: str) -> Part:
        for prefix, part in prefixes.items():
            if plain_name(name).startswith(prefix):
                return part
        return "rest"

    return {outer[id(p)]: part_of(name) for name, p in inner.named_parameters() if id(p) in outer}


def freeze(model: nn.Module, *frozen: Part) -> None:
    """Let these parts of the model ("router", "experts", "rest") take no gradient; the others stay as they are."""
    for part in frozen:
        if part not in ("router", "experts", "rest"):
            raise Misuse(f"freeze knows router, experts and rest, got {part!r}")
    part_of = parts(model)
    for name, parameter in model.named_parameters():
        if part_of.get(name) in frozen:
            parameter.requires_grad_(False)


def parameter_groups(
    model: nn.Module,
    learning_rate: float,
    *,
    router: float = 1.0,
    experts: float = 1.0,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Parameter groups for any optimiser of torch: routers and experts at multiples of `learning_rate`.

    Frozen parameters are left out, and norms and biases not decayed, as the Trainer does it. For a Trainer:
    `Trainer(..., optimizers=(torch.optim.AdamW(parameter_groups(model, 1e-4, router=0.1)), None))`; its schedule scales
    every group's own rate.
    """
    rates = {"router": router, "experts": experts, "rest": 1.0}
    for name, rate in (*rates.items(), ("learning_rate", learning_rate), ("weight_decay", weight_decay)):
        check(name, rate, Weight)
    part_of = parts(model)
    decayed = set(get_parameter_names(model, [nn.LayerNorm], NOT_DECAYED))
    groups: dict[tuple[Part, bool], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((part_of.get(name, "rest"), name in decayed), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": learning_rate * rates[part],
            "weight_decay": weight_decay if decays else 0.0,
            "name": f"{part}, {'decayed' if decays else 'not decayed'}",
        }
        for (part, decays), parameters in groups.items()
    ]
