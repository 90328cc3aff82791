"""Orthogonality, variance and router-weight losses: against plain loops, and what they must and must not reward."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from agreement import assert_equal
from moestro import Batch, LayerRecord, Misuse, MoELayer, Routing, losses, reference
from moestro.losses.inner_products import CPU_CHUNK
from moestro.losses.outputs import RIDGE

FORMS = ["projection", "cosine", "weighted", "span"]
every_form = pytest.mark.parametrize("form", FORMS)


@dataclass
class Case:
    """Leaves that gradients are taken of, and the record that is made of them."""

    logits: Tensor
    outputs: Tensor
    record: LayerRecord

    @property
    def rows(self) -> list[tuple[int, int, list[int]]]:
        """(sequence, token, used slots) of every valid token."""
        batch, edge = self.record.batch, self.record.routing.edge
        k = self.record.routing.expert.shape[1]
        return [
            (int(batch.sequence[i]), i, [j for j in range(k) if edge is None or edge[i, j]])
            for i in range(len(batch.sequence))
            if batch.valid is None or batch.valid[i]
        ]


def make_record(
    expert: Tensor,
    num_experts: int,
    *,
    scores: Tensor | None = None,
    outputs: Tensor | None = None,
    sequence: Tensor | None = None,
    num_sequences: int = 1,
    valid: Tensor | None = None,
    edge: Tensor | None = None,
    weight: Tensor | None = None,
) -> LayerRecord:
    tokens, k = expert.shape
    layer = MoELayer(
        name="layer", block="0", router=nn.Identity(), experts=nn.Identity(), num_experts=num_experts, top_k=k
    )
    routing = Routing(
        expert=expert,
        weight=torch.full((tokens, k), 1 / k) if weight is None else weight,
        logits=None,
        scores=scores,
        edge=edge,
    )
    sequence = torch.zeros(tokens, dtype=torch.long) if sequence is None else sequence
    batch = Batch(sequence=sequence, num_sequences=num_sequences, valid=valid)
    hidden = torch.zeros(tokens, 1 if outputs is None else outputs.shape[-1])
    return LayerRecord(layer=layer, batch=batch, hidden=hidden, proposed=routing, routing=routing, outputs=outputs)


def make_case(
    tokens: int, num_experts: int, k: int, dim: int, *, seed: int = 0, padding: bool = False, ragged: bool = False
) -> Case:
    """Random outputs that overlap; experts above k are idle by one; garbage (NaN) wherever nothing is to be read."""
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, num_experts, generator=draw)
    if num_experts > k:
        logits[:, -1] = -30.0  # never chosen
    valid = torch.rand(tokens, generator=draw) < 0.6 if padding else None
    edge = torch.rand(tokens, k, generator=draw) < 0.6 if ragged else None
    outputs = torch.randn(tokens, k, dim, generator=draw) + 0.7 * torch.randn(tokens, 1, dim, generator=draw)
    expert = logits.topk(k).indices
    used = torch.ones(tokens, k, dtype=torch.bool)
    if valid is not None:
        used &= valid[:, None]
    if edge is not None:
        used &= edge
    outputs[~used] = torch.nan
    logits.requires_grad_()
    outputs.requires_grad_()
    scores = logits.softmax(-1)
    weight = torch.randn(tokens, k, generator=draw).masked_fill(~used, torch.nan)
    if valid is not None:
        scores = torch.where(valid[:, None], scores, torch.nan)
    record = make_record(
        expert,
        num_experts,
        scores=scores,
        outputs=outputs,
        sequence=torch.randint(0, 3, (tokens,), generator=draw),
        num_sequences=4,  # the last is empty
        valid=valid,
        edge=edge,
        weight=weight,
    )
    return Case(logits=logits, outputs=outputs, record=record)


def cases(least_dim: int = 1) -> st.SearchStrategy[Case]:
    @st.composite
    def drawn(draw: Callable) -> Case:
        num_experts = draw(st.integers(1, 6))
        k = draw(st.integers(1, num_experts))
        return make_case(
            draw(st.integers(1, 6)),
            num_experts,
            k,
            draw(st.integers(max(least_dim, k), 9)),
            seed=draw(st.integers(0, 99)),
            padding=draw(st.booleans()),
            ragged=draw(st.booleans()),
        )

    return drawn()


def slow_shares(case: Case, token: int, slots: list[int]) -> list[float]:
    probabilities = case.logits[token].detach().double().softmax(-1)
    experts = [int(case.record.routing.expert[token, j]) for j in slots]
    return [float(probabilities[e] / probabilities[experts].sum()) for e in experts]


def slow_orthogonality(case: Case, form: str) -> tuple[Tensor, Tensor]:
    """Per-sequence sums and the gradient of their weighted total, by plain loops in float64."""
    leaf = case.outputs.detach().double().requires_grad_()
    sums = [torch.zeros((), dtype=torch.float64) for _ in range(case.record.batch.num_sequences)]
    for sequence, token, slots in case.rows:
        sums[sequence] = sums[sequence] + reference.overlap(
            [leaf[token, j] for j in slots],
            form="cosine" if form == "weighted" else form,
            ridge=RIDGE,
            shares=slow_shares(case, token, slots) if form == "weighted" else None,
        )
    return torch.stack(sums), weighted_gradient(torch.stack(sums), leaf)


def weighted_gradient(sums: Tensor, leaf: Tensor) -> Tensor:
    """Sequences count 1, 2, 3, ..., so that mixing them up shows."""
    total = (sums * torch.arange(1, len(sums) + 1)).sum()
    if not total.requires_grad:
        return torch.zeros_like(leaf)
    (gradient,) = torch.autograd.grad(total, leaf, allow_unused=True)
    return torch.zeros_like(leaf) if gradient is None else gradient


@every_form
@given(case=cases())
def test_orthogonality_equals_plain_loops(form: str, case: Case):
    ours = losses.orthogonality(case.record, form)
    expected, expected_gradient = slow_orthogonality(case, form)
    gradient = weighted_gradient(ours.sum, case.outputs)
    # Nearly parallel outputs leave a cosine's gradient to what fp32 resolves of the difference.
    assert_equal(ours.sum, expected, floor=1.0)
    assert gradient.isfinite().all()
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-3 if form == "span" else 1e-4, atol=1e-4)
    assert ours.count.sum() == len(case.rows)


@every_form
@pytest.mark.parametrize("k", [1, 3])
def test_one_expert_is_exactly_nothing(form: str, k: int):
    """At top_k 1, and where edges leave a token one expert of several."""
    case = make_case(5, 4, k, 7)
    edge = torch.arange(k)[None] == torch.arange(5)[:, None] % k
    case.record = replace(case.record, routing=replace(case.record.routing, edge=edge))
    ours = losses.orthogonality(case.record, form)
    assert not ours.sum.any()
    assert not weighted_gradient(ours.sum, case.outputs).any()


def test_eq_6_tends_to_squared_length_times_squared_cosine():
    case = make_case(6, 5, 3, 8)
    y = case.outputs.detach().double()
    case.record = replace(case.record, outputs=y)
    cosine = torch.nn.functional.cosine_similarity(y[:, :, None], y[:, None], dim=-1)
    limit = (y.square().sum(-1)[:, :, None] * cosine.square()).sum() - y.square().sum()
    ours = [losses.orthogonality(case.record, "projection", eps=eps).sum.sum() for eps in (1.0, 1e-3, 1e-9)]
    errors = [abs(float(value - limit)) for value in ours]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] <= 1e-7 * limit
    literal = sum(reference.overlap(list(token), form="projection", eps=1.0) for token in y)
    torch.testing.assert_close(ours[0], literal)


def test_span_identity():
    """Without the ridge: G_jj - 1 / (G^-1)_jj, and what least squares says; with it, the same to 1e-3."""
    y = torch.randn(4, 9, dtype=torch.float64)
    gram = y @ y.T
    by_inverse = gram.diagonal() - 1 / gram.inverse().diagonal()
    for j in range(4):
        others = torch.cat([y[:j], y[j + 1 :]])
        fit = others.T @ torch.linalg.lstsq(others.T, y[j]).solution
        slow = reference.squared_projection_on_span(y[j], list(others))
        torch.testing.assert_close(slow, fit @ fit)
        torch.testing.assert_close(slow, by_inverse[j])
    record = make_record(torch.arange(4)[None], 4, outputs=y.float()[None])
    torch.testing.assert_close(
        losses.orthogonality(record, "span").sum.double()[0], by_inverse.sum(), rtol=1e-3, atol=0
    )


def test_span_of_two_is_the_projection():
    case = make_case(5, 4, 2, 6)
    span, pairs = (losses.orthogonality(case.record, form).sum for form in ("span", "projection"))
    torch.testing.assert_close(span, pairs, rtol=1e-4, atol=0)


@every_form
@pytest.mark.parametrize("scale", [0.0, 1e-18, 1e-9, 1.0, 1e6])
def test_zero_and_dependent_vectors_have_finite_gradients(form: str, scale: float):
    """Tokens: all zero; one zero of three; two equal; three equal; opposite."""
    a, b, zero = torch.randn(6), torch.randn(6), torch.zeros(6)
    tokens = [[zero, zero, zero], [a, zero, b], [a, a, b], [a, a, a], [a, -a, zero]]
    outputs = (scale * torch.stack([torch.stack(rows) for rows in tokens])).requires_grad_()
    scores = torch.full((5, 3), 1 / 3)
    record = make_record(torch.arange(3).expand(5, 3), 3, outputs=outputs, scores=scores)
    values = losses.orthogonality(replace(record, batch=one_sequence_each(5)), form).sum
    assert values.isfinite().all()
    assert weighted_gradient(values, outputs).isfinite().all()
    assert values[0] == 0
    if scale == 1.0 and form == "cosine":
        cosine = float(a @ b / a.norm() / b.norm())
        expected = [0, 2 * cosine**2, 2 + 4 * cosine**2, 6, 2]
        torch.testing.assert_close(values, torch.tensor(expected), rtol=1e-5, atol=1e-5)
    if scale == 1.0 and form == "span":
        torch.testing.assert_close(values[3], 3 * a @ a, rtol=1e-4, atol=0)
        torch.testing.assert_close(values[4], 2 * a @ a, rtol=1e-4, atol=0)


def one_sequence_each(tokens: int) -> Batch:
    return Batch(sequence=torch.arange(tokens), num_sequences=tokens)


def test_lengths_do_not_matter_to_cosines():
    case = make_case(4, 5, 3, 6)
    scaled = replace(case.record, outputs=case.outputs * torch.tensor([1e-3, 1.0, 1e4])[:, None])
    for form in ("cosine", "weighted"):
        torch.testing.assert_close(losses.orthogonality(scaled, form).sum, losses.orthogonality(case.record, form).sum)
    assert losses.orthogonality(scaled, "projection").sum.sum() > 1e3


@every_form
def test_order_does_not_matter(form: str):
    """Slots, tokens and names of experts in another order: the public code's groups were k tokens of one expert."""
    case = make_case(7, 6, 3, 8, seed=4)
    record = replace(case.record, batch=Batch(sequence=torch.zeros(7, dtype=torch.long), num_sequences=1))
    expected = losses.orthogonality(record, form).sum
    slots, tokens, names = torch.tensor([2, 0, 1]), torch.randperm(7), torch.randperm(6)
    assert record.routing.scores is not None and record.outputs is not None
    for order in ("slots", "tokens", "experts"):
        expert, scores, outputs = record.routing.expert, record.routing.scores, record.outputs
        if order == "slots":
            expert, outputs = expert[:, slots], outputs[:, slots]
        elif order == "tokens":
            expert, scores, outputs = expert[tokens], scores[tokens], outputs[tokens]
        else:
            expert, scores = names[expert], scores[:, names.argsort()]
        other = make_record(expert, 6, scores=scores, outputs=outputs)
        torch.testing.assert_close(losses.orthogonality(other, form).sum, expected)


