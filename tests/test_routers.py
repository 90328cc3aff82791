"""Routing rules against the reference, and the laws that they obey."""

from dataclasses import replace

import jaxtyping
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from agreement import MARGIN
from moestro import Misuse, RouterRule, Routing, reference
from moestro.routers import route, selection_scores, simplex

TOKENS = 5


@st.composite
def rules(draw: st.DrawFn) -> tuple[RouterRule, int, int]:
    """A rule, a number of experts and a top-k that fit together."""
    num_groups = draw(st.integers(1, 4))
    per_group = draw(st.integers(1, 4))
    top_groups = draw(st.integers(1, num_groups))
    rule = RouterRule(
        scores=draw(st.sampled_from(["softmax", "sigmoid"])),
        renormalise=draw(st.booleans()),
        scale=draw(st.sampled_from([1.0, 2.5])),
        selection_bias=draw(st.booleans()),
        num_groups=num_groups,
        top_groups=top_groups,
    )
    return rule, num_groups * per_group, draw(st.integers(1, top_groups * per_group))


@st.composite
def cases(draw: st.DrawFn) -> tuple[RouterRule, int, Tensor, Tensor | None]:
    """A rule, a top-k, logits of TOKENS tokens whose choice is clear, and a bias or None."""
    rule, num_experts, top_k = draw(rules())
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    logits = torch.randn(TOKENS, num_experts, generator=random)
    bias = torch.randn(num_experts, generator=random) * 0.3 if rule.selection_bias else None
    assume(margin(logits, rule, top_k, bias) > MARGIN)
    return rule, top_k, logits, bias


def affinity(logits: Tensor, rule: RouterRule) -> Tensor:
    return logits.softmax(-1) if rule.scores == "softmax" else logits.sigmoid()


def margin(logits: Tensor, rule: RouterRule, top_k: int, bias: Tensor | None = None) -> float:
    """The smallest distance, over tokens, between what is just chosen and what is just not, experts and groups."""
    select = affinity(logits.double(), rule) + (0 if bias is None else bias)
    grouped = select.unflatten(-1, (rule.num_groups, -1))
    score = grouped.sort(-1, descending=True).values[..., :2].sum(-1)
    ranked, order = score.sort(-1, descending=True)
    gaps = [ranked[:, rule.top_groups - 1] - ranked[:, rule.top_groups]] if rule.top_groups < rule.num_groups else []
    best = order[:, : rule.top_groups, None].expand(-1, -1, grouped.shape[-1])
    eligible = grouped.gather(1, best).flatten(1).sort(-1, descending=True).values
    gaps += [eligible[:, top_k - 1] - eligible[:, top_k]] if top_k < eligible.shape[-1] else []
    return min((float(gap.min()) for gap in gaps), default=1.0)


def as_dense(expert: Tensor, weight: Tensor, num_experts: int) -> Tensor:
    """Weights by expert, [tokens, experts]; NaN where not chosen."""
    return torch.full((len(expert), num_experts), float("nan")).scatter(-1, expert, weight)


