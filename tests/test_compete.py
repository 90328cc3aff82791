"""Competition against plain loops: winners, weights, losses and every gradient, for presets and what lies between."""

from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from competing import OneLayer, batch, observed, run
from moestro import AuxLosses, Compete, Misuse, observe, reference
from moestro.competition.inference import sample_statistics
from moestro.competition.presets import PRESETS
from moestro.competition.scaling import response_sums, scaled, statistics_of
from moestro.competition.settings import Scale
from moestro.losses import distillation

RULES = st.sampled_from(
    [{}, {"renormalise": False}, {"scores": "sigmoid", "scale": 2.5}, {"scores": "sigmoid", "selection_bias": True}]
)


def known(aux: AuxLosses, num_experts: int, name: str = "layer") -> dict[str, list[float]]:
    """Give the layer statistics of responses, as if it had seen some: returns mean, deviation and offset."""
    generator = torch.Generator().manual_seed(7)
    mean = 1 + torch.rand(num_experts, generator=generator, dtype=torch.float64)
    std = 0.3 + torch.rand(num_experts, generator=generator, dtype=torch.float64)
    offset = torch.randn(num_experts, generator=generator, dtype=torch.float64)
    sums = torch.stack([torch.ones_like(mean), mean, mean.square() + std.square()])
    aux.load_state_dict({"steps": 3, "layers": {name: {"responses": sums.tolist(), "offset": offset.tolist()}}})
    return {"mean": mean.tolist(), "std": std.tolist(), "offset": offset.tolist()}


def expected(
    model: OneLayer, aux: AuxLosses, competes: list[bool], statistics: dict, rule: dict, **inputs: Any
) -> dict[str, torch.Tensor]:
    """Loss and gradients of the same pass in plain loops."""
    assert aux.compete is not None
    model.zero_grad()
    settings = {f: getattr(aux.compete, f) for f in ("response", "temperature", "target", "weights", "forward")}
    output, contests = reference.competing_layer(
        model.embed(inputs["input_ids"]).flatten(0, 1),
        model.layer.router.weight,
        model.experts(),
        competes,
        response_scale=aux.compete.response_scale,
        through_weights=aux.compete.through_weights,
        top_k=model.layer.router.top_k,
        **{name: value for name, value in rule.items() if name != "selection_bias"},
        **settings,
        **statistics,
    )
    rows, length = inputs["input_ids"].shape
    weight = model.direction[:rows, :length] * inputs["attention_mask"].unsqueeze(-1)
    loss = (output.view(rows, length, -1) * weight).sum()
    for row in range(rows):
        met = [contest for contest in contests[row * length : (row + 1) * length] if contest is not None]
        taught = reference.distillation(met, aux.distillation_form, aux.distillation_winners)
        loss = loss + (aux.distillation * taught + aux.diversity * reference.diversity(met, aux.diversity_form)) / rows
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **gradients}


def assert_as_in_plain_loops(aux: AuxLosses, model: OneLayer, rule: dict, **inputs: torch.Tensor) -> None:
    statistics = known(aux, model.layer.router.num_experts) if aux.compete.response_scale != "none" else {}
    ours, (record,) = run(model, aux, **inputs)
    competition = record.competition
    competes = torch.zeros(inputs["input_ids"].numel(), dtype=torch.bool)
    competes[competition.token[competition.filled]] = True
    assert not (competes & (inputs["attention_mask"].flatten() == 0)).any()
    truth = expected(model, aux, competes.tolist(), statistics, rule, **inputs)
    assert ours.keys() == truth.keys()
    for name, value in truth.items():
        difference = (ours[name] - value).norm() / value.norm().clamp_min(0.1)  # where it should be 0: rounding
        assert difference < 1e-4, f"{name}: {difference:.1e}"


SIZES = {
    "rows": st.integers(1, 3),
    "length": st.integers(1, 6),
    "experts": st.integers(1, 5),
    "seed": st.integers(0, 99),
}


@pytest.mark.parametrize("name", PRESETS)
@settings(deadline=None, max_examples=8)
@given(**SIZES, k=st.integers(1, 3), rule=RULES, padded=st.booleans())
def test_presets_are_what_plain_loops_make_of_them(name, rows, length, experts, k, rule, padded, seed):
    model = OneLayer(experts, min(k, experts), seed, **rule).train()
    aux = AuxLosses(**PRESETS[name](1))
    aux.compete = replace(aux.compete, rate=1.0, max_layers=None, tie_break=0.0)
    if min(k, experts) == 1:
        aux.diversity = 0.0  # which is refused there
    assert_as_in_plain_loops(aux, model, rule, **batch(rows, length, seed, padded))