@every_form
def test_a_group_is_one_token(form: str):
    """Experts that answer all tokens alike, but unlike each other, do not overlap; the public code said they do."""
    y = torch.eye(8)[:2].expand(6, 2, 8)
    scores = torch.full((6, 2), 0.5)
    record = make_record(torch.arange(2).expand(6, 2), 2, outputs=y, scores=scores)
    assert not losses.orthogonality(record, form).sum.any()
    # and the other way round: one direction per token, shared by its experts
    same = torch.eye(8)[:6, None].expand(6, 2, 8)
    per_token = {"projection": 2.0, "cosine": 2.0, "weighted": 0.5, "span": 2.0}[form]
    value = losses.orthogonality(replace(record, outputs=same), form).sum
    torch.testing.assert_close(value, torch.tensor([6 * per_token]), rtol=1e-4, atol=0)


def test_weighted_takes_scores_and_shows_them_to_no_router():
    case = make_case(5, 4, 3, 6, ragged=True)
    value = losses.orthogonality(case.record, "weighted").sum.sum()
    (gradient,) = torch.autograd.grad(value, case.logits, allow_unused=True)
    assert gradient is None
    # Hash routers learn no scores: their weights count, by size.
    weight = torch.tensor([[2.0, -1.0, torch.nan]])
    edge = torch.tensor([[True, True, False]])
    y = torch.tensor([[[1.0, 0.0], [1.0, 1.0], [torch.nan, 5.0]]])
    record = make_record(torch.arange(3)[None], 3, outputs=y, weight=weight, edge=edge)
    expected = 2 * (2 / 3) * (1 / 3) * 0.5
    torch.testing.assert_close(losses.orthogonality(record, "weighted").sum, torch.tensor([expected]))


