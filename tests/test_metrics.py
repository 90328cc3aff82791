"""Routing figures against counting by hand, and that sums of parts are the sums of the whole."""

import math
from collections import Counter
from dataclasses import fields, replace

import pytest
import tiny_models
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics.cluster import contingency_matrix
from sklearn.metrics.cluster import expected_mutual_information as sklearn_expected
from torch import nn

from moestro.adapters import RoutingMeter, moe_layers
from moestro.architecture.router_rule import RouterRule
from moestro.information import expected_mutual_information, mutual_information
from moestro.metrics import no_sums, routing_figures, routing_sums
from moestro.routers import route
from moestro.routing import Batch, Competition, LayerRecord, MoELayer, Routing
from moestro.samples import subset


def layer_of(num_experts: int, top_k: int) -> MoELayer:
    return MoELayer(
        name="layer",
        block="layers.0",
        router=nn.Identity(),
        experts=nn.Identity(),
        num_experts=num_experts,
        top_k=top_k,
    )


def record(
    logits: torch.Tensor,
    top_k: int,
    *,
    valid=None,
    domain=None,
    sequence=None,
    hidden=None,
    outputs=None,
    edge=None,
    rule: RouterRule | None = None,
    bias=None,
) -> LayerRecord:
    sequence = torch.zeros(len(logits), dtype=torch.long) if sequence is None else sequence
    batch = Batch(sequence=sequence, num_sequences=int(sequence.max()) + 1, valid=valid, domain=domain)
    routing = replace(route(logits, rule or RouterRule(), top_k, bias=bias), edge=edge)
    return LayerRecord(
        layer=layer_of(logits.shape[1], top_k),
        batch=batch,
        hidden=torch.zeros(len(logits), 1) if hidden is None else hidden,
        proposed=routing,
        routing=routing,
        outputs=outputs,
    )


def drawn(data: st.DataObject, *, ragged: bool = False) -> LayerRecord:
    """A record of a drawn size: down to one token and one expert, with padding of NaN, edges missing if `ragged`."""
    tokens, experts = data.draw(st.integers(1, 14)), data.draw(st.integers(1, 5))
    biased = data.draw(st.booleans())
    rule = RouterRule(scores="sigmoid", selection_bias=True, scale=2.5) if biased else RouterRule()
    top_k = data.draw(st.integers(1, experts))
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    valid = None
    if data.draw(st.booleans()):
        valid = torch.rand(tokens, generator=g) < 0.7
        valid[0] = True
    edge = None
    if ragged:
        edge = torch.rand(tokens, top_k, generator=g) < 0.6
        edge[0, 0] = True
    result = record(
        torch.randn(tokens, experts, generator=g),
        top_k,
        valid=valid,
        edge=edge,
        domain=torch.randint(0, 2, (tokens,), generator=g),
        sequence=torch.randint(0, 3, (tokens,), generator=g),
        hidden=torch.randn(tokens, 3, generator=g),
        outputs=torch.randn(tokens, top_k, 3, generator=g),
        rule=rule,
        bias=2 * torch.randn(experts, generator=g) if biased else None,
    )
    if valid is not None:
        for tensor in (result.hidden, result.outputs, result.routing.scores):
            tensor[~valid] = float("nan")
    return result


def valid_tokens(of: LayerRecord) -> list[int]:
    return [t for t in range(len(of.hidden)) if of.batch.valid is None or of.batch.valid[t]]


def edges(of: LayerRecord, t: int) -> list[int]:
    """Slots of a token that are used."""
    return [j for j in range(of.routing.expert.shape[1]) if of.routing.edge is None or of.routing.edge[t, j]]


def entropy(count: list[float]) -> float:
    return -sum(c / sum(count) * math.log(c / sum(count)) for c in count if c)


