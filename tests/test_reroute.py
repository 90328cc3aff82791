"""Rerouting any attached model by its family's own rule."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import peft
import pytest
import tiny_models
import torch
from attach.building import roughen
from attach.checks import ATTACHED
from torch import Tensor, nn

from agreement import CPU_BACKENDS, small_model, some_ids
from moestro import AuxLosses, MoE, RouterRule, Routing
from moestro.adapters import moe_layers, observe, reroute
from moestro.errors import Misuse
from moestro.perturbations import add_noise, disable, largest, random_normal, replace_at_random
from moestro.routers import route
from moestro.routing import LayerRecord, Proposal

# One of every way to choose: by topk of scores, of logits, with biases, within groups, by maxima, by the block, with a
# class more than there are experts, with shared experts among the scores, by a table.
QUICK = [
    "mixtral",
    "gpt_oss",
    "afmoe",
    "deepseek_v3",
    "mistral4",
    "axk2",
    "phimoe",
    "dbrx",
    "zaya",
    "inkling",
    "deepseek_v4",
    "gemma4",
    "kolibri1",
    "granitemoe",
    "muse_spark",
]
BY_MAXIMA = "phimoe"  # its weights compare a score with the best of the others

every_package = pytest.mark.parametrize(
    "package", [pytest.param(p, marks=() if p in QUICK else pytest.mark.slow) for p in ATTACHED]
)
pytestmark = pytest.mark.filterwarnings("ignore")


def built(package: str) -> tuple[Any, dict[str, Tensor]]:
    """A tiny model in evaluation mode, and its inputs: two rows, the second padded."""
    tiny = tiny_models.build(package, padded=True)
    roughen(moe_layers(tiny.model))
    return tiny.model.eval(), tiny.inputs


def run(model: nn.Module, rule: Any, inputs: dict[str, Tensor]) -> tuple[Any, list[LayerRecord]]:
    """One pass under a reroute: the output, and the records of rerouted layers."""
    records: list[LayerRecord] = []
    with torch.no_grad(), reroute(model, rule), observe(model, records.append):
        output = model(**inputs)
    return output, records


def learned(model: nn.Module, rule: Any) -> dict[str, Any]:
    """The rule for every layer whose choice is not looked up."""
    return {layer.name: rule for layer in moe_layers(model) if layer.scores is not None}


def valid(record: LayerRecord) -> list[int]:
    kept = record.batch.valid
    return list(range(len(record.hidden))) if kept is None else kept.nonzero().flatten().tolist()


def edges(routing: Routing, token: int) -> dict[int, float]:
    """Weight by expert of one token."""
    slots = range(routing.expert.shape[1]) if routing.edge is None else routing.edge[token].nonzero().flatten().tolist()
    pairs = [(int(routing.expert[token, slot]), float(routing.weight[token, slot])) for slot in slots]
    assert len(dict(pairs)) == len(pairs), "an expert is chosen twice"
    return dict(pairs)


def groups_of(router: nn.Module) -> tuple[int, int]:
    """Groups, and groups that a token's experts come from."""
    if getattr(router, "topk_method", None) == "greedy":
        return 1, 1
    return int(getattr(router, "num_group", None) or 1), int(getattr(router, "topk_group", None) or 1)