@every_form
def test_bf16_outputs_are_multiplied_in_fp32_under_autocast_too(form: str):
    """Off-diagonals of an orthogonal set, which bf16 sums leave at 0.17."""
    basis = torch.linalg.qr(torch.randn(3, 256, 4)).Q.mT.bfloat16()
    exact = basis.double() @ basis.double().mT
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = losses.gram(basis)
        scores = torch.full((3, 4), 0.25)
        record = make_record(torch.arange(4).expand(3, 4), 4, outputs=basis, scores=scores)
        value = losses.orthogonality(record, form).sum
    assert ours.dtype == value.dtype == torch.float32
    assert (ours - exact).abs().max() < 1e-6
    expected = losses.orthogonality(replace(record, outputs=basis.double()), form).sum
    torch.testing.assert_close(value.double(), expected, rtol=1e-3, atol=1e-9)


def test_backward_is_fp32_under_autocast():
    y = torch.randn(3, 4, 256, requires_grad=True)
    target = torch.randn(3, 4, 4)
    (expected,) = torch.autograd.grad((losses.gram(y) * target).sum(), y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (ours,) = torch.autograd.grad((losses.gram(y) * target).sum(), y)
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)


def test_gram_gradients(monkeypatch: pytest.MonkeyPatch):
    """First and second derivative in float64; chunks of one token, of two (five do not divide), of all."""
    y = torch.randn(5, 3, 4, dtype=torch.float64, requires_grad=True)
    used = torch.rand(5, 3) < 0.6
    assert used.any() and not used.all()
    masked = y.detach().masked_fill(~used[..., None], 0.0)
    for chunk in (1, 24, CPU_CHUNK):
        monkeypatch.setattr("moestro.losses.inner_products.CPU_CHUNK", chunk)
        torch.testing.assert_close(losses.gram(y), y @ y.mT)
        torch.testing.assert_close(losses.gram(y, used), masked @ masked.mT)
        assert torch.autograd.gradcheck(losses.gram, (y, used))
        assert torch.autograd.gradcheck(losses.gram, (y,))
        assert torch.autograd.gradgradcheck(losses.gram, (y,))