@settings(deadline=None, max_examples=40)
@given(
    **SIZES,
    response=st.sampled_from(["l2", "rms", "softplus", "relu", "silu", "sigmoid"]),
    scale=st.sampled_from(get_args(Scale)),
    target=st.sampled_from(["experts", "winners"]),
    weights=st.sampled_from(["softmax", "share", "router"]),
    through=st.booleans(),
    forward=st.booleans(),
    form=st.sampled_from(["kl", "mse", "relative-mse"]),
    rate=st.sampled_from([0.2, 0.5, 1.0]),
    rule=RULES,
)
def test_what_lies_between_the_presets(
    rows, length, experts, seed, response, scale, target, weights, through, forward, form, rate, rule
):
    if scale == "log" and response == "silu":
        response = "softplus"
    if weights == "share" and (scale in ("standard", "log") or response == "silu"):
        weights = "softmax"
    compete = Compete(
        response=response,
        response_scale=scale,
        balance_winners=0.1 if scale in ("standard", "log") else 0.0,
        temperature=0.7,
        target=target,
        weights=weights,
        through_weights=through and forward and weights != "router",
        forward=forward,
        rate=rate,
        tie_break=0.0,
    )
    aux = AuxLosses(distillation=0.3, distillation_form=form, distillation_winners=0.5, compete=compete)
    model = OneLayer(experts, min(2, experts), seed, **rule).train()
    assert_as_in_plain_loops(aux, model, rule, **batch(rows, length, seed, padded=True))


def one_competing(**options: Any) -> tuple[OneLayer, AuxLosses]:
    """A layer in which every token competes, and nothing else is learned."""
    compete = Compete(**({"response_scale": "none", "balance_winners": 0.0, "rate": 1.0, "tie_break": 0.0} | options))
    return OneLayer().train(), AuxLosses(compete=compete)


def test_the_task_does_not_reach_the_router_from_competing_tokens():
    inputs = batch(2, 5)
    model, aux = one_competing()
    gradients, _ = run(model, aux, **inputs)
    assert not gradients.get("layer.router.weight", torch.zeros(1)).any()
    gradients, _ = run(*one_competing(weights="router"), **inputs)
    assert gradients["layer.router.weight"].any()
    gradients, _ = run(*one_competing(forward=False), **inputs)
    assert gradients["layer.router.weight"].any()
    gradients, _ = run(*one_competing(rate=0.5), **inputs)
    assert gradients["layer.router.weight"].any()


@pytest.mark.parametrize("balance", [False, True])
def test_balance_reaches_the_router_from_competing_tokens_where_asked(balance: bool):
    model, aux = one_competing(balance_competing=balance)
    aux.balance = 1.0
    gradients, _ = run(model, aux, **batch(2, 5))
    assert bool(gradients.get("layer.router.weight", torch.zeros(1)).any()) == balance


def test_nobody_competes_in_evaluation_without_gradients_or_before_and_after_its_time():
    inputs = batch(2, 5)
    for mode in (True, False):
        model, aux = one_competing()
        with aux.attach(model.train(mode)), torch.set_grad_enabled(not mode):
            records = observed(model, inputs)
        assert records[0].competition is None
        assert torch.equal(records[0].routing.expert, records[0].proposed.expert)
    model, aux = one_competing(start_step=1, end_step=2)
    met = []
    with aux.attach(model):
        for _ in range(3):
            met.append(observed(model, inputs)[0].competition is not None)
            aux.step()
    assert met == [False, True, False]


def test_frozen_inputs_compete():
    model, aux = one_competing()
    model.embed.requires_grad_(False)
    gradients, (record,) = run(model, aux, **batch(2, 5))
    assert record.competition is not None
    assert not record.hidden.requires_grad
    assert gradients["layer.experts.down_proj"].any()


def test_losers_build_no_graph_and_get_no_gradient():
    model, aux = one_competing(through_weights=True)
    gradients, (record,) = run(model, aux, **batch(1, 2))
    won = torch.zeros(4, dtype=torch.bool)
    won[record.competition.winner.flatten()] = True
    assert not record.competition.response.requires_grad
    touched = gradients["layer.experts.down_proj"].flatten(1).any(1)
    assert torch.equal(touched, won)


@pytest.mark.parametrize("form", ["kl", "mse", "relative-mse"])
def test_the_target_is_taken_as_given(form: str):
    model, aux = one_competing()
    _, (record,) = run(model, aux, **batch(2, 5))
    target = record.competition.target.clone().requires_grad_()
    proposed = replace(record.proposed, logits=(logits := record.proposed.logits.detach().requires_grad_()))
    proposed = replace(proposed, scores=logits.softmax(-1))
    record = replace(record, proposed=proposed, competition=replace(record.competition, target=target))
    distillation(record, form, winners=0.5).sum.sum().backward()
    assert logits.grad.abs().sum() > 0
    assert target.grad is None


