"""Figures of a router beside competition: against plain loops, at the corners, and as a run's evaluation has them."""

import math
from typing import get_args

import pytest
import tiny_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moestro import AuxLosses, Compete, RoutingMeter, observe, reroute
from moestro.adapters.responses import ResponseMeter
from moestro.agreement import agreement_figures
from moestro.competition.inference import by_competition
from moestro.competition.settings import Scale


@settings(deadline=None, max_examples=40)
@given(
    tokens=st.integers(2, 12),
    experts=st.integers(1, 6),
    k=st.integers(1, 3),
    seed=st.integers(0, 99),
    scale=st.sampled_from(get_args(Scale)),
)
def test_figures_are_what_plain_loops_count(tokens, experts, k, seed, scale):
    k = min(k, experts)
    generator = torch.Generator().manual_seed(seed)
    response = torch.rand(tokens, experts, generator=generator) + torch.arange(experts) * 0.2 + 0.1
    chosen = torch.stack([torch.randperm(experts, generator=generator)[:k] for _ in range(tokens)])
    figures = agreement_figures(response, chosen, Compete(response_scale=scale, balance_winners=0.0, temperature=0.7))

    def in_deviations(t: int, of: list[list[float]], e: int) -> float:
        number = [row[e] for row in of]
        mean = sum(number) / tokens
        std = math.sqrt(sum((n - mean) ** 2 for n in number) / tokens)
        return (number[t] - mean) / (std + 1e-6 * abs(mean))

    as_is, logs = response.tolist(), [[math.log(r) for r in row] for row in response.tolist()]
    mean = [sum(row[e] for row in as_is) / tokens for e in range(experts)]

    def strength(t: int, e: int) -> float:
        r = as_is[t][e]
        return {
            "none": r,
            "mean": r / mean[e],
            "standard": in_deviations(t, as_is, e),
            "log": in_deviations(t, logs, e),
        }[scale]

    agreed, entropy, won, kept, wins = 0, 0.0, 0.0, 0.0, [0] * experts
    for t in range(tokens):
        order = sorted(range(experts), key=lambda e, t=t: -strength(t, e))[:k]
        agreed += len(set(order) & set(chosen[t].tolist()))
        won += sum(response[t, e].item() / mean[e] for e in order)
        kept += sum(response[t, e].item() / mean[e] for e in chosen[t].tolist())
        parts = [math.exp(strength(t, e) / 0.7) for e in range(experts)]
        entropy -= sum(p / sum(parts) * math.log(p / sum(parts)) for p in parts)
        for e in order:
            wins[e] += 1
    assert figures.tokens == tokens
    assert figures.agreement == pytest.approx(agreed / tokens / k)
    assert figures.static_agreement == pytest.approx(sum(sorted(wins)[-k:]) / tokens / k)
    assert figures.regret == pytest.approx(1 - kept / won, abs=1e-5)
    if experts > 1:
        assert figures.target_entropy == pytest.approx(entropy / tokens / math.log(experts), abs=1e-4)
    assert figures.winners_max_vio == pytest.approx(max(wins) / (sum(wins) / experts) - 1)


def test_a_router_that_knows_and_one_that_sees_nothing():
    response = torch.rand(200, 4, generator=torch.Generator().manual_seed(0))
    rule = Compete(response_scale="none", balance_winners=0.0)
    knows = agreement_figures(response, response.topk(2).indices, rule)
    assert knows.agreement == 1
    assert knows.regret == pytest.approx(0, abs=1e-6)
    assert knows.corrected_agreement == 1
    wins = torch.bincount(response.topk(2).indices.flatten(), minlength=4)
    blind = agreement_figures(response, wins.topk(2).indices.expand(200, 2), rule)
    assert blind.agreement == pytest.approx(blind.static_agreement)
    assert blind.corrected_agreement == pytest.approx(0)
    all_of_them = agreement_figures(response, torch.arange(4).expand(200, 4), rule)
    assert all_of_them.agreement == 1
    assert all_of_them.corrected_agreement is None


def test_balanced_winners_are_even_and_what_balances_them_is_told():
    normal = torch.randn(2000, 8, generator=torch.Generator().manual_seed(0))
    response = (normal.sign() * normal.abs() ** torch.linspace(0.3, 3, 8)).exp()
    chosen = torch.arange(2).expand(2000, 2)
    as_they_come, balanced = (agreement_figures(response, chosen, Compete(balance_winners=b)) for b in (0.0, 0.1))
    assert balanced.winners_max_vio == as_they_come.winners_max_vio > 0.3
    assert as_they_come.static_agreement > 0.3
    assert balanced.static_agreement == pytest.approx(2 / 8, abs=0.01)


