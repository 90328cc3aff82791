"""Checks of the losses: values and gradients against loops, and that no order matters."""

import torch
from torch import Tensor

from attach.comparing import Gradients, difference, far
from attach.counting import loads
from attach.states import experts_reversed, one_outcome, rows_reversed
from attach.subject import Inapplicable, Subject
from moestro.adapters import AuxLosses
from moestro.errors import Misuse


def orthogonality_is_right(subject: Subject) -> str | None:
    """Value and gradient of every parameter equal a loop over the eager weights of single experts."""
    if not subject.several:
        return refused(subject, "orthogonality")
    return wrong_losses(subject, *attached(subject, "orthogonality"))


def variance_is_right(subject: Subject) -> str | None:
    """Beside L_o values and gradients equal loops; alone it moves all learned routers, not the last layer's experts."""
    if not subject.several:
        return refused(subject, "variance")
    if wrong := wrong_losses(subject, *attached(subject, "orthogonality", "variance")):
        return wrong
    _, ours = attached(subject, "variance")
    reached = {parameter for name, parameter in subject.model.named_parameters() if name in ours and ours[name].any()}
    for seen in subject.learned:
        if reached.isdisjoint(seen.layer.router.parameters()):
            return f"{seen.layer.name}: nothing reaches the router"
    behind = not reached.isdisjoint(subject.seen[-1].layer.experts.parameters())
    return "it reaches experts behind which no router is" if behind else None


def balance_and_z_are_right(subject: Subject) -> str | None:
    """Values, and the gradients of their sum, equal loops."""
    losses = [name for name in ("balance", "router_z") if name in subject.right]
    return wrong_losses(subject, *attached(subject, *losses))


def attached(subject: Subject, *losses: str) -> tuple[dict[str, Tensor], Gradients]:
    """Each loss, and the gradient of their sum alone, in the second of two optimiser steps that change nothing."""
    aux = AuxLosses(**dict.fromkeys(losses, 1.0))
    with aux.attach(subject.model, add_to_loss=False):
        for _ in range(2 if "variance" in losses else 1):  # its mean is that of the step before
            subject.forward()
            total = aux.total()
            aux.step()
    assert total is not None
    return aux.last, subject.gradient(total)


def wrong_losses(subject: Subject, values: dict[str, Tensor], gradients: Gradients) -> str | None:
    """Which value, or which gradient of their sum, is not that of the loops."""
    right: Gradients = {}
    for loss, value in values.items():
        true_value, true_gradients = subject.right[loss]
        if far(value, true_value):
            return f"{loss} is {float(value):.6g} and should be {float(true_value):.6g}"
        right |= {name: right.get(name, 0) + gradient for name, gradient in true_gradients.items()}
    return difference(gradients, right)


def refused(subject: Subject, loss: str) -> str:
    """A loss between experts of a token, where there is one: it must be refused with the reason."""
    try:
        attached(subject, loss)
    except Misuse as error:
        if f"{loss} needs two experts per token" in str(error):
            return Inapplicable("tokens have one expert, and the loss is refused for that reason")
    return f"{loss} is not refused where tokens have one expert"


def order_does_not_matter(subject: Subject) -> str | None:
    """With rows, or experts, in another order the losses and every expert's load are the same."""
    with one_outcome(subject):
        value, load = value_and_load(subject)
        with rows_reversed(subject):
            rows = value_and_load(subject)
        with experts_reversed(subject):
            experts = value_and_load(subject)
    if far(rows[0], value) or not torch.equal(rows[1], load):
        return f"with rows in another order {value.tolist()} becomes {rows[0].tolist()}"
    if far(experts[0], value) or not torch.equal(experts[1].flip(1), load):
        return f"with experts in another order {value.tolist()} becomes {experts[0].tolist()}"
    return None


def value_and_load(subject: Subject) -> tuple[Tensor, Tensor]:
    """The losses of one pass, and the load of every layer."""
    aux = AuxLosses(balance=0.3, **subject.between)
    with aux.attach(subject.model, add_to_loss=False):
        subject.forward()
        aux.total()
        load = torch.stack(list(loads(aux).values()))
    return torch.stack(list(aux.last.values())), load