@given(data=st.data(), ragged=st.booleans())
def test_figures_equal_counting_by_hand(data: st.DataObject, ragged: bool):
    of = drawn(data, ragged=ragged)
    experts, tokens = of.layer.num_experts, valid_tokens(of)
    figures = routing_figures(routing_sums(of, num_domains=2))

    domains = [[0.0] * experts for _ in range(2)]
    sequences = [[0.0] * experts for _ in range(3)]
    uncertainty, confidence = [], []
    for t in tokens:
        p = of.routing.scores[t].tolist()
        for j in edges(of, t):
            e = int(of.routing.expert[t, j])
            domains[int(of.batch.domain[t])][e] += 1
            sequences[int(of.batch.sequence[t])][e] += 1
        uncertainty.append(-sum(x * math.log(x) for x in p))
        if slots := edges(of, t):
            first = max(slots, key=lambda j: float(of.routing.weight[t, j]))
            confidence.append(p[int(of.routing.expert[t, first])])
    load = [a + b for a, b in zip(*domains, strict=True)]
    mean_uncertainty = sum(uncertainty) / len(tokens)
    mean_scores = [sum(float(of.routing.scores[t, e]) for t in tokens) / len(tokens) for e in range(experts)]
    assert figures.load == pytest.approx([x / sum(load) for x in load])
    for d in range(2):
        assert figures.domain_load[d] == pytest.approx([x / max(sum(domains[d]), 1) for x in domains[d]])
    assert figures.max_vio_data == pytest.approx(max(load) / (sum(load) / experts) - 1, abs=1e-9)
    assert figures.max_vio_batch == pytest.approx(figures.max_vio_data)
    assert figures.dead_experts == load.count(0.0)
    assert figures.entropy == pytest.approx(mean_uncertainty, abs=1e-5)
    assert figures.confidence == pytest.approx(sum(confidence) / len(confidence), abs=1e-5)
    assert figures.mutual_information == pytest.approx(entropy(mean_scores) - mean_uncertainty, abs=1e-5)
    for table, found in (
        (domains, figures.domain_mutual_information),
        (sequences, figures.sequence_mutual_information),
    ):
        within = sum(sum(row) / sum(load) * entropy(row) for row in table if sum(row))
        assert found == pytest.approx(entropy(load) - within, abs=1e-9)


@given(data=st.data(), ragged=st.booleans())
def test_variance_of_the_scores_equals_a_loop(data: st.DataObject, ragged: bool):
    of = drawn(data, ragged=ragged)
    experts, tokens = of.layer.num_experts, valid_tokens(of)
    rows = []
    for t in tokens:
        chosen = [int(of.routing.expert[t, j]) for j in edges(of, t)]
        total = sum(float(of.routing.scores[t, e]) for e in chosen)
        rows.append([float(of.routing.scores[t, e]) / total if e in chosen else 0.0 for e in range(experts)])
    mean = [sum(row[e] for row in rows) / len(rows) for e in range(experts)]
    variance = sum((row[e] - mean[e]) ** 2 for row in rows for e in range(experts)) / len(rows)
    figures = routing_figures(routing_sums(of, num_domains=2))
    assert figures.score_square == pytest.approx(sum(x * x for row in rows for x in row) / len(rows), abs=1e-6)
    assert figures.mean_score_square == pytest.approx(sum(x * x for x in mean), abs=1e-6)
    assert figures.column_variance == pytest.approx(variance, abs=1e-6)


@given(data=st.data(), ragged=st.booleans())
def test_cosines_and_overlap_equal_loops(data: st.DataObject, ragged: bool):
    of = drawn(data, ragged=ragged)
    figures = routing_figures(routing_sums(of, num_domains=2, sample=of))
    cosines = [
        float(torch.nn.functional.cosine_similarity(of.outputs[t, j], of.outputs[t, k], dim=0))
        for t in valid_tokens(of)
        for j in edges(of, t)
        for k in edges(of, t)
        if j != k
    ]
    if cosines:
        assert figures.cosine == pytest.approx(sum(cosines) / len(cosines), abs=1e-5)
        assert figures.cosine_square == pytest.approx(sum(c * c for c in cosines) / len(cosines), abs=1e-5)
    else:
        assert figures.cosine is None and figures.cosine_square is None

    points = [t for t in valid_tokens(of) if edges(of, t)]
    label = {t: int(of.routing.expert[t, max(edges(of, t), key=lambda j: of.routing.weight[t, j])]) for t in points}
    if len(points) < 2:
        assert figures.overlap is None
        return
    shares, expected = [], []
    for t in points:
        others = [u for u in points if u != t]
        nearest = sorted(others, key=lambda u: float((of.hidden[u] - of.hidden[t]).norm()))[:10]
        shares.append(sum(label[u] != label[t] for u in nearest) / len(nearest))
        expected.append(sum(label[u] != label[t] for u in others) / len(others))  # any of the others is as likely
    assert figures.overlap == pytest.approx(sum(shares) / len(points), abs=1e-9)
    assert figures.overlap_shuffled == pytest.approx(sum(expected) / len(points), abs=1e-9)


