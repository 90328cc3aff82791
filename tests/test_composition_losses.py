"""Auxiliary losses and meters on composed blocks: every sub-layer is a layer of its own, whatever it shares."""

import pytest
import torch
from torch import Tensor

from agreement import CONVEX, MOE, assert_all_equal, gradients, small_model, some_ids
from moestro import AuxLosses, MoE, MoestroForCausalLM, RouterRule, RoutingMeter, observe
from moestro.adapters import moe_layers
from moestro.models.layers import Router

COMPOSITIONS = pytest.mark.parametrize("composition", ["serial", "parallel", "tied", "shared-pool"])


def model_of(composition: str, moe: MoE = MOE) -> MoestroForCausalLM:
    return small_model(feed_forward=[[moe, moe]] * 2, composition=composition).train()


def by_hand(model: MoestroForCausalLM, ids: Tensor) -> dict[str, Tensor]:
    """Gradients of loss + 0.3 balance + 0.2 z, from the logits and choices that routers return; rows weigh alike."""
    seen = []
    hooks = [m.register_forward_hook(lambda *call: seen.append(call[2])) for m in model.modules() if type(m) is Router]
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    for hook in hooks:
        hook.remove()
    for logits, _, index in seen:
        for row, chosen in zip(logits.chunk(len(ids)), index.chunk(len(ids)), strict=True):
            load = torch.bincount(chosen.flatten(), minlength=row.shape[1]) / chosen.numel()
            balance = row.shape[1] * (load * row.softmax(-1).mean(0)).sum()
            z = row.logsumexp(-1).square().mean()
            loss = loss + (0.3 * balance + 0.2 * z) / len(ids) / 2  # two blocks
    loss.backward()
    return gradients(model)


@COMPOSITIONS
def test_gradients_are_those_of_plain_autograd(composition):
    model, ids = model_of(composition), some_ids(3, 9)
    expected = by_hand(model, ids)
    model.zero_grad()
    plain_loss = model(input_ids=ids, labels=ids).loss
    aux = AuxLosses(balance=0.3, router_z=0.2)
    with aux.attach(model):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
    assert loss > plain_loss + 0.1
    assert_all_equal(gradients(model), expected)
    names = [f"model.layers.{block}.feed_forward.{index}" for block in range(2) for index in range(2)]
    assert aux.firings == dict.fromkeys(names, 1)


@COMPOSITIONS
def test_meters_see_each_sub_layer_once(composition):
    model, ids = model_of(composition, CONVEX), some_ids(3, 9)
    meter, records = RoutingMeter(training=True), []
    with meter.attach(model), observe(model, records.append):
        model(input_ids=ids)
    assert [record.layer.name for record in records] == [layer.name for layer in moe_layers(model)]
    assert len(records) == 4
    assert [int(sums.tokens) for sums in meter.sums.values()] == [27] * 4
    for first, second in (records[:2], records[2:]):
        same = torch.equal(first.routing.expert, second.routing.expert)
        assert same == (composition == "tied")
        assert (first.layer.router.weight is second.layer.router.weight) == (composition == "tied")
        assert (first.layer.experts.down_proj is second.layer.experts.down_proj) == (composition == "shared-pool")


def test_loss_free_balance_keeps_tied_choices_equal():
    """Selection biases are buffers of their own: equal choices must move them equally, and they must move."""
    moe = MoE(num_experts=8, top_k=2, width=8, router=RouterRule(scores="sigmoid", selection_bias=True))
    model, ids = model_of("tied", moe), some_ids(3, 9)
    aux = AuxLosses(bias_rate=0.01)
    first, second, *_ = moe_layers(model)
    before = first.selection_bias.clone()
    with aux.attach(model):
        for _ in range(3):
            model(input_ids=ids, labels=ids).loss.backward()
            aux.step()
    assert not torch.equal(first.selection_bias, before)
    assert torch.equal(first.selection_bias, second.selection_bias)
