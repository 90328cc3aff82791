"""Competition on models of transformers: every family, LoRA, recomputation, a resumed run, a retrained router."""

import copy
from typing import Any

import pytest
import tiny_models
import torch
from torch import nn

from competing import observed
from moestro import AuxLosses, Compete, LayerRecord, Misuse, freeze, observe, reroute
from moestro.adapters import moe_layers
from moestro.competition.inference import by_competition
from test_attach_gradients import gradients, lora
from test_aux_losses import assert_equal

NAMED = ["olmoe", "qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss"]
OTHERS = [name for name in tiny_models.packages() if name not in (*NAMED, *tiny_models.OUTSIDE)]
COMPETE: dict[str, Any] = {"distillation": 0.1, "compete": Compete(rate=0.5)}


def third_step(model: nn.Module, inputs: dict[str, torch.Tensor], **options: Any) -> tuple[list[LayerRecord], dict]:
    """The records of the third step, whose responses have a scale and an offset, and its gradients."""
    aux, records = AuxLosses(**(COMPETE | options)), []
    with aux.attach(model):
        for _ in range(2):
            model(**inputs).loss.backward()
            aux.step()
        with observe(model, records.append):
            found = gradients(model, lambda: model(**inputs).loss.backward())
    return records, found


def assert_competed(records: list[LayerRecord]) -> None:
    for record in records:
        met, before, after = record.competition, record.proposed, record.routing
        assert met is not None
        assert met.winner is not None
        token = met.token[met.filled]
        winner = met.winner[met.filled]
        assert len(token) > 0
        assert (
            torch.equal(after.expert[token].long().sort(-1).values, winner.sort(-1).values) or before.edge is not None
        )
        torch.testing.assert_close(after.weight[token].sum(-1), before.weight[token].sum(-1), rtol=2e-3, atol=1e-5)
        others = torch.ones(len(after.expert), dtype=torch.bool)
        others[token] = False
        assert torch.equal(after.expert[others], before.expert[others])
        assert torch.equal(after.weight[others], before.weight[others])


@pytest.mark.parametrize("package", [*NAMED, *(pytest.param(p, marks=pytest.mark.slow) for p in OTHERS)])
def test_every_family_competes(package: str):
    tiny = tiny_models.build(package)
    tiny.model.train()
    if package == "diffusion_gemma":  # its decoder's tokens are not its input_ids
        with pytest.raises(Misuse, match="competing tokens are chosen, and ties broken, by their content"):
            third_step(tiny.model, tiny.inputs)
        return
    records, found = third_step(tiny.model, tiny.inputs)
    assert_competed(records)
    assert all(bool(g.isfinite().all()) for g in found.values())