@given(cut=st.integers(0, 12), padded=st.booleans())
def test_parts_add_up_to_the_whole(cut: int, padded: bool):
    """Where no sequence is cut. Largest loads and neighbours are a batch's own: there, the parts are averaged."""
    g = torch.Generator().manual_seed(0)
    logits, hidden, outputs = (torch.randn(12, *shape, generator=g) for shape in ((4,), (3,), (2, 3)))
    valid = torch.rand(12, generator=g) < 0.6 if padded else None
    sequence = (torch.arange(12) >= cut).long()

    def sums(part: slice):
        of = record(
            logits[part],
            2,
            valid=None if valid is None else valid[part],
            sequence=sequence[part],
            hidden=hidden[part],
            outputs=outputs[part],
        )
        return routing_sums(of, sample=of)

    whole = sums(slice(None))
    parts = no_sums(1, 4, torch.device("cpu"))
    for part in (slice(0, cut), slice(cut, 12)):
        if len(logits[part]):
            parts = parts + sums(part)
    assert parts.batches == (2 if 0 < cut < 12 else 1)
    for f in fields(whole):
        if f.name not in ("batches", "batch_max_vio", "points", "overlap", "overlap_shuffled"):
            torch.testing.assert_close(getattr(parts, f.name), getattr(whole, f.name), rtol=1e-6, atol=1e-6)


def test_extremes():
    collapsed = routing_figures(routing_sums(record(torch.tensor([[9.0, 0.0, 0.0, 0.0]] * 6), 1)))
    assert collapsed.max_vio_data == 3.0
    assert collapsed.dead_experts == 3
    assert collapsed.mutual_information == pytest.approx(0.0, abs=1e-6)
    assert collapsed.score_square == collapsed.mean_score_square == 1.0
    assert collapsed.column_variance == 0.0
    specialised = routing_figures(
        routing_sums(record(50 * torch.eye(4), 1, domain=torch.arange(4), sequence=torch.arange(4)), num_domains=4),
    )
    assert specialised.max_vio_data == 0.0
    assert specialised.mutual_information == pytest.approx(math.log(4), abs=1e-5)
    assert specialised.domain_mutual_information == pytest.approx(math.log(4), abs=1e-6)
    assert specialised.column_variance == pytest.approx(0.75)
    # Four tokens of four domains look specialised however they are routed: there is no evidence in them.
    assert specialised.domain_mutual_information_excess == pytest.approx(0.0, abs=1e-9)
    assert specialised.sequence_mutual_information_excess == pytest.approx(0.0, abs=1e-9)


def test_collapse_onto_two_experts_has_no_column_variance():
    figures = routing_figures(routing_sums(record(torch.tensor([[3.0, 2.0, 0.0, 0.0]] * 6), 2)))
    assert figures.column_variance == pytest.approx(0.0, abs=1e-12)
    assert figures.score_square == pytest.approx(figures.mean_score_square)


def test_a_router_that_learns_nothing():
    """Hash routing: a token's experts count alike."""
    routing = Routing(expert=torch.tensor([[0, 1], [2, 3]]), weight=torch.ones(2, 2), logits=None, scores=None)
    of = replace(record(torch.zeros(2, 4), 2), proposed=routing, routing=routing)
    figures = routing_figures(routing_sums(of))
    assert figures.confidence == 0.5
    assert figures.score_square == 0.5
    assert figures.mean_score_square == pytest.approx(0.25)
    assert figures.mutual_information == pytest.approx(math.log(2))


def test_padding_may_be_anything():
    logits = torch.randn(4, 3)
    broken = torch.cat([logits, torch.full((2, 3), float("nan"))])
    valid = torch.tensor([True] * 4 + [False] * 2)
    assert routing_figures(routing_sums(record(broken, 1, valid=valid))) == routing_figures(
        routing_sums(record(logits, 1))
    )


