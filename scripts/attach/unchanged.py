"""Checks that the model computes the same while it is watched, and while losses of weight 0 are attached."""

import torch

from attach.comparing import ROUNDING, difference, distance, far, unequal
from attach.states import implementation
from attach.subject import Subject
from moestro.adapters import AuxLosses, observe


def watched_is_unchanged(subject: Subject) -> str | None:
    """With the experts' outputs asked for: bit-identical around grouped_mm, to rounding around eager.

    Rounding is 1e-5, or twice how far grouped_mm and eager are apart where a model makes more of small differences.
    """
    apart = distance(subject.plain["grouped_mm"][1], subject.plain["eager"][1])[0]
    for name, (plain, right) in subject.plain.items():
        with implementation(subject, name), observe(subject.model, lambda record: None, outputs=True):
            watched, ours = subject.step()
        exact = subject.interface and name == "grouped_mm"
        if not (torch.equal(watched.logits, plain.logits) if exact else not far(watched.logits, plain.logits)):
            return f"logits differ around {name}"
        loss, before = subject.objective(watched), subject.objective(plain)
        if not (torch.equal(loss, before) if exact else not far(loss, before, 1e-6)):
            return f"the loss differs around {name}"
        if wrong := difference(ours, right, max(ROUNDING, 2 * apart)):
            return f"around {name} {wrong}"
    return None


def weight_zero_is_unchanged(subject: Subject) -> str | None:
    """Losses of weight 0: loss, logits and every gradient are bit-identical, around grouped_mm and eager."""
    for name, (plain, right) in subject.plain.items():
        with implementation(subject, name), AuxLosses().attach(subject.model):
            attached, ours = subject.step()
        if not torch.equal(attached.logits, plain.logits):
            return f"logits differ around {name}"
        if not torch.equal(subject.objective(attached), subject.objective(plain)):
            return f"the loss differs around {name}"
        if wrong := unequal(ours, right):
            return f"around {name}, not bit-identical: {wrong}"
    return None