@pytest.mark.parametrize("package", ["mixtral", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("options", [{}, {"diversity": 0.1}], ids=["plain", "diverse"])
def test_recomputation_competes_alike(package: str, options: dict):
    tiny = tiny_models.build(package, padded=True)
    _, plain = third_step(tiny.model, tiny.inputs, **options)
    tiny.model.gradient_checkpointing_enable()
    _, again = third_step(tiny.model, tiny.inputs, **options)
    assert_equal(again, plain, 0.0)


def test_a_recomputation_is_not_counted_again():
    tiny = tiny_models.build("mixtral", padded=True)
    tiny.model.gradient_checkpointing_enable()
    aux = AuxLosses(**COMPETE)
    with aux.attach(tiny.model.train()):
        for _ in range(2):
            tiny.model(**tiny.inputs).loss.backward()
            aux.step()
    competing = sum(-(-int(row.sum()) // 2) for row in tiny.inputs["attention_mask"])
    for layer in aux.state_dict()["layers"].values():
        assert set(layer["responses"][0]) == {0.9 * competing + competing}


def test_under_lora_the_adapted_experts_compete_and_the_router_learns():
    tiny = tiny_models.build("mixtral", padded=True)
    adapted = lora(copy.deepcopy(tiny.model))
    records, found = third_step(adapted, tiny.inputs)
    assert_competed(records)
    assert any(g.any() for name, g in found.items() if "gate.lora" in name)
    bare, _ = third_step(tiny.model, tiny.inputs)
    assert not torch.allclose(records[0].competition.response, bare[0].competition.response)


@pytest.mark.parametrize("package", ["mixtral", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "recomputed"])
def test_answers_without_graph_take_no_gradient_from_lora(package: str, checkpointing: bool):
    """Competition that teaches nothing and sends nobody anywhere leaves every gradient as it was."""
    tiny = tiny_models.build(package, padded=True)
    adapted = lora(copy.deepcopy(tiny.model).train())
    if checkpointing:
        adapted.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
        adapted.enable_input_require_grads()  # type: ignore[operator]
    expected = gradients(adapted, lambda: adapted(**tiny.inputs).loss.backward())
    assert sum("experts" in name for name in expected) > 4
    _, found = third_step(adapted, tiny.inputs, distillation=0.0, compete=Compete(rate=0.5, forward=False))
    assert_equal(found, expected, 0.0)


def test_what_cannot_work_is_said_before_the_first_step():
    tiny = tiny_models.build("mixtral")
    model = tiny.model.train()
    layer = moe_layers(model)[0]
    layer.experts.forward = layer.experts.forward  # as expert parallelism and offloading do
    with (
        pytest.raises(Misuse, match="does not run with expert parallelism or other people's hooks"),
        AuxLosses(**COMPETE).attach(model),
    ):
        pass
    del layer.experts.forward
    freeze(model, "router")
    with pytest.raises(Misuse, match="distillation trains routers"), AuxLosses(**COMPETE).attach(model):
        pass
    hashed = tiny_models.build("deepseek_v4").model.train()
    rule = Compete(weights="router")
    with pytest.raises(Misuse, match="weights = router needs"), AuxLosses(compete=rule).attach(hashed):
        pass
    embedded = tiny.model.get_input_embeddings()(tiny.inputs["input_ids"])  # type: ignore[operator]
    resting = AuxLosses(compete=Compete(start_step=9))
    with resting.attach(model), pytest.raises(Misuse, match="must be called with input_ids"):
        model(inputs_embeds=embedded)
    with (
        torch.no_grad(),
        reroute(model.eval(), by_competition(Compete(), {})),
        pytest.raises(Misuse, match="statistics of responses lack"),
    ):
        model(**tiny.inputs)


def test_a_resumed_run_goes_on_as_it_was():
    tiny = tiny_models.build("mixtral", padded=True)

    def fourth_step(aux: AuxLosses) -> dict[str, torch.Tensor]:
        return gradients(tiny.model, lambda: tiny.model(**tiny.inputs).loss.backward())

    whole = AuxLosses(**COMPETE)
    with whole.attach(tiny.model):
        for _ in range(3):
            tiny.model(**tiny.inputs).loss.backward()
            whole.step()
        saved = whole.state_dict()
        expected = fourth_step(whole)
    resumed = AuxLosses(**COMPETE)
    resumed.load_state_dict(saved)
    with resumed.attach(tiny.model):
        assert_equal(fourth_step(resumed), expected, 0.0)
    forgetful = AuxLosses(**COMPETE)
    with forgetful.attach(tiny.model):
        found = fourth_step(forgetful)
    assert any(not torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("by", ["tokens", "steps"])
@pytest.mark.parametrize("frozen", [("rest", "experts"), ("rest",)], ids=["experts frozen", "experts learn"])
def test_a_router_is_retrained_by_competition(frozen: tuple, by: str):
    """Agreement of the router's choice with competition's rises where competition only teaches.

    By steps there are some in which nobody competes, and the only loss has no value but still a graph.
    """
    tiny = tiny_models.build("qwen3_moe", padded=True)
    model = tiny.model.train()
    freeze(model, *frozen)
    aux = AuxLosses(distillation=1.0, compete=Compete(by=by, rate=0.2, forward=False))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    agreement = []
    with aux.attach(model, add_to_loss=False):
        for _ in range(50):
            records = observed(model, tiny.inputs)
            aux.total().backward()
            optimizer.step()
            optimizer.zero_grad()
            aux.step()
            met = [record for record in records if record.competition and record.competition.winner is not None]
            agreement += [sum(map(agreed, met)) / len(met)] if met else []
    assert sum(agreement[-3:]) > 1.2 * sum(agreement[:3])


def agreed(record: LayerRecord) -> float:
    """The share of the winners that the router chose too."""
    met = record.competition
    chosen = record.proposed.expert[met.token][:, :, None] == met.winner[:, None, :]
    return chosen.any(1).float().mean().item()


def test_competition_on_request_is_what_a_competing_step_does():
    """In evaluation every token goes to its winners, with the weights that training would give them."""
    tiny = tiny_models.build("mixtral")
    rule = Compete(rate=1.0, response_scale="none", balance_winners=0.0, tie_break=0.0)
    aux = AuxLosses(compete=rule)
    with aux.attach(tiny.model.train()):
        trained = observed(tiny.model, tiny.inputs)
    with torch.no_grad(), reroute(tiny.model.eval(), by_competition(rule)):
        used = observed(tiny.model, tiny.inputs)
    for a, b in zip(trained, used, strict=True):
        assert torch.equal(a.routing.expert, b.routing.expert)
        torch.testing.assert_close(a.routing.weight, b.routing.weight)
        assert not torch.equal(b.routing.expert, b.proposed.expert)