def test_a_subset_keeps_what_belongs_together():
    g = torch.Generator().manual_seed(0)
    logits, hidden, outputs = (torch.randn(6, *shape, generator=g) for shape in ((4,), (3,), (2, 3)))
    edge = torch.rand(6, 2, generator=g) < 0.7
    some = torch.tensor([5, 1, 2])
    whole = record(logits, 2, hidden=hidden, outputs=outputs, edge=edge)
    expected = record(logits[some], 2, hidden=hidden[some], outputs=outputs[some], edge=edge[some])
    part = subset(whole, some)
    for f in fields(routing_sums(part, sample=part)):
        torch.testing.assert_close(
            getattr(routing_sums(part, sample=part), f.name), getattr(routing_sums(expected, sample=expected), f.name)
        )


# Overlap


def clusters(labels: torch.Tensor, spread: float) -> LayerRecord:
    """A token of each label near its label's own corner; label e chooses expert e."""
    g = torch.Generator().manual_seed(0)
    corners = torch.eye(4)[labels]
    return record(9 * corners, 1, hidden=100 + corners + spread * torch.randn(len(labels), 4, generator=g))


def test_overlap_of_separable_experts_is_none_and_that_of_random_ones_is_chance():
    labels = torch.arange(4).repeat_interleave(torch.tensor([60, 60, 40, 40]))
    apart = clusters(labels, spread=0.01)
    figures = routing_figures(routing_sums(apart, sample=apart))
    assert figures.overlap == 0.0
    g = torch.Generator().manual_seed(1)
    mixed = replace(apart, hidden=apart.hidden[torch.randperm(200, generator=g)])
    figures = routing_figures(routing_sums(mixed, sample=mixed))
    assert figures.overlap_shuffled == pytest.approx(1 - 2 * 0.3**2 - 2 * 0.2**2, abs=0.005)
    assert figures.overlap == pytest.approx(figures.overlap_shuffled, abs=0.03)


# Information of labels


def shuffled_by_hand(logits: torch.Tensor, top_k: int, label: torch.Tensor, times: int) -> float:
    """Mean mutual information of label and expert over random permutations of the tokens' labels."""
    expert = logits.topk(top_k).indices
    g = torch.Generator().manual_seed(3)
    total = 0.0
    for _ in range(times):
        shuffled = label[torch.randperm(len(label), generator=g)]
        table = torch.zeros(int(label.max()) + 1, logits.shape[1], dtype=torch.float64)
        for t in range(len(label)):
            table[shuffled[t], expert[t]] += 1
        total += float(mutual_information(table))
    return total / times


@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(12, 3, 1), (40, 6, 2), (60, 4, 4), (30, 8, 3)])
def test_the_baseline_is_the_mean_over_shuffles(tokens: int, experts: int, top_k: int):
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(tokens, experts, generator=g) + torch.arange(experts) / 2  # uneven load
    label = torch.arange(tokens) % 3
    figures = routing_figures(routing_sums(record(logits, top_k, domain=label, sequence=label), num_domains=3))
    by_hand = shuffled_by_hand(logits, top_k, label, 400)
    assert figures.domain_mutual_information_shuffled == pytest.approx(by_hand, rel=0.06, abs=1e-9)
    assert figures.sequence_mutual_information_shuffled == pytest.approx(by_hand, rel=0.06, abs=1e-9)
    assert (by_hand == pytest.approx(0.0, abs=1e-9)) == (top_k == experts)  # all experts always: nothing to tell


@pytest.mark.parametrize("tokens", [1, 2, 30, 2000, 20000])
def test_the_baseline_is_that_of_scikit_learn(tokens: int):
    """With one choice per token. From some size on ours takes the variance instead of the sum: 0.4 %."""
    g = torch.Generator().manual_seed(0)
    label, expert = torch.randint(0, 3, (tokens,), generator=g), torch.randint(0, 5, (tokens,), generator=g) // 2
    table = contingency_matrix(label, expert, sparse=True)
    count = torch.tensor([float(n) for _, n in sorted(Counter(label.tolist()).items())], dtype=torch.float64)
    chosen_by = torch.tensor([float(n) for _, n in sorted(Counter(expert.tolist()).items())], dtype=torch.float64)
    ours = expected_mutual_information(count, torch.ones_like(count), chosen_by)
    expected = sklearn_expected(table, tokens)
    assert float(ours) == pytest.approx(expected, rel=1e-9 if tokens < 200 else 4e-3, abs=1e-9)