@given(cases(), st.data())
def test_route_agrees_with_the_reference(case, data):
    rule, top_k, logits, bias = case
    num_experts = logits.shape[-1]
    # Banning whole groups is too much where the rest has no room for top_k; one expert less always fits or is skipped.
    banned = data.draw(st.sets(st.integers(0, num_experts - 1), max_size=num_experts // 2))
    kept = [e for e in range(num_experts) if e not in banned]
    mask = torch.zeros(TOKENS, num_experts, dtype=torch.bool)
    mask[:, sorted(banned)] = True
    expected = [
        reference.choose(
            token,
            torch.eye(num_experts, dtype=torch.double),
            top_k=top_k,
            scores=rule.scores,
            renormalise=rule.renormalise,
            scale=rule.scale,
            bias=None if bias is None else bias.tolist(),
            num_groups=rule.num_groups,
            top_groups=rule.top_groups,
            banned=sorted(banned),
        )
        for token in logits.double()
    ]
    assume(all(len(choice.experts) == top_k and set(choice.experts) <= set(kept) for choice in expected))

    routing = route(logits, rule, top_k, bias=bias, banned=mask)

    for token, choice in enumerate(expected):
        weights = dict(zip(choice.experts, map(float, choice.weights), strict=True))
        actual = dict(zip(routing.expert[token].tolist(), routing.weight[token].tolist(), strict=True))
        assert actual == pytest.approx(weights, rel=1e-5)
        assert routing.scores is not None
        torch.testing.assert_close(routing.scores[token], choice.probabilities.float())


@given(cases())
def test_renormalised_weights_sum_to_the_scale(case):
    rule, top_k, logits, bias = case
    routing = route(logits, replace(rule, renormalise=True), top_k, bias=bias)
    torch.testing.assert_close(routing.weight.sum(-1), torch.full((TOKENS,), rule.scale))


@given(cases())
def test_bias_chooses_but_does_not_weigh(case):
    """The same experts, brought about by a ban instead of a bias, get the same weights."""
    rule, top_k, logits, bias = case
    routing = route(logits, rule, top_k, bias=bias)
    others = torch.ones_like(logits, dtype=torch.bool).scatter(-1, routing.expert, False)
    unbiased = route(logits, replace(rule, num_groups=1, top_groups=1), top_k, banned=others)
    num_experts = logits.shape[-1]
    torch.testing.assert_close(
        as_dense(routing.expert, routing.weight, num_experts),
        as_dense(unbiased.expert, unbiased.weight, num_experts),
        equal_nan=True,
    )


def test_bias_moves_the_choice():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    rule = RouterRule(scores="sigmoid", selection_bias=True)
    assert route(logits, rule, 2).expert.tolist() == [[0, 1]]
    assert route(logits, rule, 2, bias=torch.tensor([0.0, 0.0, 0.0, 5.0])).expert.tolist() == [[3, 0]]


@given(cases())
def test_banned_experts_are_never_chosen(case):
    rule, top_k, logits, bias = case
    first = route(logits, rule, top_k, bias=bias)
    banned = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, first.expert[:, :1], True)
    free = (~banned).unflatten(-1, (rule.num_groups, -1)).sum(-1).sort(-1).values[:, : rule.top_groups].sum(-1)
    assume(bool((free >= top_k).all()))  # whichever groups are best
    again = route(logits, rule, top_k, bias=bias, banned=banned)
    assert not banned.gather(-1, again.expert).any()


def test_a_ban_beats_any_bias():
    rule = RouterRule(scores="sigmoid", selection_bias=True)
    banned = torch.tensor([[False, True, False]])
    assert route(torch.zeros(1, 3), rule, 2, bias=torch.tensor([0.0, 9.0, 0.1]), banned=banned).expert.tolist() == [
        [2, 0]
    ]


def test_a_group_with_few_experts_left_is_still_a_group():
    """A banned expert adds nothing to its group's score, but does not shut out the rest of the group."""
    rule = RouterRule(scores="sigmoid", num_groups=3, top_groups=1)
    banned = torch.tensor([[True, True, True, False, True, False]])
    assert route(torch.tensor([[9.0, 9.0, 9.0, 0.0, 9.0, 1.0]]), rule, 1, banned=banned).expert.tolist() == [[5]]


@given(cases(), st.randoms(use_true_random=False))
def test_permuting_experts_permutes_the_choice(case, random):
    """Experts within their group, and groups as a whole, have no order."""
    rule, top_k, logits, bias = case
    num_experts = logits.shape[-1]
    groups = torch.arange(num_experts).view(rule.num_groups, -1).tolist()
    for group in groups:
        random.shuffle(group)
    random.shuffle(groups)
    order = torch.tensor(groups).flatten()
    routing = route(logits, rule, top_k, bias=bias)
    permuted = route(logits[:, order], rule, top_k, bias=None if bias is None else bias[order])
    torch.testing.assert_close(
        as_dense(order[permuted.expert], permuted.weight, num_experts),
        as_dense(routing.expert, routing.weight, num_experts),
        equal_nan=True,
    )


@given(cases())
def test_only_allowed_groups_are_used(case):
    rule, top_k, logits, bias = case
    routing = route(logits, rule, top_k, bias=bias)
    group = routing.expert // (logits.shape[-1] // rule.num_groups)
    assert all(len(set(row)) <= rule.top_groups for row in group.tolist())


@given(cases())
def test_scores_are_on_the_simplex_and_know_no_bias(case):
    rule, top_k, logits, bias = case
    scores = route(logits, rule, top_k, bias=bias).scores
    assert scores is not None
    torch.testing.assert_close(scores.sum(-1), torch.ones(TOKENS))
    torch.testing.assert_close(scores, simplex(logits, rule.scores))


def test_selection_has_no_gradient():
    logits = torch.randn(TOKENS, 4, requires_grad=True)
    bias = torch.zeros(4, requires_grad=True)
    select = selection_scores(logits.sigmoid(), RouterRule(scores="sigmoid"), bias=bias.detach())
    assert not select.requires_grad
    route(logits, RouterRule(scores="sigmoid"), 2, bias=bias).weight[:, 0].sum().backward()
    assert bias.grad is None and logits.grad is not None and logits.grad.abs().sum() > 0


def test_half_precision_logits_are_routed_in_fp32():
    routing = route(torch.randn(TOKENS, 4).bfloat16(), RouterRule(), 2)
    assert routing.weight.dtype == torch.float32
    assert routing.scores is not None and routing.scores.dtype == torch.float32


def test_underflowing_sigmoids_stay_finite():
    routing = route(torch.full((1, 4), -200.0), RouterRule(scores="sigmoid"), 2)
    assert routing.weight.isfinite().all() and routing.scores is not None and routing.scores.isfinite().all()


def test_shapes_are_checked_in_tests():
    """What the conftest promises: without it, the annotations of the package would be mere comments."""
    with pytest.raises(jaxtyping.TypeCheckError):
        route(torch.zeros(2, 3, 4), RouterRule(), 2)
    with pytest.raises(jaxtyping.TypeCheckError):
        Routing(expert=torch.zeros(3, 2, dtype=torch.long), weight=torch.zeros(4, 2), logits=None, scores=None)


@pytest.mark.parametrize(
    ("fields", "top_k", "message"),
    [
        ({}, 5, "top_k must lie between 1 and num_experts (4), got 5"),
        ({}, 0, "top_k must lie between 1 and num_experts (4), got 0"),
        ({"scores": "relu"}, 1, "scores must be softmax or sigmoid, got 'relu'"),
        ({"num_groups": 3}, 1, "num_groups must divide num_experts (4), got 3"),
        ({"num_groups": 0}, 1, "num_groups must be at least 1, got 0"),
        ({"num_groups": 2, "top_groups": 3}, 1, "top_groups must lie between 1 and num_groups (2), got 3"),
        ({"num_groups": 2}, 3, "top_k must not exceed the 2 experts in top_groups (1), got 3"),
        ({"scale": 0.0}, 1, "scale must be above 0, got 0.0"),
    ],
)
def test_rules_that_cannot_work_are_refused(fields, top_k, message, unchecked):
    with pytest.raises(Misuse) as refusal:
        RouterRule(**fields).validate(4, top_k)
    assert str(refusal.value) == message
