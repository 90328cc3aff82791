"""What a model is: its MoE layers, which losses can do anything to it, and what to write to train its routers."""

import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from moestro.adapters.applicability import LOSSES, lora_target, obstacle, trainable
from moestro.adapters.families import package
from moestro.adapters.layers import moe_layers
from moestro.adapters.wrappers import inner_model
from moestro.errors import Misuse
from moestro.gate.loading import one_misuse
from moestro.inspection.checkpoints import Checkpoint, on_meta
from moestro.inspection.places import places
from moestro.routing import MoELayer

SUGGESTED = {"balance": "1e-2", "orthogonality": "0.1", "variance": "0.1"}
"""Suggested losses and weights, the same as in README and `+specialise`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerKind:
    """MoE layers that are alike."""

    where: str
    num_layers: int
    num_experts: int
    top_k: int
    scores: str | None
    """The function that makes preferences of the router's logits; None where the choice is looked up."""
    selection_bias: bool
    shared_experts: tuple[str, ...]
    """Names, within their block, of networks that every token passes beside the chosen experts."""
    router: str
    experts: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LossFinding:
    """Whether one auxiliary loss can do anything."""

    loss: str
    applies_at: str
    """Empty where it has no effect at all."""
    obstacles: tuple[str, ...]
    """Why not, one sentence for each group of layers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One checkpoint, as far as its config tells."""

    name: str
    spec: str
    model_class: str
    package: str
    base: str | None
    """Of an adapter: the model under it."""
    parameters: int
    """Without an adapter's."""
    active_parameters: int
    """Those that take part in one token's forward pass: all but the experts that it does not choose."""
    num_blocks: int
    num_moe_layers: int
    kinds: tuple[LayerKind, ...]
    losses: tuple[LossFinding, ...]
    own_balance: str
    router: str
    """Whether the routers learn."""
    lora: str
    """A line of Python: the LoRA targets that reach routers and experts."""
    attach: tuple[str, ...]
    """The lines of Python that attach auxiliary losses."""


def describe(checkpoint: Checkpoint) -> Finding:
    """Describe a checkpoint without reading its weights. Raise Misuse if it has no MoE layer that can be watched."""
    model = on_meta(checkpoint, adapted=False)
    with one_misuse(checkpoint.spec):
        return finding(checkpoint, model, moe_layers(model))


def finding(checkpoint: Checkpoint, model: nn.Module, layers: Sequence[MoELayer]) -> Finding:
    """Return the finding on a model with these MoE layers."""
    if not all(layer.num_experts for layer in layers):
        raise Misuse("its MoE layers must have at least 1 expert, got 0")
    losses = tuple(loss_finding(loss, layers) for loss in (*LOSSES, "bias_rate"))
    total, idle = sum(p.numel() for p in model.parameters()), idle_parameters(layers)
    lora, class_name, blocks = lora_line(layers, model), type(model).__name__, number_of_blocks(layers, model)
    kinds, own_balance = layer_kinds(layers, model), balance_of_its_own(model)
    return Finding(
        name=checkpoint.name,
        spec=checkpoint.spec,
        model_class=class_name,
        package=package(model),
        base=checkpoint.place if checkpoint.adapter else None,
        parameters=total,
        active_parameters=total - idle,
        num_blocks=blocks,
        num_moe_layers=len(layers),
        kinds=kinds,
        losses=losses,
        own_balance=own_balance,
        router=routers_learn(checkpoint, layers, model),
        lora=lora,
        attach=attach_lines(losses),
    )


def idle_parameters(layers: Sequence[MoELayer]) -> int:
    """Parameters of experts that one token does not choose; experts shared by several layers count once."""
    counted: set[int] = set()
    idle = 0.0
    for layer in layers:
        own = [p for p in layer.experts.parameters() if id(p) not in counted]
        counted |= {id(p) for p in own}
        idle += sum(p.numel() for p in own) * (1 - layer.top_k / layer.num_experts)
    return round(idle)


def number_of_blocks(layers: Sequence[MoELayer], model: nn.Module) -> int:
    """Decoder blocks in the stacks that hold MoE layers, dense ones included."""
    stacks = {layer.block.rpartition(".")[0] for layer in layers}
    return sum(len(model.get_submodule(stack)) for stack in stacks)  # type: ignore[arg-type]  # lists of blocks


def layer_kinds(layers: Sequence[MoELayer], model: nn.Module) -> tuple[LayerKind, ...]:
    """The distinct kinds of MoE layers, in order of first appearance."""
    groups: dict[tuple[Any, ...], list[MoELayer]] = {}
    in_block = Counter(layer.block for layer in layers)
    for layer in layers:
        bias, router, experts = layer.bias_at is not None, type(layer.router).__name__, type(layer.experts).__name__
        shared = shared_experts(layer, model, alone=in_block[layer.block] == 1)
        key = (layer.num_experts, layer.top_k, layer.scores, bias, shared, router, experts)
        groups.setdefault(key, []).append(layer)
    return tuple(
        LayerKind(
            where=places(alike),
            num_layers=len(alike),
            num_experts=num_experts,
            top_k=top_k,
            scores=scores,
            selection_bias=bias,
            shared_experts=shared,
            router=router,
            experts=experts,
        )
        for (num_experts, top_k, scores, bias, shared, router, experts), alike in groups.items()
    )


