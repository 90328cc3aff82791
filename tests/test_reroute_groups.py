"""Disabling experts under group rules of any shape: the rule's own choice of what is left, or one line with numbers."""

import re
from typing import Any

import pytest
import tiny_models
import torch

from agreement import small_model, some_ids
from moestro import Misuse, MoE, RouterRule
from moestro.adapters import moe_layers
from moestro.perturbations import disable
from moestro.routing import LayerRecord
from test_reroute import built, run

TOP_K = 3


def left_to_choose(record: LayerRecord, token: int, count: int, groups: int, best: int, two: bool) -> list[int]:
    """The experts of a token's best groups that are not among its `count` first, the best first; in plain Python."""
    weights, experts = record.proposed.weight[token].tolist(), record.proposed.expert[token].tolist()
    first = {e for _, e in sorted(zip(weights, experts, strict=True), reverse=True)[:count]}
    logits = record.proposed.logits
    assert logits is not None
    scores = (logits[token].sigmoid() if record.layer.scores == "sigmoid" else logits[token].softmax(-1)).tolist()
    size = len(scores) // groups
    own = [
        sorted((s for e, s in enumerate(scores) if e // size == g and e not in first), reverse=True)
        for g in range(groups)
    ]
    value = [sum(s[: 2 if two else 1]) if s else float("-inf") for s in own]
    kept = sorted(range(groups), key=lambda g: -value[g])[:best]
    return sorted((e for e in range(len(scores)) if e // size in kept and e not in first), key=lambda e: -scores[e])


def check(model: Any, inputs: dict[str, torch.Tensor], count: int, groups: int, best: int, *, two: bool) -> bool:
    """Run, and compare every token with the plain loop; True if the rule had experts enough."""
    first = moe_layers(model)[0].name
    plain = next(r for r in run(model, lambda proposal: proposal.routing, inputs)[1] if r.layer.name == first)
    left = [left_to_choose(plain, t, count, groups, best, two) for t in range(len(plain.hidden))]
    if short := sum(len(experts) < TOP_K for experts in left):
        said = f"the rule leaves {short} of {len(left)} tokens fewer than top_k (3) experts in their best groups"
        with pytest.raises(Misuse, match=re.escape(said)):
            run(model, {first: disable(count)}, inputs)
        return False
    record = next(r for r in run(model, {first: disable(count)}, inputs)[1] if r.layer.name == first)
    for chosen, expected in zip(record.routing.expert.tolist(), left, strict=True):
        assert set(chosen) == set(expected[:TOP_K])
    assert bool((record.routing.weight > 0).all())
    return True


SHAPES = [(8, 8), (8, 5), (8, 4), (8, 3), (4, 4), (4, 2), (4, 3), (2, 1), (2, 2), (1, 1)]


@pytest.mark.parametrize(("groups", "best"), SHAPES)
def test_deepseek_v2(groups: int, best: int, monkeypatch: pytest.MonkeyPatch):
    """A group's score is its best expert's, and the rule puts 0 outside the best groups."""
    for name, value in {"topk_method": "group_limited_greedy", "n_group": groups, "topk_group": best}.items():
        monkeypatch.setitem(tiny_models.GENERIC, name, value)
    model, inputs = built("deepseek_v2")
    inputs = {"input_ids": inputs["input_ids"]}
    worked = [check(model, inputs, count, groups, best, two=False) for count in (1, 2, 3)]
    assert worked[0] or best * (8 // groups) <= TOP_K + 1


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("groups", "best"), [(8, 5), (8, 4), (4, 2), (2, 1)])
def test_our_layers(groups: int, best: int, scores: str):
    rule = RouterRule(scores=scores, num_groups=groups, top_groups=best)
    model = small_model(feed_forward=[[MoE(num_experts=8, top_k=3, width=8, router=rule)]] * 2).eval()
    for count in (1, 2, 3):
        check(model, {"input_ids": some_ids()}, count, groups, best, two=True)


def test_as_many_as_can_be_are_disabled():
    """5 of 8 experts leave 3 for top_k = 3 at each token; one more cannot be, and the line says so in numbers."""
    model, inputs = built("mixtral")
    banned = torch.zeros(24, 8, dtype=torch.bool)
    banned[:, :5] = True
    for record in run(model, lambda proposal: proposal.select(banned=banned), inputs)[1]:
        assert record.routing.expert.sort(-1).values.tolist() == [[5, 6, 7]] * 24
    banned[3, 5] = True
    with pytest.raises(Misuse, match=r"leaves 1 of \d+ tokens fewer than top_k \(3\) experts"):
        run(model, lambda proposal: proposal.select(banned=banned), inputs)
    with pytest.raises(Misuse, match=r"count must lie between 1 and top_k \(3\) of .*, got 4"):
        run(model, disable(4), inputs)
    ours = small_model(feed_forward=[[MoE(num_experts=4, top_k=3, width=8)]] * 2).eval()
    assert run(ours, disable(1), {"input_ids": some_ids()})
    with pytest.raises(Misuse, match=r"disabling 2 of 4 experts in .* must leave top_k \(3\)"):
        run(ours, disable(2), {"input_ids": some_ids()})