def test_labels_that_tell_nothing_have_no_excess_and_labels_that_tell_have_one():
    g = torch.Generator().manual_seed(0)
    label = torch.arange(240) % 12  # 20 tokens of each
    means_nothing = torch.randn(240, 16, generator=g)
    figures = routing_figures(routing_sums(record(means_nothing, 2, domain=label, sequence=label), num_domains=12))
    for raw, excess in (
        (figures.domain_mutual_information, figures.domain_mutual_information_excess),
        (figures.sequence_mutual_information, figures.sequence_mutual_information_excess),
    ):
        assert raw > 0.12
        assert abs(excess) < 0.02
    tells = means_nothing + 3 * torch.nn.functional.one_hot(label, 16)
    figures = routing_figures(routing_sums(record(tells, 2, domain=label, sequence=label), num_domains=12))
    assert figures.domain_mutual_information_excess > 0.3
    assert figures.sequence_mutual_information_excess == pytest.approx(figures.domain_mutual_information_excess)


def test_confidence_is_that_of_the_first_choice_and_not_of_the_favourite():
    """A bias sends the token to the second expert; the third's weight is the larger, and the first scores most."""
    logits = torch.tensor([[0.6, 0.1, 0.3]]).log()
    of = record(logits, 2, bias=torch.tensor([0.0, 2.0, 1.0]), rule=RouterRule(selection_bias=True))
    assert of.routing.expert.tolist() == [[1, 2]]
    assert routing_figures(routing_sums(of)).confidence == pytest.approx(0.3)
    alone = record(logits, 1, bias=torch.tensor([0.0, 2.0, 1.0]), rule=RouterRule(selection_bias=True))
    assert routing_figures(routing_sums(alone)).confidence == pytest.approx(0.1)


def test_a_token_that_goes_nowhere_has_no_first_choice():
    logits = torch.tensor([[0.6, 0.1, 0.3], [0.2, 0.5, 0.3]]).log()
    of = record(logits, 1, edge=torch.tensor([[True], [False]]))
    assert routing_figures(routing_sums(of)).confidence == pytest.approx(0.6)


def test_a_slot_that_is_not_used_agrees_with_no_winner():
    """Zaya's routers say expert 0 where they send a token to none."""
    of = record(torch.tensor([[3.0, 2.0, 1.0]]), 2, edge=torch.tensor([[False, True]]))
    contest = Competition(
        token=torch.tensor([0]), filled=torch.tensor([True]), response=torch.ones(1, 3), target=None,
        winner=torch.tensor([[0, 1]]),
    )  # fmt: skip
    assert routing_figures(routing_sums(replace(of, competition=contest))).agreement == 0.5


def test_figures_of_a_stock_router_with_groups_and_a_bias():
    """glm4_moe, its choices, scores and weights read off its router and counted one by one."""
    model, ids = tiny_models.build("glm4_moe").model.eval(), torch.randint(3, tiny_models.VOCABULARY, (3, 20))
    layer = moe_layers(model)[0]
    torch.nn.init.normal_(layer.selection_bias, std=0.5)
    seen = []
    layer.router.register_forward_hook(lambda module, args, output: seen.append(output))
    meter = RoutingMeter()
    with torch.no_grad(), meter.attach(model):
        model(ids)
    logits, weights, experts = (value.tolist() for value in seen[0])
    confidence, count = 0.0, Counter()
    for row, weight, chosen in zip(logits, weights, experts, strict=True):
        scores = [1 / (1 + math.exp(-x)) for x in row]
        first = chosen[max(range(len(chosen)), key=lambda slot: weight[slot])]
        confidence += scores[first] / sum(scores) / len(logits)
        count.update(chosen)
    figures = meter.figures()[layer.name]
    assert figures.confidence == pytest.approx(confidence, abs=1e-6)
    assert figures.load == pytest.approx([count[e] / count.total() for e in range(layer.num_experts)])
    favourites = sum(max(p) / sum(p) for p in ([1 / (1 + math.exp(-x)) for x in row] for row in logits)) / len(logits)
    assert favourites > figures.confidence + 1e-3
