"""Which losses can do anything at which layer, and why not."""

import logging
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from torch import nn

from moestro.adapters.tap import Tap
from moestro.adapters.wrappers import held_by, inner_model, plain_name
from moestro.competition.settings import Compete
from moestro.errors import Misuse
from moestro.routing import MoELayer

if TYPE_CHECKING:
    from moestro.adapters.aux_losses import AuxLosses

logger = logging.getLogger(__name__)

OF_OUTPUTS = frozenset({"orthogonality"})
OF_SCORES = frozenset({"balance", "variance", "router_z", "distillation"})
OF_COMPETITION = frozenset({"distillation", "diversity"})
OF_WEIGHTS = frozenset({"router_orthogonality", "simbal"})
LOSSES = (
    "balance",
    "orthogonality",
    "variance",
    "router_z",
    "router_orthogonality",
    "simbal",
    "distillation",
    "diversity",
)


def obstacle(layer: MoELayer, loss: str) -> str | None:
    """Why `loss` is without effect at `layer`, in words that follow its name; None where it has one."""
    if loss in ("orthogonality", "variance", "diversity") and layer.top_k == 1:
        return "needs two experts per token at least, and top_k is 1"
    if loss in OF_SCORES and layer.scores is None:
        return "needs a router that learns its choice, and this one looks it up"
    if loss == "router_z" and layer.scores == "probabilities":
        return "needs logits, and this router returns probabilities"
    if loss in OF_WEIGHTS and layer.num_experts == 1:
        return "needs two experts at least, whose rows can differ, and there is 1"
    if loss in OF_WEIGHTS and layer.weight_at is None:
        return "needs a router that is one matrix"
    if loss == "bias_rate" and layer.bias_at is None:
        return "needs a router with a selection bias"
    return None


def applicable(losses: Iterable[str], layers: Sequence[MoELayer]) -> dict[str, list[str]]:
    """Return the layers where each loss is without effect. Raise Misuse if a loss is without effect at every layer."""
    left_out = {}
    for loss in losses:
        obstacles = {layer.name: why for layer in layers if (why := obstacle(layer, loss))}
        if len(obstacles) == len(layers):
            raise Misuse(f"{loss} {next(iter(obstacles.values()))}: set {loss} to 0")
        if obstacles:
            left_out[loss] = list(obstacles)
    return left_out


def trainable(layer: MoELayer, model: nn.Module) -> bool:
    """Return whether the layer's router is trained, by its own parameters or by those that PEFT adds to it."""
    inside = {id(module) for module in layer.router.modules()}
    around = [module for module in model.modules() if held_by(module) is not None]
    wrappers = [module for module in around if inside & {id(inner) for inner in module.modules()}]
    wrappers = [module for module in wrappers if id(layer.experts) not in {id(inner) for inner in module.modules()}]
    return any(parameter.requires_grad for module in (layer.router, *wrappers) for parameter in module.parameters())


def lora_target(layer: MoELayer, model: nn.Module) -> str | None:
    """What PEFT's `target_parameters` must name for LoRA to reach the router, e.g. "mlp.gate.weight"."""
    if layer.weight_at is None:
        return None
    holder, attribute = layer.weight_at
    path = plain_name(next(name for name, module in inner_model(model).named_modules() if module is holder))
    return f"{path.removeprefix(layer.block + '.')}.{attribute}"


def refuse_what_cannot_work(aux: "AuxLosses", model: nn.Module, layers: Sequence[MoELayer]) -> None:
    """Raise Misuse for a loss without effect at every layer; warn if it is without effect at some layers only."""
    wanted = [*aux.weights, *(["bias_rate"] if aux.bias_rate else [])]
    for loss, names in applicable(wanted, layers).items():
        logger.warning("%s is without effect at %d of %d layers: %s", loss, len(names), len(layers), names[0])
    if aux.bias_rate:
        refuse_shared_bias(layers)
    for loss in ("variance", "distillation"):
        able = [layer for layer in layers if getattr(aux, loss) and obstacle(layer, loss) is None]
        frozen = [layer for layer in able if not trainable(layer, model)]
        if frozen:
            target = lora_target(frozen[0], model)
            how = f', or add target_parameters=["{target}"] to the LoRA configuration' if target else ""
            raise Misuse(f"{loss} trains routers, but the router of {frozen[0].name} is frozen: set requires_grad{how}")


def refuse_shared_bias(layers: Sequence[MoELayer]) -> None:
    """Raise Misuse if layers share a selection bias: every layer would move it in each step."""
    owners: dict[int, str] = {}
    for layer in layers:
        if layer.bias_at is not None and owners.setdefault(id(layer.selection_bias), layer.name) != layer.name:
            owner = owners[id(layer.selection_bias)]
            raise Misuse(f"{owner} and {layer.name} share one selection bias: set bias_rate to 0, or give each its own")


def refuse_to_compete(compete: Compete | None, tap: Tap) -> None:
    """Raise Misuse if competition is requested and the layer's experts cannot compete."""
    if compete is None:
        return
    if tap.original is not None:
        raise Misuse(
            "competition needs all experts of a layer in one place, and does not run with expert parallelism or "
            f"other people's hooks: {tap.layer.name} has a forward of its own"
        )
    if compete.weights == "router" and compete.forward and tap.layer.scores is None:
        raise Misuse(f"weights = router needs a router with scores, but the router of {tap.layer.name} has none")