def test_where_responses_need_a_scale_the_first_step_only_looks():
    model, aux = one_competing(response_scale="standard")
    aux.distillation = 1.0
    inputs = batch(2, 6)
    with aux.attach(model):
        first = observed(model, inputs)[0]
        aux.step()
        second = observed(model, inputs)[0]
    assert first.competition.target is None
    assert torch.equal(first.routing.expert, first.proposed.expert)
    response = first.competition.response
    z = (response - response.mean(0)) / response.std(0, correction=0)
    torch.testing.assert_close(second.competition.target, z.softmax(-1), rtol=1e-3, atol=1e-4)


def test_copies_of_one_expert_win_alike_by_chance():
    """Freshly upcycled experts respond alike: the first k of them must not win everywhere."""
    model, aux = one_competing(tie_break=1e-3)
    with torch.no_grad():
        for weight in model.layer.experts.parameters():
            weight.copy_(weight[:1].clone().expand_as(weight))
    _, (record,) = run(model, aux, **batch(8, 64))
    wins = torch.bincount(record.competition.winner.flatten(), minlength=4) / record.competition.winner.numel()
    assert wins.min() > 0.2
    assert wins.max() < 0.3
    target = record.competition.target
    torch.testing.assert_close(target, torch.full_like(target, 0.25), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"forward": False}, {"by": "steps"}, {"through_weights": True}])
def test_no_cut_of_the_batch_changes_gradients(options: dict):
    """The third optimiser step, whose scale of responses and offsets are those of the steps before."""
    inputs = batch(4, 12, padded=True)
    aux = {"distillation": 0.5, "diversity": 0.0 if options.get("forward") is False else 0.3}
    found = []
    for rows in (4, 2, 1):
        model = OneLayer().train()
        losses = AuxLosses(**aux, compete=Compete(**({"rate": 0.4} | options)))
        parts = [{name: value[i : i + rows] for name, value in inputs.items()} for i in range(0, 4, rows)]
        offsets = range(0, 4, rows)
        with losses.attach(model, add_to_loss=False):
            for _ in range(3):
                model.zero_grad()
                for offset, part in zip(offsets, parts, strict=True):
                    loss = model(**part, offset=offset).loss
                    (loss + losses.total() * rows / 4).backward()  # each pass thinks that it is the whole batch
                losses.step()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for name, value in other.items():
            torch.testing.assert_close(value, found[0][name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"response": "loud"}, "response must be one of l2, rms, softplus, relu, silu, sigmoid, got 'loud'"),
        ({"rate": 0.0}, "rate must be above 0, got 0.0"),
        ({"response": 3}, "response must be a name or a function of outputs, got 3"),
        ({"temperature": 0.0}, "temperature must be above 0, got 0.0"),
        ({"temperature": float("inf")}, "temperature must be a number above 0, got inf"),
        ({"tie_break": float("inf")}, "tie_break must be a number of at least 0, got inf"),
        ({"max_layers": 3}, "max_layers requires by = steps, got by = tokens: set by to steps, or max_layers to none"),
        ({"by": "steps", "max_layers": 0}, "max_layers must be at least 1, got 0"),
        ({"start_step": -1}, "start_step must be at least 0, got -1"),
        ({"balance_winners": -0.1}, "balance_winners must be at least 0, got -0.1"),
        ({"balance_winners": float("inf")}, "balance_winners must be a number of at least 0, got inf"),
        ({"response_scale": "mean"}, "balance_winners needs response_scale = standard or log, got mean"),
        ({"response": "silu", "response_scale": "log"}, "response_scale = log needs a response that is never negative"),
        ({"weights": "share"}, "weights = share needs one of the responses"),
        ({"start_step": 2, "end_step": 2}, "end_step must lie after start_step"),
        ({"through_weights": True, "forward": False}, "through_weights needs forward"),
    ],
)
def test_settings_that_cannot_work_are_refused(options, message, unchecked):
    with pytest.raises(Misuse, match=message):
        Compete(**options)


def test_losses_without_competition_are_refused():
    with pytest.raises(Misuse, match="set compete"):
        AuxLosses(distillation=0.1)
    with pytest.raises(Misuse, match="set forward"):
        AuxLosses(diversity=0.1, compete=Compete(forward=False))


