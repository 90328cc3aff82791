"""A check that every layer fires, and every choice is counted, once per pass."""

from torch import Tensor

from attach.comparing import Gradients, difference
from attach.states import checkpointing
from attach.stock import Seen, load, runs
from attach.subject import Subject
from moestro.adapters import AuxLosses


def firings_are_right(subject: Subject) -> str | None:
    """Each layer fires once per pass and its choices are counted once, with activation checkpointing too."""
    _, own = subject.unwatched
    wrong, right = fired(subject)
    if wrong:
        return wrong
    with checkpointing(subject):
        wrong, ours = fired(subject)
    return wrong or difference(ours, right) or (None if difference(right, own) else "the losses have no gradient")


def fired(subject: Subject) -> tuple[str | None, Gradients]:
    """One step of the model's loss and ours: what was counted wrongly, and the gradient."""
    aux = AuxLosses(balance=0.3, **subject.between)
    experts = {layer.name: layer.experts for layer in subject.layers}
    with runs(experts) as ran, aux.attach(subject.model, add_to_loss=False):
        loss = subject.objective(subject.forward()) + aux.total()
        firings = dict(aux.firings)
        gradients = subject.gradient(loss)
        counted = loads(aux)
    if max(ran.values()) != 1 + subject.model.is_activation_checkpointing:
        return f"layers ran {dict(ran)} times", gradients
    if firings != {layer.name: 1 for layer in subject.layers}:
        return f"firings are {firings}", gradients
    return next((wrong for seen in subject.seen if (wrong := miscounted(seen, counted))), None), gradients


def loads(aux: AuxLosses) -> dict[str, Tensor | None]:
    """What is counted for each layer since the last optimiser step."""
    return {state.layer.name: state.load for state in aux._layers}


def miscounted(seen: Seen, counted: dict[str, Tensor | None]) -> str | None:
    """How a layer's choices were counted wrongly."""
    ours, right = counted[seen.layer.name], load(seen)
    wrong = ours is None or not ours.equal(right)
    return f"{seen.layer.name}: counted {ours}, right is {right}" if wrong else None