def shared_experts(layer: MoELayer, model: nn.Module, *, alone: bool) -> tuple[str, ...]:
    """Networks that are called shared, in the layer or, where it is `alone` in its block, anywhere in the block."""
    place = layer.block if alone else layer.name
    inside = place.removeprefix(layer.block).lstrip(".")
    found = [name for name, _ in model.get_submodule(place).named_modules() if is_shared(name.rpartition(".")[2])]
    return tuple(f"{inside}.{name}".strip(".") for name in found)


def is_shared(name: str) -> bool:
    """Whether a module is named as a shared expert, and not as the gate of one."""
    return "shared" in name and "gate" not in name and "norm" not in name


def loss_finding(loss: str, layers: Sequence[MoELayer]) -> LossFinding:
    """Where a loss applies and why it does not elsewhere."""
    reasons: dict[str | None, list[MoELayer]] = {}
    for layer in layers:
        reasons.setdefault(obstacle(layer, loss), []).append(layer)
    good = reasons.pop(None, [])
    everywhere = len(good) == len(layers)
    return LossFinding(
        loss=loss,
        applies_at="" if not good else "all MoE layers" if everywhere else places(good),
        obstacles=tuple(why if not good else f"{places(at)}: {why}" for why, at in reasons.items() if why),
    )


def balance_of_its_own(model: Any) -> str:
    """Whether the model adds a balance loss to its loss by itself."""
    coefficient = getattr(model.config.get_text_config(), "router_aux_loss_coef", None)
    computes = hasattr(sys.modules[type(model).__module__], "load_balancing_loss_func")
    if not computes or coefficient is None:
        return "no: its loss is the language-model loss alone"
    configs = (model.config, model.config.get_text_config())
    if any(getattr(config, "output_router_logits", False) for config in configs):
        return (
            f"yes: output_router_logits is on, and router_aux_loss_coef is {coefficient:g}; AuxLosses with a balance "
            "switch it off while they are attached"
        )
    return f"not as saved: it would with output_router_logits=True (router_aux_loss_coef is {coefficient:g})"


def routers_learn(checkpoint: Checkpoint, layers: Sequence[MoELayer], model: nn.Module) -> str:
    """Whether the routers are trainable: of a whole model in full training, of an adapter as it was made."""
    if checkpoint.adapter is not None:
        model = on_meta(checkpoint)
        layers = moe_layers(model)
    learning = [layer for layer in layers if trainable(layer, model)]
    where = "all MoE layers" if len(learning) == len(layers) else places(learning) if learning else ""
    if checkpoint.adapter is not None:
        return f"trainable: LoRA reaches it at {where}" if where else "frozen: LoRA does not reach it"
    if not where:
        return "not trainable: it has no parameters that learn"
    return f"trainable at {where} when the whole model is; under LoRA only where it is a target"


def lora_line(layers: Sequence[MoELayer], model: nn.Module) -> str:
    """The line that lets LoRA reach routers and experts."""
    model = inner_model(model)
    routers = dict.fromkeys(target for layer in layers if (target := lora_target(layer, model)))
    experts = dict.fromkeys(target for layer in layers for target in expert_targets(layer, model))
    linear = dict.fromkeys(
        target for layer in layers if layer.weight_at is None for target in linear_targets(layer, model)
    )
    modules = f"target_modules=[{quoted(linear)}], " if linear else ""
    return f"LoraConfig(..., {modules}target_parameters=[{quoted([*routers, *experts])}])"


def expert_targets(layer: MoELayer, model: nn.Module) -> list[str]:
    """Names, within the block, of the experts' fused matrices."""
    parameters = list(layer.experts.named_parameters())
    dimensions = 3 if any(p.ndim == 3 for _, p in parameters) else 2
    path = path_of(layer.experts, layer, model)
    return [f"{path}.{name}" for name, p in parameters if p.ndim == dimensions]


def linear_targets(layer: MoELayer, model: nn.Module) -> list[str]:
    """Names, within the block, of the linear modules of a router that is more than one matrix."""
    path = path_of(layer.router, layer, model)
    return [f"{path}.{name}".rstrip(".") for name, m in layer.router.named_modules() if isinstance(m, nn.Linear)]


def path_of(module: nn.Module, layer: MoELayer, model: nn.Module) -> str:
    """Name of a module within the layer's block."""
    path = next(name for name, inside in model.named_modules() if inside is module)
    return path.removeprefix(layer.block + ".")


def attach_lines(losses: Iterable[LossFinding]) -> tuple[str, ...]:
    """The lines that attach what applies."""
    working = {finding.loss for finding in losses if finding.applies_at}
    weights = ", ".join(f"{loss}={weight}" for loss, weight in SUGGESTED.items() if loss in working)
    return f"aux = moestro.AuxLosses({weights})", "with aux.attach(trainer): trainer.train()"


def quoted(names: Iterable[str]) -> str:
    """Names as the items of a Python list."""
    return ", ".join(f'"{name}"' for name in names)