def test_experts_win_equally_often_after_a_while():
    """Each step moves the offsets by what was won by all tokens that competed in it."""
    model, inputs, apart = OneLayer(8, 2).train(), batch(8, 32, padded=True), {}
    for rate in (0.0, 0.1):
        aux, records = AuxLosses(compete=Compete(rate=1.0, balance_winners=rate)), []
        offset, late, mean, std = torch.zeros(8), torch.zeros(8), None, None
        with aux.attach(model), observe(model, records.append):
            for step in range(80):
                model(**inputs)
                aux.step()
                contest = records.pop().competition
                length = contest.response[contest.filled].log()
                if contest.winner is not None:  # the first step only looks
                    wins = torch.bincount(contest.winner[contest.filled].flatten(), minlength=8)
                    within = ((length - mean) / std).std(-1, correction=0).mean()
                    offset = offset - rate * within * (wins / wins.float().mean() - 1)
                    late += wins if step >= 40 else 0
                mean, std = length.mean(0), length.std(0, correction=0)  # the same text in every step
                assert aux.state_dict()["layers"]["layer"]["offset"] == pytest.approx(offset.tolist(), abs=1e-4)
        apart[rate] = (late.max() / late.mean() - 1).item()
    assert apart[0.0] > 0.2
    assert apart[0.1] < 0.05


def test_copies_of_one_expert_win_alike_by_chance_by_default_too():
    """As after upcycling: no accident of a step is blown up by the balance of wins."""
    model, records = OneLayer(8, 2).train(), []
    with torch.no_grad():
        for weight in (model.layer.experts.gate_up_proj, model.layer.experts.down_proj):
            weight.copy_(weight[:1].expand_as(weight))
    aux = AuxLosses(compete=Compete(rate=1.0))
    with aux.attach(model), observe(model, records.append):
        for step in range(12):
            model(**batch(8, 32, seed=step))
            aux.step()
    wins = [torch.bincount(r.competition.winner.flatten(), minlength=8) for r in records[1:]]
    assert all(w.max() / w.float().mean() < 1.5 for w in wins)


@pytest.mark.parametrize("k", [1, 2, 8])
def test_offsets_of_a_sample_let_all_experts_win_it_equally_often(k):
    normal, tails = torch.randn(4000, 8, generator=torch.Generator().manual_seed(0)), torch.linspace(0.3, 3, 8)
    response = (normal.sign() * normal.abs() ** tails).exp()
    apart = []
    for rate in (0.0, 0.1):
        found = sample_statistics(response, Compete(balance_winners=rate), k)
        wins = torch.bincount(scaled(response, "log", found).topk(k).indices.flatten(), minlength=8)
        apart.append((wins.max() / wins.float().mean() - 1).item())
    assert apart[1] < 0.15  # they are found by every second token
    assert apart[0] > 0.3 or k == 8


def test_what_nobody_responded_to_is_not_scaled():
    """A step whose tokens were all padding teaches no scale, and nothing becomes NaN by it."""
    response = torch.rand(3, 4)
    none = statistics_of(response_sums(response, torch.zeros(3, dtype=torch.bool), "standard"))
    assert torch.equal(scaled(response, "mean", none), response)
    torch.testing.assert_close(scaled(response, "standard", none), response - 1)
    assert all(scaled(response, scale, none).isfinite().all() for scale in get_args(Scale))


@pytest.mark.parametrize(
    ("respond", "message"),
    [
        (lambda output: output, "response must make"),
        (lambda output: output.norm(dim=-1, keepdim=True), "response must make"),
        (lambda output: output.argmax(-1), "response must make"),
        (lambda output: 1.0, "response must make"),
        (lambda output: -output.norm(dim=-1), "never negative, got -"),
    ],
)
def test_functions_of_ones_own_that_are_no_responses_are_refused(respond, message, unchecked):
    model, aux = OneLayer().train(), AuxLosses(compete=Compete(response=respond))
    with aux.attach(model), pytest.raises(Misuse, match=message):
        model(**batch(2, 8))


