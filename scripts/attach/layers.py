"""Checks of what is found: the layers, and the scores in their records."""

import re
from collections import Counter

import tiny_models
import torch
from torch import Tensor

from attach.comparing import ROUNDING, far
from attach.stock import Seen, edges, runs
from attach.subject import Subject


def finds_the_layers(subject: Subject) -> str | None:
    """Every experts module that runs, and no other; its router; k and E; its block."""
    modules = dict(subject.model.named_modules())
    experts = {n: m for n, m in modules.items() if type(m).__name__.endswith("Experts") and "shared" not in n}
    with runs(experts) as ran, torch.no_grad():
        subject.forward()
    names = {module: name for name, module in modules.items()}
    if (found := Counter(names[layer.experts] for layer in subject.layers)) != ran:
        return f"found {dict(found)}, but what runs is {dict(ran)}"
    return next((wrong for seen in subject.seen if (wrong := wrong_handle(subject, seen))), None)


def wrong_handle(subject: Subject, seen: Seen) -> str | None:
    """What a handle says wrongly."""
    layer = seen.layer
    returned = [item for item in seen.routed if item is seen.index] if isinstance(seen.routed, tuple) else []
    best = seen.logits.topk(layer.top_k).indices  # dbrx: the block chooses, from the logits that the router returns
    if not returned and not torch.equal(best, seen.index):
        return f"{layer.name}: the experts' indices do not come from {type(layer.router).__name__}"
    if seen.index.shape[1] != layer.top_k:
        return f"{layer.name}: top_k is {layer.top_k}, but tokens have {seen.index.shape[1]} experts"
    if layer.num_experts != tiny_models.GENERIC["num_experts"]:
        return f"{layer.name}: num_experts is {layer.num_experts}"
    block = subject.model.get_submodule(layer.block)
    beside = [other for other in subject.model.modules() if type(other) is type(block)]
    if not re.fullmatch(rf"{re.escape(layer.block)}(\..+)?", layer.name) or len(beside) < 2:
        return f"{layer.name}: block is {layer.block}"
    return None


def scores_are_the_routers(subject: Subject) -> str | None:
    """At the chosen experts the weights are the scores, up to one factor per token (where k is 1: for all tokens)."""
    routings = subject.routings()
    for seen in subject.seen:
        ours = routings[seen.layer.name].scores
        if (ours is None) != (seen not in subject.learned):
            return f"{seen.layer.name}: only routers that look their choice up have no scores"
        if ours is not None and (wrong := not_proportional(seen, ours)):
            return f"{seen.layer.name}: {wrong}"
    return None


def not_proportional(seen: Seen, scores: Tensor) -> str | None:
    """How the weights that a layer was given are not its scores."""
    weight, sent = seen.weight.detach().float(), [t for t in range(len(scores)) if edges(seen, t)]
    if isinstance(scale := getattr(seen.layer.router, "per_expert_scale", None), Tensor):
        weight = weight / scale.detach()[seen.index]  # Gemma's is a factor on an expert's output, not a preference
    if seen.layer.top_k == 1:  # Zaya, whose ninth class has a share too
        weight = weight / seen.routed[0].detach().softmax(-1)[:, : seen.layer.num_experts].sum(-1, keepdim=True)
    ratio = (weight / scores.gather(-1, seen.index))[sent]
    ratio = ratio.T if seen.layer.top_k == 1 else ratio
    if far(scores.sum(-1), torch.ones(len(scores))):
        return "scores do not sum to 1"
    spread = float((ratio.amax(-1) / ratio.amin(-1)).max() - 1)
    return None if spread <= ROUNDING else f"weights are not {seen.layer.scores} scores, by {spread:.0e}"
