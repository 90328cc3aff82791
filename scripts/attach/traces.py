"""Checks that nothing is left behind: on the model after detaching, and in checkpoints written while attached."""

import tempfile
from collections import Counter
from typing import Any

import torch

from attach.states import checkpointing, own_balance_loss, restored
from attach.subject import Subject
from moestro.adapters import AuxLosses


def detach_leaves_nothing(subject: Subject) -> str | None:
    """After the context, and after an exception in it: logits, hooks, attributes and config are as before."""
    with own_balance_loss(subject), checkpointing(subject):
        with torch.no_grad():
            logits = subject.forward().logits  # first of all: models make some attributes in their first pass
        before = trace(subject)
        aux = AuxLosses(balance=1.0, **subject.between)
        with aux.attach(subject.model, add_to_loss=False):
            subject.forward()
            inside = trace(subject)
        wrong = differing(trace(subject), before)
        try:
            with aux.attach(subject.model, add_to_loss=False):
                raise KeyError
        except KeyError:
            wrong = wrong or differing(trace(subject), before)
        with torch.no_grad():
            again = subject.forward().logits
    if inside["attributes"] == before["attributes"]:
        return "nothing was attached"
    return wrong or (None if torch.equal(logits, again) else "logits differ")


def trace(subject: Subject) -> dict[str, Any]:
    """All that attaching might leave on a model."""
    modules = dict(subject.model.named_modules())
    return {
        "attributes": {f"{name}.{key}" for name, module in modules.items() for key in vars(module)},
        "functions": {
            (f"{name}.{key}", id(value))
            for name, module in modules.items()
            for key, value in vars(module).items()
            if callable(value)
        },
        "hooks": Counter(
            (name, kind, hook)
            for name, module in modules.items()
            for kind, hooks in vars(module).items()
            if kind.endswith("hooks") and isinstance(hooks, dict)
            for hook in hooks.values()
        ),
        "config": subject.model.config.to_dict(),
        "names of weights": list(subject.model.state_dict()),
    }


def differing(after: dict[str, Any], before: dict[str, Any]) -> str | None:
    """What is not as it was."""
    for name in before:
        if after[name] != before[name]:
            return f"other {name} than before: {set(after[name]) ^ set(before[name])}"
    return None


def saves_and_reloads_stock(subject: Subject) -> str | None:
    """A checkpoint written while attached, after a step, has stock names and loads into the stock class, exactly."""
    with restored(subject), tempfile.TemporaryDirectory() as folder:
        with AuxLosses(balance=0.1, **subject.between).attach(subject.model, add_to_loss=False):
            subject.forward()
            subject.step()
            torch.optim.SGD(subject.model.parameters(), lr=0.01).step()
            keys = subject.save(folder)
        reloaded = type(subject.model).from_pretrained(folder, dtype=torch.float32).eval()
        subject.model.eval()
        with torch.no_grad():
            ours, theirs = subject.forward().logits, reloaded(**subject.inputs).logits
        subject.model.train()
    if keys != subject.stock_keys:
        return f"the checkpoint has other weights: {sorted(keys ^ subject.stock_keys)[0]}"
    return None if torch.equal(ours, theirs) else f"logits differ by {float((ours - theirs).abs().max()):.0e}"