def trained(
    model: OneLayer, rows: int, length: int, steps: int, learning_rate: float = 0.0
) -> tuple[float, float, Tensor]:
    """The largest offset and the surest target there ever were, and the wins of the second half of the steps."""
    aux, records, largest, wins = AuxLosses(balance=1e-2, distillation=0.1, compete=Compete()), [], 0.0, torch.zeros(8)
    surest = 0.0
    optimizer = torch.optim.Adam(model.parameters(), learning_rate)
    with aux.attach(model), observe(model, records.append):
        for step in range(steps):
            model(**batch(rows, length, seed=step)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            aux.step()
            found, record = aux.state_dict()["layers"]["layer"].get("offset", [0.0]), records.pop()
            largest = max(largest, *map(abs, found))
            if record.competition.target is not None:
                surest = max(surest, float(record.competition.target.max()))
            if step >= steps // 2:
                wins += torch.bincount(record.competition.winner.flatten(), minlength=8)
    return largest, surest, wins


def test_one_competing_token_a_step_says_no_scale_by_itself():
    """Of one token there is no deviation: whatever came next would be a million of them away."""
    largest, surest, wins = trained(OneLayer(8, 2).train(), rows=1, length=16, steps=100)
    assert largest < 2
    assert surest < 0.99
    assert wins.min() > 0


def test_experts_that_begin_at_zero_do_not_blow_offsets_up():
    model = OneLayer(8, 2).train()
    torch.nn.init.zeros_(model.layer.experts.down_proj)
    largest, _, wins = trained(model, rows=8, length=64, steps=100, learning_rate=1e-3)
    assert largest < 3
    assert wins.min() > 0


def test_no_cut_of_the_batch_changes_which_tokens_balance_the_router():
    """Rows of the competition that no token of a shorter sequence fills name any tokens: those are not cut off."""
    inputs, rule = (
        batch(4, 12, padded=True),
        Compete(rate=0.4, balance_competing=False, response_scale="none", balance_winners=0.0),
    )

    def gradient(rows: int) -> Tensor:
        model, aux = OneLayer().train(), AuxLosses(balance=1.0, compete=rule)
        with aux.attach(model, add_to_loss=False):
            for start in range(0, 4, rows):
                model(**{name: value[start : start + rows] for name, value in inputs.items()}, offset=start)
                total = aux.total()
                assert total is not None
                (total * rows / 4).backward()
        assert model.layer.router.weight.grad is not None
        return model.layer.router.weight.grad

    whole = gradient(4)
    for rows in (2, 1):
        torch.testing.assert_close(gradient(rows), whole, rtol=1e-4, atol=1e-6)


def test_a_response_that_overflowed_is_left_out():
    """Of one token at one expert: the token does not compete, and no later step hears of it."""
    model, inputs, calls = OneLayer().train(), batch(4, 16), [0]

    def respond(output: Tensor) -> Tensor:
        found = output.norm(dim=-1)
        calls[0] += 1
        return found.index_put((torch.tensor(0), torch.tensor(1)), torch.tensor(torch.inf)) if calls[0] == 2 else found

    aux, records = AuxLosses(distillation=0.1, compete=Compete(rate=0.5, response=respond)), []
    with aux.attach(model), observe(model, records.append):
        for _ in range(4):
            model.zero_grad()
            model(**inputs).loss.backward()
            assert model.layer.router.weight.grad is not None
            assert bool(model.layer.router.weight.grad.isfinite().all())
            aux.step()
    assert [int(record.competition.filled.sum()) for record in records] == [32, 31, 32, 32]


def test_a_selection_bias_is_moved_by_what_it_can_move():
    """Not by what the winners make of the load: no bias would ever even that out."""
    found = {}
    for rate in (None, 1.0):
        model = OneLayer(8, 2, scores="sigmoid", selection_bias=True).train()
        aux = AuxLosses(bias_rate=1e-2, compete=rate and Compete(rate=rate, balance_winners=0.0))
        with aux.attach(model):
            for _ in range(30):
                model(**batch(8, 32))
                aux.step()
        found[rate] = model.layer.router.e_score_correction_bias.clone()
    assert torch.equal(found[1.0], found[None])


def test_the_state_outlives_the_attachment_and_is_forgotten_where_another_is_loaded():
    model, rule = OneLayer().train(), Compete(rate=1.0)
    aux = AuxLosses(compete=rule)
    with aux.attach(model):
        for _ in range(2):
            model(**batch(4, 8))
            aux.step()
        inside = aux.state_dict()
        aux.load_state_dict({"steps": 0, "layers": {}})
        assert "responses" not in aux.state_dict()["layers"]["layer"]
        aux.load_state_dict(inside)
    assert aux.state_dict() == inside
    assert set(inside["layers"]["layer"]) == {"load", "responses", "offset"}
    other = AuxLosses(compete=rule)
    other.load_state_dict(inside)
    assert other.state_dict() == inside


def test_diversity_alone_has_a_graph_before_anybody_won():
    model, aux = OneLayer().train(), AuxLosses(diversity=0.1, compete=Compete(rate=0.5))
    with aux.attach(model, add_to_loss=False):
        model(**batch(2, 8))
        total = aux.total()
        assert total is not None
        total.backward()
