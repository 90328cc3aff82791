"""Perturbations of routing as pure functions: against plain loops, and against the laws that they obey."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from moestro import Batch, Misuse, MoELayer, RouterRule, Routing
from moestro.perturbations import add_noise, disable, random_bits, random_normal, replace_at_random
from moestro.routers import route
from moestro.routing import Proposal

TOKENS, EXPERTS, TOP_K = 12, 8, 3
RULES = {
    "softmax": RouterRule(),
    "softmax, not renormalised": RouterRule(renormalise=False),
    "sigmoid with bias": RouterRule(scores="sigmoid", selection_bias=True, scale=2.5),
    "groups": RouterRule(scores="sigmoid", selection_bias=True, num_groups=4, top_groups=2),
}


def layer(name: str = "blocks.3.mlp", **changed: object) -> MoELayer:
    idle = nn.Identity()
    handle = MoELayer(name=name, block="3", router=idle, experts=idle, num_experts=EXPERTS, top_k=TOP_K)
    return replace(handle, **changed)


def batch_of(rows: Tensor, valid: Tensor | None = None) -> Batch:
    sequence = torch.arange(len(rows)).repeat_interleave(rows.shape[1])
    valid = None if valid is None else valid.flatten()
    return Batch(sequence=sequence, num_sequences=len(rows), input_ids=rows.flatten(), valid=valid)


def proposal(
    rule: RouterRule, *, at: MoELayer | None = None, batch: Batch | None = None, **changed: object
) -> tuple[Proposal, Tensor, Tensor | None]:
    """What a layer of random logits proposes (with `changed` in its routing), those logits and the bias."""
    logits = torch.randn(TOKENS, EXPERTS)
    bias = torch.randn(EXPERTS) if rule.selection_bias else None

    def select(banned: Tensor | None = None, noise: Tensor | None = None) -> Routing:
        spread = logits.std(-1, correction=0, keepdim=True)
        return route(logits if noise is None else logits + noise * spread, rule, TOP_K, bias=bias, banned=banned)

    batch = batch or batch_of(torch.randint(0, 50, (3, TOKENS // 3)))
    routing = replace(select(), **changed)

    def run(hidden: Tensor, expert: Tensor) -> Tensor:
        raise AssertionError("perturbations run no experts")

    hidden = torch.zeros(TOKENS, 1)
    given = Proposal(layer=at or layer(), batch=batch, hidden=hidden, routing=routing, select=select, run=run)
    return given, logits, bias


def score(logits: Tensor, rule: RouterRule) -> list[float]:
    return (logits.softmax(-1) if rule.scores == "softmax" else logits.sigmoid()).tolist()


def loop(logits: Tensor, bias: Tensor | None, rule: RouterRule, banned: set[int]) -> list[int]:
    """The experts of one token, best first, in plain Python."""
    select = {e: s + (0.0 if bias is None else float(bias[e])) for e, s in enumerate(score(logits, rule))}
    size = EXPERTS // rule.num_groups
    allowed: list[list[float]] = []
    for group in range(rule.num_groups):
        own = sorted((select[e] for e in range(group * size, (group + 1) * size) if e not in banned), reverse=True)
        allowed.append([sum(own[:2]) if own else -math.inf, group])
    best = {int(group) for _, group in sorted(allowed, reverse=True)[: rule.top_groups]}
    return sorted((e for e in select if e not in banned and e // size in best), key=lambda e: -select[e])[:TOP_K]


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("name", RULES)
def test_disabled_experts_are_those_of_largest_weight(name: str, count: int) -> None:
    """They are the first by weight and not by what selects, which a bias makes another."""
    rule = RULES[name] if count == 1 else replace(RULES[name], num_groups=1, top_groups=1)
    given, logits, bias = proposal(rule)
    found = disable(count)(given)
    differ = 0
    for token in range(TOKENS):
        chosen = loop(logits[token], bias, rule, set())
        by_weight = sorted(chosen, key=lambda e: -score(logits[token], rule)[e])
        differ += by_weight[0] != chosen[0]
        assert found.expert[token].tolist() == loop(logits[token], bias, rule, set(by_weight[:count]))
    assert (differ > 0) == rule.selection_bias


def test_only_used_slots_are_disabled() -> None:
    """A slot without an edge says nothing, whatever weight stands in it."""
    seen = []
    edge = torch.tensor([[True, False, True], [False, False, False], [True, True, True]]).repeat(TOKENS // 3, 1)
    weight = torch.tensor([[0.2, 0.9, 0.3]]).repeat(TOKENS, 1)
    given, _, _ = proposal(RouterRule(), edge=edge, weight=weight)
    expert = given.routing.expert
    disable(2)(replace(given, select=lambda banned: seen.append(banned) or given.routing))
    for token, banned in enumerate(seen[0]):
        used = [(0, 2), (), (1, 2)][token % 3]
        assert sorted(banned.nonzero().flatten().tolist()) == sorted(expert[token, list(used)].tolist())


@pytest.mark.parametrize("count", [1, 3])
def test_random_replacement_keeps_weights_and_the_other_experts(count: int) -> None:
    given, _, _ = proposal(RouterRule(), weight=torch.rand(TOKENS, TOP_K))
    found = replace_at_random(count)(given)
    assert torch.equal(found.weight, given.routing.weight)
    for token in range(TOKENS):
        before, after = given.routing.expert[token].tolist(), found.expert[token].tolist()
        first = given.routing.weight[token].argsort(descending=True)[:count].tolist()
        assert [after[slot] == before[slot] for slot in range(TOP_K)] == [slot not in first for slot in range(TOP_K)]
        assert len(set(after)) == TOP_K
        assert not {after[slot] for slot in first} & set(before)


def test_an_unused_slot_is_neither_replaced_nor_taken() -> None:
    edge = torch.tensor([[True, False, False]]).repeat(TOKENS, 1)
    given, _, _ = proposal(RouterRule(), edge=edge)
    drawn = [replace_at_random(3, seed)(given).expert for seed in range(200)]
    expert = given.routing.expert
    assert all(torch.equal(found[:, 1:], expert[:, 1:]) for found in drawn)
    once = torch.stack([found[:, 0] for found in drawn])
    assert set(once[:, 0].tolist()) == set(range(EXPERTS)) - {int(expert[0, 0])}


def test_replacements_are_drawn_evenly() -> None:
    given, _, _ = proposal(RouterRule(), expert=torch.tensor([[5, 0, 2]]).repeat(TOKENS, 1))
    drawn = torch.stack([replace_at_random(1, seed)(given).expert[:, 0] for seed in range(500)])
    count = torch.bincount(drawn.flatten(), minlength=EXPERTS)
    assert count[[0, 2, 5]].sum() == 0
    even = 500 * TOKENS / 5
    assert ((count[[1, 3, 4, 6, 7]] - even).abs() < 5 * math.sqrt(even)).all()


def test_noise_is_standard_normal_in_units_of_the_logits_spread() -> None:
    given, logits, bias = proposal(RULES["sigmoid with bias"])
    found, noise = add_noise(0.7, seed=3)(given), random_normal(given, 3)
    disturbed = logits + 0.7 * noise * logits.std(-1, correction=0, keepdim=True)
    expected = route(disturbed, RULES["sigmoid with bias"], TOP_K, bias=bias)
    assert torch.equal(found.expert, expected.expert)
    torch.testing.assert_close(found.weight, expected.weight)
    many = torch.stack([random_normal(given, seed) for seed in range(500)])
    assert many.isfinite().all()
    moments = [float((many**power).mean()) for power in (1, 2, 3, 4)]
    assert moments == pytest.approx([0, 1, 0, 3], abs=0.1)
    flat = many.permute(1, 2, 0).reshape(TOKENS * EXPERTS, -1)
    assert (torch.corrcoef(flat) - torch.eye(TOKENS * EXPERTS)).abs().max() < 0.25  # of 500: 5.6 standard errors


def test_random_choices_depend_on_seed_layer_tokens_and_place_only() -> None:
    rows = torch.randint(0, 50, (3, 4))
    given = proposal(RouterRule(), batch=batch_of(rows))[0]
    bits = random_bits(given, 0).view(3, 4, EXPERTS)
    assert len(bits.unique()) == bits.numel()
    for changed in (random_bits(given, 1), random_bits(replace(given, layer=layer("blocks.4.mlp")), 0)):
        assert not (changed.view_as(bits) == bits).any()

    def again(batch: Batch) -> Tensor:
        return random_bits(replace(given, batch=batch), 0).view(batch.num_sequences, -1, EXPERTS)

    assert torch.equal(again(batch_of(rows[[2, 0]])), bits[[2, 0]])  # other rows, in another order
    left, right = torch.full((3, 6), 49), torch.full((3, 6), 49)
    left[:, 2:], right[:, :4] = rows, rows
    place = torch.arange(6)
    assert torch.equal(again(batch_of(left, (place >= 2).expand(3, 6)))[:, 2:], bits)
    assert torch.equal(again(batch_of(right, (place < 4).expand(3, 6)))[:, :4], bits)
    other = rows.clone()
    other[0, 3] += 1
    assert not (again(batch_of(other))[0] == bits[0]).any()  # all of the sequence counts
    assert not (again(batch_of(rows[:, [1, 0, 2, 3]]))[0] == bits[0]).any()


def test_a_packed_sequence_is_as_in_a_row_of_its_own() -> None:
    rows = torch.randint(0, 50, (2, 5))
    apart = batch_of(rows)
    packed = Batch(sequence=apart.sequence, num_sequences=10, input_ids=rows.flatten())  # an upper bound, as it may be
    given = proposal(RouterRule())[0]
    assert torch.equal(random_bits(replace(given, batch=packed), 0), random_bits(replace(given, batch=apart), 0))


MISUSE = [
    (disable(0), {}, r"count must lie between 1 and top_k \(3\) of blocks.3.mlp, got 0"),
    (disable(4), {}, r"count must lie between 1 and top_k \(3\) of blocks.3.mlp, got 4"),
    (disable(3), {"num_experts": 5}, r"disabling 3 of 5 experts in blocks.3.mlp must leave top_k \(3\)"),
    (replace_at_random(3), {"num_experts": 5}, "replacing 3 of each token's experts .* than the 2 that it did not"),
    (replace_at_random(4), {}, r"count must lie between 1 and top_k \(3\)"),
]


@pytest.mark.parametrize(("rule", "changed", "message"), MISUSE)
def test_misuse_says_what_must_hold(rule, changed, message) -> None:
    given, _, _ = proposal(RouterRule(), at=layer(**changed))
    with pytest.raises(Misuse, match=message):
        rule(given)


def test_noise_needs_a_scale_and_random_choices_need_tokens() -> None:
    with pytest.raises(Misuse, match=r"the scale of noise must be above 0, got 0\.0"):
        add_noise(0.0)
    given, _, _ = proposal(RouterRule())
    unknown = replace(given, batch=replace(given.batch, input_ids=None))
    with pytest.raises(Misuse, match="must be called with input_ids"):
        add_noise(0.1)(unknown)
