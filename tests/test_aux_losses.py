"""Auxiliary losses: their values and gradients against plain loops, and that no cut of the batch changes them."""

import contextlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moestro import Dense, Misuse, MoE, MoestroConfig, MoestroForCausalLM, RouterRule, reference
from moestro.adapters import AuxLosses, moe_layers, observe


def tiny_model(top_k: int = 2, num_experts: int = 4, scores: str = "softmax", **kwargs) -> MoestroForCausalLM:
    rule = RouterRule(scores=scores, selection_bias=scores == "sigmoid")
    moe = MoE(num_experts=num_experts, top_k=top_k, width=8, num_shared=1, router=rule)
    torch.manual_seed(0)
    model = MoestroForCausalLM(
        MoestroConfig(
            vocab_size=64,
            hidden_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            feed_forward=[[Dense(width=16)], [moe], [moe, moe]],
            **kwargs,
        )
    )
    for layer in moe_layers(model):  # spread the logits: near-ties would flip between cuts
        torch.nn.init.normal_(layer.router.weight, std=0.5)
    return model.train()


def ragged_batch(rows: int = 8, length: int = 12) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 64, (rows, length), generator=generator)
    mask = (torch.arange(length)[None] < torch.randint(3, length + 1, (rows, 1), generator=generator)).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def gradients(model: MoestroForCausalLM, **batch) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**batch).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def take_loads(aux: AuxLosses) -> dict[str, torch.Tensor]:
    """The load of each layer since the last optimiser step, which begins anew."""
    loads = {state.layer.name: state.load for state in aux._layers}
    for state in aux._layers:
        state.load = None
    return loads


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    assert a.keys() == b.keys()
    for name in a:
        difference = (a[name] - b[name]).norm() / b[name].norm().clamp_min(1e-12)
        assert difference <= tolerance, f"{name}: {difference:.2e}"