def test_gram_keeps_and_makes_no_copy_of_the_outputs(monkeypatch: pytest.MonkeyPatch):
    """Saved are the outputs themselves; what is made in fp32 on the way is no larger than a chunk."""
    monkeypatch.setattr("moestro.losses.inner_products.CPU_CHUNK", 2 * 3 * 16)
    y = torch.randn(10, 3, 16).bfloat16().requires_grad_()
    used = torch.ones(10, 3, dtype=torch.bool)
    kept: list[Tensor] = []
    largest = Largest(torch.float32)
    with largest, torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        losses.gram(y, used).square().sum().backward()
    large = [t for t in kept if t.dtype.is_floating_point and t.numel() >= y.numel()]
    assert [t.data_ptr() for t in large] == [y.data_ptr()]
    assert largest.numel <= 2 * 3 * 16


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """The size of the largest result of any operation in one dtype."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype, self.numel = dtype, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dtype == self.dtype:
            self.numel = max(self.numel, result.numel())
        return result


@every_form
def test_non_reentrant_checkpointing_changes_nothing(form: str):
    case = make_case(5, 4, 3, 6, padding=True, ragged=True)

    def loss(y: Tensor) -> Tensor:
        return losses.orthogonality(replace(case.record, outputs=y.tanh()), form).sum

    plain = weighted_gradient(loss(case.outputs), case.outputs)
    again = torch.utils.checkpoint.checkpoint(loss, case.outputs, use_reentrant=False)
    assert isinstance(again, Tensor)
    # The tanh before it makes NaN of zero gradients where outputs are NaN: compare where they are read.
    read = case.outputs.isfinite()
    assert plain[read].isfinite().all() and plain[read].any()
    torch.testing.assert_close(weighted_gradient(again, case.outputs)[read], plain[read], rtol=0, atol=0)


COMPILED = """
import torch
from torch import nn
from moestro import Batch, LayerRecord, MoELayer, Routing, losses

