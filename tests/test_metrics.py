"""Routing figures against counting by hand, and that sums of parts are the sums of the whole."""

import math
from dataclasses import fields

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from moestro.metrics import routing_figures, routing_sums
from moestro.routers import RouterRule, route
from moestro.routing import Batch, LayerRecord, MoELayer


def record(logits: torch.Tensor, top_k: int, *, valid=None, domain=None) -> LayerRecord:
    layer = MoELayer(
        name="layer",
        block=0,
        router=nn.Identity(),
        experts=nn.Identity(),
        num_experts=logits.shape[1],
        top_k=top_k,
    )
    batch = Batch(sequence=torch.zeros(len(logits), dtype=torch.long), num_sequences=1, valid=valid, domain=domain)
    routing = route(logits, RouterRule(), top_k)
    return LayerRecord(layer=layer, batch=batch, hidden=torch.zeros(len(logits), 1), proposed=routing, routing=routing)


@given(tokens=st.integers(1, 9), experts=st.integers(1, 5), data=st.data())
def test_figures_equal_counting_by_hand(tokens: int, experts: int, data: st.DataObject):
    top_k = data.draw(st.integers(1, experts))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    logits = torch.randn(tokens, experts, generator=generator)
    domain = torch.randint(0, 2, (tokens,), generator=generator)
    valid = torch.rand(tokens, generator=generator) < 0.7
    valid[0] = True
    figures = routing_figures(routing_sums(record(logits, top_k, valid=valid, domain=domain), num_domains=2))

    count = [[0.0] * experts for _ in range(2)]
    entropy, confidence = [], []
    for t in range(tokens):
        if valid[t]:
            p = logits[t].softmax(0)
            for e in p.topk(top_k).indices.tolist():
                count[int(domain[t])][e] += 1
            entropy.append(-sum(float(x) * math.log(float(x)) for x in p))
            confidence.append(float(p.max()))
    load = [a + b for a, b in zip(*count, strict=True)]
    mean_scores = logits.softmax(-1)[valid].double().mean(0)
    assert figures.load == pytest.approx([x / sum(load) for x in load])
    for d in range(2):
        assert figures.domain_load[d] == pytest.approx([x / max(sum(count[d]), 1) for x in count[d]])
    assert figures.max_vio_data == pytest.approx(max(load) / (sum(load) / experts) - 1, abs=1e-9)
    assert figures.max_vio_batch == pytest.approx(figures.max_vio_data)
    assert figures.dead_experts == load.count(0.0)
    assert figures.entropy == pytest.approx(sum(entropy) / len(entropy), abs=1e-5)
    assert figures.confidence == pytest.approx(sum(confidence) / len(confidence), abs=1e-5)
    expected = float(torch.special.entr(mean_scores).sum()) - sum(entropy) / len(entropy)
    assert figures.mutual_information == pytest.approx(expected, abs=1e-5)


def test_parts_add_up_to_the_whole():
    logits = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
    whole = routing_sums(record(logits, 2))
    parts = routing_sums(record(logits[:3], 2)) + routing_sums(record(logits[3:], 2))
    for f in fields(whole):
        if f.name not in ("batches", "batch_max_vio"):
            torch.testing.assert_close(getattr(parts, f.name), getattr(whole, f.name), rtol=1e-6, atol=1e-6)
    assert parts.batches == 2


def test_extremes():
    collapsed = routing_figures(routing_sums(record(torch.tensor([[9.0, 0.0, 0.0, 0.0]] * 6), 1)))
    assert collapsed.max_vio_data == 3.0
    assert collapsed.dead_experts == 3
    assert collapsed.mutual_information == pytest.approx(0.0, abs=1e-6)
    specialised = routing_figures(
        routing_sums(record(50 * torch.eye(4), 1, domain=torch.arange(4)), num_domains=4),
    )
    assert specialised.max_vio_data == 0.0
    assert specialised.mutual_information == pytest.approx(math.log(4), abs=1e-5)
    assert specialised.domain_mutual_information == pytest.approx(math.log(4), abs=1e-6)


def test_padding_may_be_anything():
    logits = torch.randn(4, 3)
    broken = torch.cat([logits, torch.full((2, 3), float("nan"))])
    valid = torch.tensor([True] * 4 + [False] * 2)
    assert routing_figures(routing_sums(record(broken, 1, valid=valid))) == routing_figures(
        routing_sums(record(logits, 1))
    )