def expected_of_groups(record: LayerRecord, token: int, banned: int) -> set[int]:
    """A token's experts without the banned one, in plain Python, by group and then by score."""
    layer, logits = record.layer, record.proposed.logits
    assert logits is not None
    score = (logits[token].softmax(-1) if layer.scores == "softmax" else logits[token].sigmoid()).tolist()
    bias = [0.0] * layer.num_experts if layer.selection_bias is None else layer.selection_bias.tolist()
    select = {e: s + b for e, (s, b) in enumerate(zip(score, bias, strict=True)) if e != banned}
    groups, best = groups_of(layer.router)
    size = layer.num_experts // groups
    own = [sorted((s for e, s in select.items() if e // size == group), reverse=True) for group in range(groups)]
    kept = sorted(range(groups), key=lambda group: -sum(own[group][:2]) if own[group] else math.inf)[:best]
    return set(sorted((e for e in select if e // size in kept), key=lambda e: -select[e])[: layer.top_k])


def wrong_with_disabled(package: str, record: LayerRecord, token: int) -> str | None:
    """What is wrong with one token whose first expert was disabled."""
    before, after = edges(record.proposed, token), edges(record.routing, token)
    if not before:
        return None  # it skips the experts
    first = max(before, key=lambda e: before[e])
    grouped = groups_of(record.layer.router)[0] > 1
    if first in after:
        return f"the disabled expert {first} runs"
    if len(after) != len(before) and package != "zaya":  # whose token may skip experts instead
        return f"{len(after)} experts instead of {len(before)}"
    kept = before.keys() & after.keys()
    if not grouped and kept != before.keys() - {first}:
        return f"of {sorted(before)} without {first} only {sorted(kept)} stay"
    if grouped and after.keys() != expected_of_groups(record, token, first):
        return f"chose {sorted(after)}, not {sorted(expected_of_groups(record, token, first))}"
    ratios = [after[e] / before[e] for e in kept]
    if kept and max(ratios) / min(ratios) > 1 + 1e-4:
        return f"weights of kept experts changed by {sorted(ratios)}"
    return None


@every_package
def test_disabling_the_first_expert_selects_by_the_familys_own_rule(package: str) -> None:
    model, inputs = built(package)
    output, records = run(model, learned(model, disable()), inputs)
    assert output.logits.isfinite().all()
    rerouted = [record for record in records if record.layer.scores is not None]
    assert len(rerouted) >= 2
    for record in rerouted:
        for token in valid(record):
            assert (wrong := wrong_with_disabled(package, record, token)) is None, f"{record.layer.name}: {wrong}"
        assert wrong_with_sums(package, record) is None
    assert all(torch.equal(r.routing.expert, r.proposed.expert) for r in records if r.layer.scores is None)


def wrong_with_sums(package: str, record: LayerRecord) -> str | None:
    """A family that gives all tokens the same sum of weights does so still."""
    before, after = record.proposed, record.routing
    scale = getattr(record.layer.router, "per_expert_scale", None)
    divided = lambda r: r.weight if scale is None else r.weight / scale[r.expert]
    sums, now = divided(before).sum(-1), divided(after).sum(-1)
    if package in ("zaya", BY_MAXIMA) or float(sums.max() - sums.min()) > 1e-4:
        return None
    return None if torch.allclose(now, sums, rtol=1e-4) else f"weights summed to {sums[0]} and now to {now}"


@every_package
def test_noise_is_added_to_the_logits_once(package: str) -> None:
    if package == "diffusion_gemma":
        pytest.skip("the tokens of its decoder are not known, so nothing can be drawn for them")
    model, inputs = built(package)
    noise: dict[str, Tensor] = {}

    def rule(proposal: Proposal) -> Routing:
        noise[proposal.layer.name] = 0.3 * random_normal(proposal, 1)
        return proposal.select(noise=noise[proposal.layer.name])

    for record in run(model, learned(model, rule), inputs)[1]:
        if record.layer.scores is None:
            continue
        before, after = (logits_of(routing) for routing in (record.proposed, record.routing))
        change = (after - before) / before.std(-1, correction=0, keepdim=True)
        expected = noise[record.layer.name]
        if record.proposed.logits is None:  # probabilities say logits up to a constant
            expected = expected - expected.mean(-1, keepdim=True)
        torch.testing.assert_close(change, expected, rtol=1e-3, atol=1e-3)


def logits_of(routing: Routing) -> Tensor:
    if routing.logits is not None:
        return routing.logits
    assert routing.scores is not None
    logits = routing.scores.log()
    return logits - logits.mean(-1, keepdim=True)


@every_package
def test_a_reroute_that_changes_nothing_is_bit_identical(package: str) -> None:
    model, inputs = built(package)
    with torch.no_grad():
        plain = model(**inputs)
    for rule in (lambda p: p.routing, lambda p: p.select() if p.layer.scores is not None else p.routing):
        output, records = run(model, rule, inputs)
        assert torch.equal(output.logits, plain.logits)
        assert all(torch.equal(r.proposed.expert, r.routing.expert) for r in records)


SPARSE = {
    "softmax": MoE(num_experts=8, top_k=3, width=8),
    "softmax, not renormalised": MoE(num_experts=8, top_k=3, width=8, router=RouterRule(renormalise=False)),
    "sigmoid with bias": MoE(
        num_experts=8, top_k=3, width=8, router=RouterRule(scores="sigmoid", selection_bias=True, scale=2.5)
    ),
    "groups": MoE(
        num_experts=8,
        top_k=2,
        width=8,
        router=RouterRule(scores="sigmoid", selection_bias=True, num_groups=4, top_groups=2),
    ),
}


@pytest.mark.parametrize("name", SPARSE)
def test_our_layers_select_as_routers_route_does(name: str) -> None:
    model = small_model(feed_forward=[[SPARSE[name], SPARSE[name]]] * 2)
    banned = torch.rand(18, 8) < 0.2
    banned[:, [1, 4]] = False  # no group is left empty
    rule = lambda proposal: proposal.select(banned=banned)
    for record in run(model, rule, {"input_ids": some_ids()})[1]:
        spec, logits = SPARSE[name], record.proposed.logits
        assert logits is not None
        expected = route(logits, spec.router, spec.top_k, bias=record.layer.selection_bias, banned=banned)
        assert torch.equal(record.routing.expert, expected.expert)
        assert torch.equal(record.routing.weight, expected.weight)
        assert record.routing.scores is not None and expected.scores is not None
        assert torch.equal(record.routing.scores, expected.scores)


@pytest.mark.parametrize("package", ["deepseek_v3", "mistral4", "deepseek_v2"])
def test_banned_experts_do_not_count_for_their_group(package: str, monkeypatch) -> None:
    """A group with one expert left has that one's score, and comes last with none left."""
    for name, value in {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 3}.items():
        monkeypatch.setitem(tiny_models.GENERIC, name, value)
    model, inputs = built(package)
    banned = torch.zeros(24, 8, dtype=torch.bool)
    banned[:12, :2] = banned[12:, 3:8:2] = True
    for record in run(model, lambda proposal: proposal.select(banned=banned), inputs)[1]:
        assert not banned.gather(-1, record.routing.expert).any()
        assert record.proposed.logits is not None
        if package == "deepseek_v2":  # a group's score is its best expert's
            continue
        own = RouterRule(scores=record.layer.scores, num_groups=4, top_groups=3)
        expected = route(record.proposed.logits, own, 3, bias=record.layer.selection_bias, banned=banned)
        assert torch.equal(record.routing.expert.sort(-1).values, expected.expert.sort(-1).values)


def test_phimoe_mixes_as_if_the_disabled_experts_were_not_there() -> None:
    from transformers.models.phimoe.modeling_phimoe import sparsemixer

    model, inputs = built("phimoe")
    for record in run(model, disable(), inputs)[1]:
        first = largest(record.proposed, 1)
        logits = record.proposed.logits
        assert logits is not None
        alone = logits.scatter(-1, record.proposed.expert[first][:, None], float("-inf"))
        weight, expert = sparsemixer(alone, jitter_eps=0.5, training=False)
        assert torch.equal(record.routing.expert, expert)
        torch.testing.assert_close(record.routing.weight, weight)


def test_inklings_shared_experts_get_the_weights_of_the_new_choice() -> None:
    """Its router weighs routed and shared experts together: all of them sum to its scale."""
    model, inputs = built("inkling")
    given: list[Tensor] = []
    layers = moe_layers(model)
    for layer in layers:
        shared = model.get_submodule(layer.name).shared_experts
        shared.register_forward_pre_hook(lambda m, args, kwargs: given.append(kwargs["gammas"]), with_kwargs=True)
    _, records = run(model, disable(), inputs)
    for record, gamma in zip(records, given, strict=True):
        router = record.layer.router
        total = record.routing.weight.sum(-1) + gamma.sum(-1)
        torch.testing.assert_close(total, (router.route_scale * router.global_scale).expand_as(total))


@pytest.mark.parametrize("package", ["gemma4", "mixtral"])
def test_a_cache_is_written_once(package: str) -> None:
    """Token by token with a cache is as all at once, though Gemma's experts stand beside its attention."""
    model, inputs = built(package)
    ids = inputs["input_ids"][:1, :6]
    whole = run(model, disable(), {"input_ids": ids})[0].logits
    cache, steps = None, []
    for token in ids.T:
        output = run(model, disable(), {"input_ids": token[:, None], "past_key_values": cache, "use_cache": True})[0]
        cache = output.past_key_values
        steps.append(output.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=1e-4, atol=1e-4)


def test_under_lora_the_adapted_router_selects() -> None:
    tiny, inputs = built("mixtral")
    targets = ["mlp.gate.weight", "mlp.experts.gate_up_proj"]
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=targets, init_lora_weights=False)
    model: Any = peft.get_peft_model(tiny, config).eval()
    adapted, records = run(model, disable(), inputs)
    merged: Any = copy.deepcopy(model).merge_and_unload()
    expected, plain = run(merged, disable(), inputs)
    torch.testing.assert_close(adapted.logits, expected.logits, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(a.routing.expert, b.routing.expert) for a, b in zip(records, plain, strict=True))


def test_noise_goes_to_the_whole_logits_under_lora() -> None:
    tiny, inputs = built("hunyuan_v1_moe")
    model: Any = peft.get_peft_model(tiny, peft.LoraConfig(r=8, target_modules=["wg"])).eval()  # B is zero at first
    adapted = run(model, add_noise(0.5), inputs)[0]
    with model.disable_adapter():
        assert torch.equal(adapted.logits, run(model, add_noise(0.5), inputs)[0].logits)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_every_backend_runs_what_was_selected(backend: str) -> None:
    model = small_model()
    ids = some_ids()
    eager = run(model, disable(), {"input_ids": ids})[0].logits
    model.set_experts_implementation(backend)
    torch.testing.assert_close(run(model, disable(), {"input_ids": ids})[0].logits, eager, rtol=1e-4, atol=1e-5)


def test_outputs_of_a_record_are_of_what_ran() -> None:
    model, seen = small_model(), []
    with torch.no_grad(), reroute(model, disable()), observe(model, seen.append, outputs=True):
        watched = model(input_ids=(ids := some_ids())).logits
    torch.testing.assert_close(watched, run(model, disable(), {"input_ids": ids})[0].logits)
    for record in seen:
        assert not (record.routing.expert == record.proposed.expert[:, :1]).any()


def test_random_replacement_does_not_depend_on_the_batch() -> None:
    model, ids = small_model(), some_ids(rows=3)
    rule = replace_at_random(1, seed=5)
    together = run(model, rule, {"input_ids": ids})[0].logits
    alone = torch.cat([run(model, rule, {"input_ids": row[None]})[0].logits for row in ids])
    torch.testing.assert_close(together, alone)


def test_only_the_named_layers_are_rerouted() -> None:
    model, inputs = built("mixtral")
    name = moe_layers(model)[1].name
    _, records = run(model, {name: disable()}, inputs)
    same = [torch.equal(r.proposed.expert, r.routing.expert) for r in records]
    assert same == [r.layer.name != name for r in records]


def test_whoever_hooked_the_router_hears_of_it_once() -> None:
    model, inputs = built("mixtral")
    heard: list[Any] = []
    moe_layers(model)[0].router.register_forward_hook(lambda *call: heard.append(call))
    output, _ = run(model, disable(), inputs | {"output_router_logits": True})
    assert len(heard) == 1
    assert len(output.router_logits) == len(moe_layers(model))


def traces(model: nn.Module) -> list[Any]:
    return [
        (name, sorted(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()
    ]


def fail(proposal: Proposal) -> Routing:
    raise RuntimeError("no")


@pytest.mark.parametrize("package", ["mixtral", "dbrx"])
def test_nothing_stays_installed(package: str) -> None:
    model, inputs = built(package)
    with torch.no_grad():
        plain = model(**inputs).logits
    before = traces(model)
    run(model, disable(), inputs)
    assert traces(model) == before
    unknown = lambda p: p.select(banned=torch.ones(24, 8, dtype=torch.bool))
    for rule, error in ((fail, RuntimeError), (unknown, Misuse)):
        with pytest.raises(error):
            run(model, rule, inputs)
        assert traces(model) == before
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, plain)


def refused(model: nn.Module, rule: Any, inputs: dict[str, Tensor], message: str) -> None:
    with pytest.raises(Misuse, match=message):
        run(model, rule, inputs)


def test_training_is_refused() -> None:
    model, inputs = built("mixtral")
    refused(model.train(), disable(), inputs, r"call model.eval\(\)")
    model.eval()
    with pytest.raises(Misuse, match=r"under torch.no_grad\(\)"), reroute(model, disable()):
        model(**inputs)
    with AuxLosses(balance=0.1).attach(model):
        run(model, disable(), inputs)


def test_misuse_names_the_layer() -> None:
    model, inputs = built("deepseek_v4")
    first, second = (layer.name for layer in moe_layers(model)[:2])
    refused(model, {first: disable()}, inputs, f"{first} looks experts up by token: none can be disabled")
    refused(model, {"nowhere": disable()}, inputs, f"layers must be among {first}, .* got nowhere")
    assert not torch.equal(*(getattr(run(model, {first: replace_at_random()}, inputs)[1][0], at).expert for at in BOTH))
    with reroute(model, {second: disable()}):
        refused(model, {second: disable()}, inputs, f"{second} is rerouted already")
    grouped, inputs = built("deepseek_v3")
    refused(grouped, disable(2), inputs, r"fewer than top_k \(3\) experts")


BOTH = ("proposed", "routing")


def choose_by_sorting(router: Any) -> Callable[[Tensor], Any]:
    def forward(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = torch.einsum("td,ed->te", hidden.flatten(0, -2), router.weight)
        ranked = logits.softmax(-1).sort(-1, descending=True)
        return logits, ranked.values[:, :3], ranked.indices[:, :3]

    return forward


def test_a_rule_that_is_not_known_is_an_error_and_not_a_silent_nothing() -> None:
    model, inputs = built("mixtral")
    for layer in moe_layers(model):
        layer.router.forward = choose_by_sorting(layer.router)
    refused(model, disable(), inputs, "MixtralTopKRouter selects in a way of its own: it chose an expert that was dis")
    refused(model, add_noise(0.1), inputs, "MixtralTopKRouter selects in a way of its own: no logits were found")


def test_padding_may_be_left_without_experts() -> None:
    model, inputs = built("mixtral")
    padding = inputs["attention_mask"].flatten() == 0
    banned = torch.zeros(24, 8, dtype=torch.bool).masked_fill(padding[:, None], True)
    output = run(model, lambda p: p.select(banned=banned), inputs)[0]
    assert bool(output.logits.isfinite().all())
    refused(model, lambda p: p.select(banned=~banned), inputs, "fewer than top_k")


def test_a_reroute_of_another_precision_is_cast() -> None:
    model, inputs = built("mixtral")
    model.to(torch.bfloat16)
    rule = lambda p: replace(p.routing, weight=p.routing.weight.double(), expert=p.routing.expert.int())
    assert run(model, rule, inputs)[0].logits.dtype == torch.bfloat16