layer = MoELayer(name="l", block="0", router=nn.Identity(), experts=nn.Identity(), num_experts=4, top_k=3)
def run(y, scores, valid, form):
    routing = Routing(expert=scores.topk(3).indices, weight=scores.topk(3).values, logits=None, scores=scores)
    batch = Batch(sequence=torch.zeros(len(y), dtype=torch.long), num_sequences=1, valid=valid)
    record = LayerRecord(layer=layer, batch=batch, hidden=y[:, 0], proposed=routing, routing=routing, outputs=y)
    total = losses.orthogonality(record, form).sum + losses.variance_per_sequence(record).sum
    mean, count = losses.mean_scores(record)
    return (total + losses.variance(record, mean / count, cap=0.5).sum).sum()

torch.manual_seed(0)
for form in ("projection", "cosine", "weighted", "span"):
    fast = torch.compile(run, fullgraph=True, backend="aot_eager")
    for tokens in (6, 9) if form == "span" else (6,):  # the second size makes it compile for any
        y = torch.randn(tokens, 3, 8, requires_grad=True)
        logits, valid = torch.randn(tokens, 4, requires_grad=True), torch.rand(tokens) < 0.7
        results = []
        for function in (run, fast):
            value = function(y, logits.softmax(-1), valid, form)
            results.append((value, *torch.autograd.grad(value, (y, logits))))
        for ours, expected in zip(*results, strict=True):
            torch.testing.assert_close(ours, expected)
            assert expected.any()
