"""A check of selection biases: that they are what sways the choice, and move against the load."""

import re
from collections.abc import Sequence

import tiny_models

from attach.states import restored
from attach.stock import Seen, load
from attach.subject import Inapplicable, Subject
from moestro.adapters import AuxLosses
from moestro.routing import MoELayer


def bias_is_the_routers_and_moves(subject: Subject) -> str | None:
    """`bias_at` sways the choice and not the scores; `bias_rate` moves it against the load, and nothing else."""
    if wrong := wrong_bias(subject):
        return wrong
    biased = [seen for seen in subject.seen if seen.layer.bias_at]
    if not biased:
        return Inapplicable("there is no selection bias")
    aux = AuxLosses(bias_rate=0.1)
    with restored(subject) as before:
        with aux.attach(subject.model):
            subject.step()
            aux.step()
        after = {name: tensor.clone() for name, tensor in subject.tensors().items()}
    expected = dict(before)
    for seen in biased:
        name, counted = bias_name(subject, seen.layer), load(seen)
        expected[name] = before[name].clone()
        expected[name].view(-1)[: len(counted)] += 0.1 * (counted.mean() - counted).sign()
    moved = [name for name in after if not after[name].float().allclose(expected[name].float(), atol=1e-6)]
    return f"{moved[0]} is not what it should be" if moved else None


def bias_name(subject: Subject, layer: MoELayer) -> str:
    """The full name of a layer's selection bias."""
    assert layer.bias_at is not None
    holder, attribute = layer.bias_at
    return next(f"{name}.{attribute}" for name, module in subject.model.named_modules() if module is holder)


def wrong_bias(subject: Subject) -> str | None:
    """Whether a selection bias was overlooked, or one found that does not sway the choice."""
    ran = {id(module) for layer in subject.layers for module in subject.model.get_submodule(layer.name).modules()}
    theirs = {
        f"{name}.{own}"
        for name, module in subject.model.named_modules()
        if id(module) in ran
        for own, _ in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        if re.search(tiny_models.SELECTION_BIAS, f"{name}.{own}")
    }
    ours = {bias_name(subject, layer) for layer in subject.layers if layer.bias_at}
    if ours != theirs:
        return f"selection biases are {sorted(theirs)}, found {sorted(ours)}"
    return no_sway(subject, [seen for seen in subject.seen if seen.layer.bias_at])


def no_sway(subject: Subject, biased: Sequence[Seen]) -> str | None:
    """With a large bias on the last expert every token must choose it; the first of the layers from the same scores."""
    stock = subject.routings()
    with restored(subject):
        for seen in biased:
            subject.tensors()[bias_name(subject, seen.layer)].view(-1)[seen.layer.num_experts - 1] = 1e3
        swayed = subject.routings()
    for seen in biased:
        name, last = seen.layer.name, seen.layer.num_experts - 1
        before, after = ((routings[name].expert == last).any(-1).all() for routings in (stock, swayed))
        if before or not after:
            return f"{name}: the bias does not sway the choice"
    first = [routings[biased[0].layer.name].scores for routings in (stock, swayed)] if biased else []
    return "the bias is in the scores" if first and not first[0].equal(first[1]) else None