def test_the_meter_sees_evaluation_alone_and_changes_nothing():
    tiny = tiny_models.build("mixtral", padded=True)
    meter = ResponseMeter(sample=8)
    expected = tiny.model.eval()(**tiny.inputs).logits
    with meter.attach(tiny.model), torch.no_grad():
        assert torch.equal(tiny.model(**tiny.inputs).logits, expected)
        once = meter.figures()
        with torch.enable_grad():
            tiny.model.train()(**tiny.inputs)
    assert meter.figures() == once
    assert {figures.tokens for figures in once.values()} == {8}


def test_a_texts_statistics_bring_its_responses_on_one_scale():
    """In the first layer, whose tokens are the same, the strongest by the text's own statistics win every one."""
    tiny = tiny_models.build("mixtral")
    tiny.model.eval()
    rule, records = Compete(balance_winners=0.0), []
    meter = ResponseMeter(rule)
    with meter.attach(tiny.model), torch.no_grad():
        tiny.model(**tiny.inputs)
    competing = reroute(tiny.model, by_competition(rule, meter.statistics()))
    with torch.no_grad(), competing, observe(tiny.model, records.append):
        tiny.model(**tiny.inputs)
    hidden, layer, routing = records[0].hidden, records[0].layer, records[0].routing
    everyone = torch.ones(len(hidden), 1)
    lengths = torch.stack(
        [layer.experts(hidden, everyone.long() * e, everyone).norm(dim=-1).log() for e in range(layer.num_experts)], -1
    )
    strength = (lengths - lengths.mean(0)) / lengths.std(0, correction=0)
    assert torch.equal(routing.expert.sort().values, strength.topk(layer.top_k).indices.sort().values)
    assert not torch.equal(routing.expert, records[0].proposed.expert)
    assert all(figures.regret > 0 for figures in meter.figures().values())


def test_agreement_rises_where_a_router_is_taught():
    tiny = tiny_models.build("qwen3_moe")
    model, meters = tiny.model, [ResponseMeter(), ResponseMeter()]
    aux = AuxLosses(distillation=1.0, compete=Compete(rate=1.0, forward=False))
    optimizer = torch.optim.Adam([p for n, p in model.named_parameters() if "gate.weight" in n], lr=1e-2)
    for meter, steps in zip(meters, (20, 0), strict=True):
        with meter.attach(model.eval()), torch.no_grad():
            model(**tiny.inputs)
        with aux.attach(model.train()):
            for _ in range(steps):
                model(**tiny.inputs).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                aux.step()
    before, after = (sum(f.agreement for f in meter.figures().values()) for meter in meters)
    assert after > before


def test_training_says_how_many_competed_and_whether_the_router_knew():
    """Per layer, of the tokens that competed; in the first step nobody wins, for responses have no scale yet."""
    tiny = tiny_models.build("qwen3_moe", padded=True)
    model, records = tiny.model.train(), []
    aux, meter = AuxLosses(compete=Compete(rate=0.4)), RoutingMeter(training=True)
    with aux.attach(model), meter.attach(model), observe(model, records.append):
        model(**tiny.inputs).loss.backward()
        assert all(f.agreement is None and f.competing for f in meter.figures().values())
        aux.step()
        meter.reset()
        records.clear()
        model(**tiny.inputs).loss.backward()
    mask = tiny.inputs["attention_mask"]
    assert len({int(row.sum()) for row in mask}) > 1
    for record, figures in zip(records, meter.figures().values(), strict=True):
        met, proposed = record.competition, record.proposed.expert
        rows = [row for row in range(len(met.token)) if met.filled[row]]
        agreed = [len({*met.winner[row].tolist()} & {*proposed[met.token[row]].tolist()}) for row in rows]
        assert figures.competing == len(rows) == sum(math.ceil(0.4 * int(row.sum())) for row in mask)
        assert figures.agreement == pytest.approx(sum(agreed) / len(rows) / met.winner.shape[1])


def test_nothing_is_said_of_competition_where_there_is_none():
    tiny = tiny_models.build("qwen3_moe")
    meter = RoutingMeter()
    with meter.attach(tiny.model.eval()), torch.no_grad():
        tiny.model(**tiny.inputs)
    assert all(f.competing is None and f.agreement is None for f in meter.figures().values())