print("compiled")
"""


@pytest.mark.slow
def test_compiles_without_graph_breaks(fresh_process: Callable[[str], str]):
    assert fresh_process(COMPILED).endswith("compiled\n")


# Variance.


def slow_scores(case: Case) -> tuple[Tensor, dict[int, list[Tensor]]]:
    """A float64 leaf of the logits, and the s rows made of it, by sequence."""
    leaf = case.logits.detach().double().requires_grad_()
    rows: dict[int, list[Tensor]] = {s: [] for s in range(case.record.batch.num_sequences)}
    for sequence, token, slots in case.rows:
        experts = [int(case.record.routing.expert[token, j]) for j in slots]
        rows[sequence].append(reference.sparse_scores(leaf[token].softmax(-1), experts))
    return leaf, rows


def slow_variance(case: Case, **options) -> tuple[Tensor, Tensor]:
    leaf, rows = slow_scores(case)
    sums = torch.stack(
        [
            reference.variance(rows[s], **options) * len(rows[s]) if rows[s] else torch.zeros((), dtype=torch.float64)
            for s in rows
        ]
    )
    return sums, weighted_gradient(sums, leaf)


def assert_as_slow(case: Case, ours: losses.PerSequence, expected: tuple[Tensor, Tensor]) -> None:
    assert_equal(ours.sum, expected[0], floor=0.1)
    gradient = weighted_gradient(ours.sum, case.logits)
    valid = case.record.batch.valid
    if valid is not None:  # scores were NaN there, so the softmax of this test passes on NaN
        gradient = gradient.masked_fill(~valid[:, None], 0.0)
    assert_equal(gradient, expected[1], floor=0.01)
    assert ours.count.sum() == len(case.rows)


@given(case=cases(), form=st.sampled_from(["column", "row"]), cap=st.sampled_from([None, 0.3]))
def test_variance_equals_plain_loops(case: Case, form: str, cap: float | None):
    num_experts = case.record.layer.num_experts
    mean = torch.rand(num_experts).softmax(-1)
    ours = losses.variance(case.record, mean, form, cap)
    assert_as_slow(case, ours, slow_variance(case, form=form, mean=mean.double(), cap=cap))


@given(case=cases(), form=st.sampled_from(["column", "row"]))
def test_variance_per_sequence_equals_plain_loops(case: Case, form: str):
    """The reference takes the gradient through the mean; ours does not, and has the same."""
    assert_as_slow(case, losses.variance_per_sequence(case.record, form), slow_variance(case, form=form))


@given(case=cases())
def test_mean_scores_equals_plain_loops(case: Case):
    rows = [row for of_sequence in slow_scores(case)[1].values() for row in of_sequence]
    total, count = losses.mean_scores(case.record)
    assert not total.requires_grad
    assert count == len(rows)
    if rows:
        assert_equal(total / count, reference.mean_scores(rows), floor=1.0)
    else:
        assert not total.any()


@given(case=cases())
def test_slot_scores_sum_to_one_over_edges(case: Case):
    share = losses.slot_scores(case.record).detach()
    used = {(i, j) for _, i, slots in case.rows for j in slots}
    for i in range(share.shape[0]):
        slots = [j for j in range(share.shape[1]) if (i, j) in used]
        assert float(share[i].sum()) == pytest.approx(1.0 if slots else 0.0, abs=1e-6)
        assert all(share[i, j] == 0 for j in range(share.shape[1]) if j not in slots)
        if slots:
            assert_equal(share[i, slots], torch.tensor(slow_shares(case, i, slots)))


def whole_batch(case: Case) -> tuple[LayerRecord, Tensor]:
    total, count = losses.mean_scores(case.record)
    return case.record, total / count


def test_eq_7_value_and_exact_gradient():
    """Of Eq. 7 itself, over N: E||sbar||^2 - ||s||^2 over n, and -(2 / n)(s_ij - sbar_j) / N; not (N-1)/N of that."""
    case = make_case(8, 5, 2, 4)
    record, mean = whole_batch(case)
    leaf, rows = slow_scores(case)
    s = torch.stack([row for of_sequence in rows.values() for row in of_sequence])
    sbar = s.mean(0)
    ours = losses.variance(record, mean).sum.sum() / 8
    by_moments = -(s.square().sum(-1).mean() - sbar.square().sum()) / 5
    torch.testing.assert_close(ours.double(), by_moments, rtol=1e-5, atol=0)
    (by_formula,) = torch.autograd.grad(s, leaf, -(2 / 5) * (s - sbar).detach() / 8, retain_graph=True)
    (by_autograd,) = torch.autograd.grad(by_moments, leaf)
    torch.testing.assert_close(by_formula, by_autograd)
    (gradient,) = torch.autograd.grad(ours, case.logits)
    # `rows` is ordered by sequence, but a gradient of the mean does not mind.
    assert_equal(gradient, by_formula)
    assert gradient.any()


def test_shards_with_the_whole_batchs_mean_give_the_whole_gradient():
    case = make_case(9, 5, 2, 4, ragged=True)
    record, mean = whole_batch(case)
    (whole,) = torch.autograd.grad(losses.variance(record, mean).sum.sum(), case.logits, retain_graph=True)
    parts = [slice(0, 2), slice(2, 3), slice(3, 9)]
    shards = [shard(record, part) for part in parts]
    statistics = [losses.mean_scores(one) for one in shards]
    reduced = sum(total for total, _ in statistics) / sum(count for _, count in statistics)
    torch.testing.assert_close(reduced, mean)
    total = torch.zeros_like(whole)
    for one in shards:
        total += torch.autograd.grad(losses.variance(one, reduced).sum.sum(), case.logits, retain_graph=True)[0]
    assert_equal(total, whole)


def shard(record: LayerRecord, part: slice) -> LayerRecord:
    routing = record.routing
    assert routing.scores is not None
    return make_record(
        routing.expert[part],
        record.layer.num_experts,
        scores=routing.scores[part],
        edge=None if routing.edge is None else routing.edge[part],
    )


def test_no_gradient_flows_into_the_mean():
    case = make_case(4, 5, 2, 4)
    mean = torch.full((5,), 0.2, requires_grad=True)
    (gradient,) = torch.autograd.grad(losses.variance(case.record, mean).sum.sum(), mean, allow_unused=True)
    assert gradient is None


def one_hot(choice: list[int], num_experts: int) -> LayerRecord:
    first = torch.tensor(choice)
    expert = torch.stack([first, (first + 1) % num_experts], dim=-1)
    scores = torch.nn.functional.one_hot(first, num_experts).float()
    return make_record(expert, num_experts, scores=scores)


def test_collapse_scores_nothing_by_column_and_all_by_row():
    """All tokens on one expert against one-hot tokens that are balanced over four."""
    collapsed, balanced = one_hot([2] * 8, 4), one_hot([0, 1, 2, 3] * 2, 4)
    values = {}
    for name, record in (("collapsed", collapsed), ("balanced", balanced)):
        total, count = losses.mean_scores(record)
        for form in ("column", "row"):
            values[name, form] = float(losses.variance(record, total / count, form).sum[0]) / 8
            assert values[name, form] == float(losses.variance_per_sequence(record, form).sum[0]) / 8
    assert values["collapsed", "column"] == 0.0
    assert values["balanced", "column"] == pytest.approx(-(1 - 1 / 4) / 4)
    assert values["collapsed", "row"] == values["balanced", "row"] == pytest.approx(-(1 - 1 / 4) / 4)


def test_cap_stops_the_push_of_decided_tokens():
    logits = torch.tensor([[4.0, 0.0, -9.0], [0.3, 0.0, -9.0]], requires_grad=True)
    record = make_record(torch.tensor([[0, 1], [0, 1]]), 3, scores=logits.softmax(-1))
    mean, cap = torch.full((3,), 1 / 3), 0.4
    free, capped = losses.variance(record, mean).sum, losses.variance(record, mean, cap=cap).sum
    assert free < capped < 0
    (gradient,) = torch.autograd.grad(capped.sum(), logits)
    assert not gradient[0].any() and gradient[1].any()


@given(case=cases())
def test_one_expert_per_token_gives_the_router_no_gradient(case: Case):
    edge = torch.arange(case.record.routing.expert.shape[1]).eq(0).expand(case.record.routing.expert.shape)
    record = replace(case.record, routing=replace(case.record.routing, edge=edge))
    gradient = torch.autograd.grad(losses.variance_per_sequence(record).sum.sum(), case.logits)[0]
    assert (gradient[gradient.isfinite()].abs() < 1e-6).all()  # rounding of 1 / s - s / s^2


def test_vanished_scores_stay_finite():
    """A selection bias may choose experts whose scores underflow."""
    logits = torch.tensor([[200.0, 0.0, 0.0], [45.0, 0.0, 1.0]], requires_grad=True)
    record = make_record(torch.tensor([[1, 2], [1, 2]]), 3, scores=logits.softmax(-1))
    value = losses.variance_per_sequence(record).sum
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    assert value.isfinite().all() and gradient.isfinite().all()
    assert losses.slot_scores(record)[1].sum().item() == pytest.approx(1.0)


def test_garbage_in_unused_slots_is_not_read():
    """Numbers of experts too: out of range where a slot is no edge."""
    case = make_case(4, 5, 3, 6)
    edge = torch.tensor([[True, True, False]]).expand(4, 3)
    results = []
    for garbage in (0, -7, 99):
        expert = torch.cat([case.record.routing.expert[:, :2], torch.full((4, 1), garbage)], dim=-1)
        record = replace(case.record, routing=replace(case.record.routing, expert=expert, edge=edge))
        values = [losses.orthogonality(record, form).sum for form in FORMS]
        values += [losses.variance_per_sequence(record).sum, losses.mean_scores(record)[0]]
        results.append(torch.cat(values))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


# Losses on weights.


@given(num_experts=st.integers(1, 6), dim=st.integers(1, 7), zero=st.booleans(), seed=st.integers(0, 9))
def test_weight_losses_equal_plain_loops(num_experts: int, dim: int, zero: bool, seed: int):
    weight = torch.randn(num_experts, dim, generator=torch.Generator().manual_seed(seed))
    if zero:
        weight[0] = 0.0
    for name in ("router_orthogonality", "simbal"):
        ours, slow = weight.clone().requires_grad_(), weight.double().requires_grad_()
        value, expected = getattr(losses, name)(ours), getattr(reference, name)(slow)
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-5)
        gradient, expected_gradient = weighted_gradient(value[None], ours), weighted_gradient(expected[None], slow)
        torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-4, atol=1e-5)


def test_weight_losses_at_orthonormal_equal_and_zero_rows():
    orthonormal = torch.linalg.qr(torch.randn(9, 4)).Q.T
    assert losses.simbal(orthonormal).item() == pytest.approx(0.0, abs=1e-5)
    assert losses.router_orthogonality(3 * orthonormal).item() == pytest.approx(0.0, abs=1e-6)
    assert losses.simbal(3 * orthonormal).item() == pytest.approx(4 * 8, rel=1e-5)
    assert losses.router_orthogonality(torch.ones(4, 9)).item() == pytest.approx(12 / 16)
    zeros = torch.zeros(4, 9, requires_grad=True)
    value = losses.router_orthogonality(zeros)
    value.backward()
    assert value.item() == pytest.approx(4 / 16)
    assert zeros.grad is not None and not zeros.grad.any()


@pytest.mark.parametrize("name", ["router_orthogonality", "simbal"])
def test_weight_losses_are_fp32_under_autocast(name: str):
    weight = torch.randn(6, 64)
    expected = getattr(losses, name)(weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(getattr(losses, name)(weight), expected)
    rounded = weight.bfloat16()
    assert torch.equal(getattr(losses, name)(rounded), getattr(losses, name)(rounded.float()))


# What the user reads.


@pytest.mark.usefixtures("unchecked")
def test_misuse():
    case = make_case(3, 4, 2, 5)
    mean = torch.full((4,), 0.25)
    hashed = replace(case.record, routing=replace(case.record.routing, scores=None))
    wrong: dict[str, Callable] = {
        "form must be one of cosine, weighted, projection, span, got 'angle'": lambda: losses.orthogonality(
            case.record, "angle"
        ),
        "eps must be above 0, got 0.0": lambda: losses.orthogonality(case.record, "projection", eps=0.0),
        "form must be one of column, row, got 'both'": lambda: losses.variance(case.record, mean, "both"),
        "cap must be above 0, got -1.0": lambda: losses.variance_per_sequence(case.record, cap=-1.0),
        "variance needs a router that learns its scores, but layer has none: set it to 0": lambda: losses.variance(
            hashed, mean
        ),
    }
    for message, call in wrong.items():
        with pytest.raises(Misuse) as error:
            call()
        assert str(error.value) == message
    with pytest.raises(AssertionError, match="without outputs"):
        losses.orthogonality(replace(case.record, outputs=None), "cosine")