def loop_losses(model: MoestroForCausalLM, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same totals from the reference: per sequence, per layer, in loops, with graph."""
    captured: dict[str, torch.Tensor] = {}
    with observe(model, lambda record: captured.__setitem__(record.layer.name, record.hidden)):
        model(**batch)
    mask, labels = batch["attention_mask"].bool(), batch["labels"]
    items = int((labels[:, 1:] != -100).sum())
    blocks = len({layer.block for layer in moe_layers(model)})
    totals = {"balance": torch.zeros(()), "router_z": torch.zeros(())}
    for layer in moe_layers(model):
        rule = layer.router.rule
        hidden = captured[layer.name].view(*mask.shape, -1)
        for row in range(len(mask)):
            choices = [
                reference.choose(
                    hidden[row, t],
                    layer.router.weight,
                    top_k=layer.top_k,
                    scores=rule.scores,
                    bias=None if layer.selection_bias is None else layer.selection_bias.tolist(),
                )
                for t in range(mask.shape[1])
                if mask[row, t]
            ]
            share = int((labels[row, 1:] != -100).sum()) / items / blocks
            totals["balance"] = totals["balance"] + share * reference.load_balance(choices)
            totals["router_z"] = totals["router_z"] + share * reference.router_z(choices)
    return totals


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_values_and_gradients_equal_plain_loops(scores: str, top_k: int):
    model, batch = tiny_model(top_k=top_k, scores=scores), ragged_batch(rows=3, length=7)
    plain = gradients(model, **batch)
    weights = {"balance": 0.3, "router_z": 0.2}
    aux = AuxLosses(**weights)
    with aux.attach(model):
        ours = gradients(model, **batch)
    totals = loop_losses(model, batch)
    model.zero_grad()
    sum(weights[name] * value for name, value in totals.items()).backward()
    for name, value in totals.items():
        torch.testing.assert_close(aux.last[name], value.detach(), rtol=1e-5, atol=1e-6)
    expected = {n: plain[n] + (0 if p.grad is None else p.grad) for n, p in model.named_parameters() if n in plain}
    assert_equal(ours, expected)


@given(top_k=st.integers(1, 4), scores=st.sampled_from(["softmax", "sigmoid"]))
def test_perfect_balance_is_one(top_k: int, scores: str):
    """With equal scores for all experts the balance loss is exactly 1, whatever was chosen."""
    model = tiny_model(top_k=top_k, scores=scores)
    for layer in moe_layers(model):
        torch.nn.init.zeros_(layer.router.weight)
    aux = AuxLosses(balance=1.0)
    with aux.attach(model):
        model(**ragged_batch(rows=2, length=5))
    assert aux.last["balance"].item() == pytest.approx(1.0 * 3 / 2, abs=1e-5)  # three sub-layers in two blocks


def test_balance_counts_all_choices_not_the_first():
    """Every token's first choice is expert 0, its second alternates over the rest: top-1 counting would say 4 x P_0."""
    model = tiny_model(top_k=2)
    layer = moe_layers(model)[0]
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[0, 0], layer.router.weight[1, 1], layer.router.weight[2, 1] = 0.0, 1.0, -1.0
    hidden = torch.zeros(8, 16)
    hidden[:, 1] = torch.tensor([1.0, -1.0] * 4)
    expert = layer.router(hidden)[2]
    expected_load = torch.bincount(expert.flatten(), minlength=4) / expert.numel()
    choices = [reference.choose(h, layer.router.weight, top_k=2) for h in hidden]
    scores = torch.stack([c.probabilities for c in choices]).mean(0)
    assert reference.load_balance(choices).item() == pytest.approx(4 * (expected_load * scores).sum().item(), abs=1e-6)
    assert len(expected_load.nonzero()) > 1


CUTS = [[8], [4, 4], [2, 2, 2, 2], [1] * 8, [3, 5]]


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("form", ["sequence", "lagged"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_gradient_does_not_depend_on_the_cut(cut: list[int], form: str, checkpointing: bool):
    model, batch = tiny_model(), ragged_batch()
    items = int((batch["labels"][:, 1:] != -100).sum())
    aux = AuxLosses(balance=0.5, router_z=0.1, balance_over=form)
    if checkpointing:
        model.activation_checkpointing_enable()
    with aux.attach(model):
        model(**batch)  # one step, so that the lagged load is not uniform
        aux.step()
        whole = gradients(model, **batch, num_items_in_batch=items)
        load = take_loads(aux)
        model.zero_grad()
        for part in zip(*(batch[name].split(cut) for name in batch), strict=True):
            model(**dict(zip(batch, part, strict=True)), num_items_in_batch=items).loss.backward()
        parts = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        for name, value in take_loads(aux).items():
            torch.testing.assert_close(load[name], value)
    assert_equal(parts, whole)


def test_checkpointing_counts_the_load_once():
    model, batch = tiny_model(), ragged_batch()
    loads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
        aux = AuxLosses(balance=0.5)
        with aux.attach(model):
            gradients(model, **batch)
            loads.append(take_loads(aux))
    assert loads[0].keys() == loads[1].keys()
    for name in loads[0]:
        torch.testing.assert_close(loads[0][name], loads[1][name])


def test_padding_changes_nothing():
    model = tiny_model()
    ids = torch.randint(0, 64, (2, 6), generator=torch.Generator().manual_seed(2))
    plain = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    padded = {
        "input_ids": torch.cat([ids, torch.full((2, 5), 7)], dim=1),
        "attention_mask": torch.cat([torch.ones_like(ids), torch.zeros(2, 5, dtype=torch.long)], dim=1),
        "labels": torch.cat([ids, torch.full((2, 5), -100)], dim=1),
    }
    results = []
    for batch in (plain, padded):
        aux = AuxLosses(balance=0.5, router_z=0.1)
        with aux.attach(model):
            results.append(gradients(model, **batch))
    assert_equal(results[1], results[0])


def test_lagged_load_is_the_previous_steps_and_saved():
    model, batch = tiny_model(), ragged_batch()
    aux = AuxLosses(balance=0.5, balance_over="lagged")
    with aux.attach(model):
        model(**batch)
        assert aux.last["balance"].item() == pytest.approx(1.5, abs=1e-5)  # uniform at first: a constant
        aux.step()
        model(**batch)
        value = aux.last["balance"].item()
        state = aux.state_dict()
    assert value != pytest.approx(1.5, abs=1e-3)
    assert sum(sum(layer["load"]) for layer in state["layers"].values()) == pytest.approx(3.0)
    again = AuxLosses(balance=0.5, balance_over="lagged")
    again.load_state_dict(state)
    with again.attach(model):
        model(**batch)
    assert again.last["balance"].item() == value


def test_bias_moves_against_the_load_between_steps_only():
    model, batch = tiny_model(scores="sigmoid"), ragged_batch()
    layer = moe_layers(model)[0]
    assert layer.selection_bias is not None
    aux = AuxLosses(bias_rate=0.01)
    with aux.attach(model):
        model(**batch)
        assert not layer.selection_bias.any()
        load = aux._layers[0].load
        assert load is not None
        aux.step()
    expected = 0.01 * (load.mean() - load).sign().float()
    torch.testing.assert_close(layer.selection_bias, expected)


def test_detached_model_is_as_before():
    model, batch = tiny_model(), ragged_batch()
    before = gradients(model, **batch)
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    with contextlib.suppress(RuntimeError), AuxLosses(balance=1.0).attach(model):
        raise RuntimeError
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == hooks
    assert_equal(gradients(model, **batch), before, 0.0)


def test_evaluation_and_generation_add_nothing():
    model, batch = tiny_model(), ragged_batch()
    model.eval()
    plain = model(**batch).loss
    with AuxLosses(balance=1.0).attach(model):
        assert model(**batch).loss == plain
        model.generate(batch["input_ids"][:1, :3], max_new_tokens=3, do_sample=False)


@pytest.mark.parametrize("name", ["balance", "router_z", "bias_rate"])
@pytest.mark.parametrize(("value", "words"), [(-1.0, "at least 0"), (float("nan"), "a number of at least 0")])
def test_bad_weights(name: str, value: float, words: str):
    with pytest.raises(Misuse) as error:
        AuxLosses(**{name: value})
    assert str(error.value) == f"{name} must be {words}, got {value}"


def test_attach_refuses_what_cannot_work():
    dense = MoestroForCausalLM(MoestroConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
    with pytest.raises(Misuse, match="has no experts"), AuxLosses(balance=1.0).attach(dense):
        pass
    with pytest.raises(Misuse, match="selection bias"), AuxLosses(bias_rate=1.0).attach(tiny_model()):
        pass
    model, aux = tiny_model(), AuxLosses(balance=1.0)
    with aux.attach(model), pytest.raises(Misuse, match="attached already"), aux.attach(model):
        pass
    with aux.attach(model), pytest.raises(Misuse, match="attached already"), AuxLosses(balance=1.0).attach(model):
        pass
    with AuxLosses(balance=1.0).attach(model), pytest.raises(Misuse, match="pass labels"):
        model(input_ids=torch.zeros(1, 3, dtype=torch.long))
