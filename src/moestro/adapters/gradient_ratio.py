"""The gradient norm of a loss that has units over that of the task loss, measured once, in the first step it acts in.

Default forms are blind to the units of hidden states and need no measurement. `projection` and `span` are in squared
units of the experts' outputs, router_z in squared units of logits, simbal in squared units of the router's weights: a
weight that suits one model ruins another. The measurement costs one extra backward pass for the task and one for each
of these losses, in one micro-batch of a run. It changes no gradient, because it accumulates none.
"""

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moestro.adapters.parameters import parts
from moestro.adapters.ranks import rank

if TYPE_CHECKING:
    from moestro.adapters.aux_losses import AuxLosses

logger = logging.getLogger(__name__)

MOST = 1.0
"""Largest ratio without a warning: above it the loss outweighs the task."""


def unmeasured(aux: "AuxLosses") -> dict[str, str]:
    """Return the losses with units that are switched on and not measured yet, each with advice for the user.

    The result is empty while scaling="relative" has not measured its scales.
    """
    relative = aux.scaling == "relative"
    advice = {"router_z": "a smaller router_z", "simbal": "a smaller simbal, or router_orthogonality"}
    if aux.orthogonality_form in ("projection", "span"):
        advice["orthogonality"] = (
            "a smaller orthogonality" if relative else 'orthogonality_form="cosine", or scaling="relative"'
        )
    waiting = relative and not aux.scales_known
    return {} if waiting else {n: a for n, a in advice.items() if getattr(aux, n) and n not in aux.gradient_ratios}


def measure(
    aux: "AuxLosses", model: nn.Module, terms: Mapping[str, Tensor], task: Tensor | None, *, once: str
) -> dict[str, float]:
    """Return the gradient norm of each unmeasured loss, at its full weight, over the task's; warn if it exceeds `MOST`.

    Gradients of `terms` and `task` are taken with respect to the trained parameters of experts and routers, or all
    trained parameters if there are none of those. The ratios are NaN, with a warning, if they cannot be measured: the
    model returned no loss, its parameters are sharded, it is compiled, or `once` says why the graph allows one backward
    pass only. The result is empty if the task has no gradient in this pass.
    """
    parameters, advice = trained(model), unmeasured(aux)
    if task is None or (why := obstacle(model, parameters, once)):
        why = "the model returned no loss" if task is None else why
        for name, instead in advice.items() if rank() == 0 else ():
            logger.warning(
                "%s depends on the model's units, and its gradient could not be measured: %s. Safer is %s",
                name,
                why,
                instead,
            )
        return dict.fromkeys(advice, float("nan"))
    of_task, found = norm(task, parameters), dict[str, float]()
    if of_task == 0:  # such as GRPO with equally good answers: try again in the next pass
        return found
    for name, instead in advice.items():
        full = getattr(aux, name) / aux.weights[name]
        found[name] = full * norm(terms[name], parameters) / of_task
        if found[name] > MOST and rank() == 0:
            said = (name, getattr(aux, name), found[name], instead)
            logger.warning(
                "%s=%g outweighs the task: its gradient on experts and routers is %.3g times the task's. Write %s",
                *said,
            )
    return found


def trained(model: nn.Module) -> list[Tensor]:
    """Return the trained parameters of experts and routers, or all trained parameters if there are none of those."""
    part_of = parts(model)
    everything = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return [p for name, p in everything.items() if part_of.get(name, "rest") != "rest"] or [*everything.values()]


def obstacle(model: nn.Module, parameters: list[Tensor], once: str) -> str:
    """Return why gradients cannot be measured; empty if they can."""
    if any(isinstance(parameter, DTensor) for parameter in parameters):
        return "parameters are sharded"
    if any(module._compiled_call_impl is not None for module in model.modules()):
        return "the model is compiled"  # a compiled graph allows one backward pass only
    return once


def norm(loss: Tensor, parameters: list[Tensor]) -> float:
    """Return the norm of the gradient of `loss` over all `parameters`, without accumulating it; 0 without gradient."""
    if not loss.requires_grad or not parameters:
        return 0.0
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    squares = [gradient.float().square().sum() for gradient in gradients if gradient is not None]
    return float(torch.stack([s.to(squares[0].device) for s in squares]).sum().sqrt()) if squares else 0.0
