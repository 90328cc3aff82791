"""Losses that do nothing are said or refused; routers are found through every wrapper."""

import copy
import gc
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from moestro import AuxLosses, Misuse, RoutingMeter, freeze, observe, reroute
from moestro.adapters import moe_layers
from moestro.adapters.silence import NO_STEP, UNCOUNTED
from test_aux_losses import assert_equal


def test_evaluation_mode_with_labels_and_gradients_is_said_once(caplog: Any):
    tiny = tiny_models.build("mixtral")
    with caplog.at_level(logging.WARNING, "moestro"), AuxLosses(balance=1.0).attach(tiny.model.eval()):
        with torch.no_grad():
            tiny.model(**tiny.inputs)
        tiny.model(input_ids=tiny.inputs["input_ids"])
        assert not caplog.records
        for _ in range(2):
            tiny.model(**tiny.inputs).loss.backward()
    assert [record.message[:33] for record in caplog.records] == ["no auxiliary loss is added: the m"]
    caplog.clear()
    with caplog.at_level(logging.WARNING, "moestro"), AuxLosses(balance=1.0).attach(tiny.model.train()):
        tiny.model(**tiny.inputs).loss.backward()
    assert not caplog.records


def test_losses_without_gradient_are_said_once(caplog: Any):
    tiny = tiny_models.build("mixtral")
    tiny.model.requires_grad_(False)
    tiny.model.lm_head.requires_grad_(True)
    with caplog.at_level(logging.WARNING, "moestro"), AuxLosses(balance=1.0).attach(tiny.model):
        for _ in range(2):
            tiny.model(**tiny.inputs).loss.backward()
    assert [record.message[:36] for record in caplog.records] == ["the auxiliary losses change nothing:"]


def test_data_parallel_is_refused_naming_torchrun():
    tiny = tiny_models.build("mixtral")
    with pytest.raises(Misuse, match="torchrun"), observe(nn.DataParallel(tiny.model), lambda record: None):
        pass
    with AuxLosses(balance=1.0).attach(tiny.model):
        replica = tiny.model._replicate_for_data_parallel()  # what DataParallel makes for every GPU and pass
        with pytest.raises(Misuse, match="torchrun"):
            replica(**tiny.inputs)


def test_a_trainer_that_would_use_data_parallel_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    trainer = Trainer(tiny_models.build("mixtral").model, arguments)
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    with pytest.raises(Misuse, match="torchrun"), AuxLosses(balance=1.0).attach(trainer):
        pass


def gradient(model: nn.Module, inputs: dict[str, Any], call: nn.Module | None = None) -> dict[str, torch.Tensor]:
    """Of the loss that depends on routers, by the end of the parameter's name."""
    model.zero_grad()
    (call or model)(**inputs).loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {name.replace("modules_to_save.default.", ""): g for name, g in found.items() if ".mlp." in name}


@pytest.mark.parametrize("package", ["qwen3_moe", "deepseek_v3", "mixtral"])
@pytest.mark.parametrize("saved", ["gate", "experts", "mlp"])
def test_routers_and_experts_that_peft_trains_whole(package: str, saved: str):
    """Found when wrapped before and when wrapped after attaching; with the adapter off, the original runs."""
    peft = pytest.importorskip("peft")
    tiny = tiny_models.build(package)

    def wrapped() -> Any:
        names = [f"layers.{i}.mlp" + ("" if saved == "mlp" else f".{saved}") for i in (1, 2)]
        config = peft.LoraConfig(target_modules=["o_proj"], modules_to_save=names, r=2)
        return peft.get_peft_model(copy.deepcopy(tiny.model), config).train()

    losses = {"balance": 0.5, "router_z": 0.3, "orthogonality": 0.1, "orthogonality_form": "cosine"}
    plain_model = copy.deepcopy(tiny.model)
    with AuxLosses(**losses).attach(plain_model):
        plain = gradient(plain_model, tiny.inputs)
    before = wrapped()
    with AuxLosses(**losses).attach(before):
        first = gradient(before, tiny.inputs)
        again = gradient(before, tiny.inputs)
        with before.disable_adapter():
            before(**tiny.inputs)
    assert first
    for name, g in first.items():
        whole = plain[name.removeprefix("base_model.model.").replace("base_layer.", "")]
        assert_equal({"": g}, {"": whole}, 1e-5)
    assert_equal(again, first, 0.0)
    inner = copy.deepcopy(tiny.model)
    with AuxLosses(**losses).attach(inner):
        names = [f"layers.{i}.mlp" + ("" if saved == "mlp" else f".{saved}") for i in (1, 2)]
        after = peft.get_peft_model(inner, peft.LoraConfig(target_modules=["o_proj"], modules_to_save=names, r=2))
        assert_equal(gradient(after.train(), tiny.inputs), first, 1e-6)
    assert all("forward" not in module.__dict__ for module in inner.modules())


def test_freeze_and_names_through_modules_to_save():
    peft = pytest.importorskip("peft")
    tiny = tiny_models.build("qwen3_moe")
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["mlp.gate"], r=2)
    model = peft.get_peft_model(tiny.model, config)
    assert [layer.name for layer in moe_layers(model)] == [f"model.layers.{i}.mlp" for i in range(3)]
    freeze(model, "router")
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".gate." in name)


def test_a_parametrized_router_keeps_its_family():
    tiny = tiny_models.build("deepseek_v3")
    gate = tiny.model.model.layers[1].mlp.gate
    torch.nn.utils.parametrize.register_parametrization(gate, "weight", nn.Identity())
    assert {layer.scores for layer in moe_layers(tiny.model)} == {"sigmoid"}


def hand_written_loop(aux: AuxLosses, *, passes: int, counted: bool, steps: int, calls_step: bool = True) -> None:
    built = tiny_models.build("mixtral")
    model = built.model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ids = torch.randint(3, 60, (1, 8))
    extra = {"num_items_in_batch": torch.tensor(7 * passes)} if counted else {}
    with aux.attach(model):
        for _ in range(steps):
            for _ in range(passes):
                model(input_ids=ids, labels=ids, **extra).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if calls_step:
                aux.step()


def test_a_loop_that_forgets_the_step_is_told_once(caplog: Any):
    hand_written_loop(AuxLosses(balance=0.1, balance_over="lagged"), passes=1, counted=True, steps=3, calls_step=False)
    assert [record.message for record in caplog.records if "aux.step()" in record.message] == [NO_STEP]


def test_a_loop_whose_losses_do_not_change_between_steps_need_not_call_it(caplog: Any):
    hand_written_loop(AuxLosses(balance=0.1), passes=1, counted=True, steps=3, calls_step=False)
    assert not [record for record in caplog.records if "aux.step()" in record.message]


@pytest.mark.parametrize(("passes", "counted", "warns"), [(2, False, True), (2, True, False), (1, False, False)])
def test_accumulation_without_the_number_of_labels_is_told_once(passes, counted, warns, caplog: Any):
    hand_written_loop(AuxLosses(balance=0.1, balance_over="lagged"), passes=passes, counted=counted, steps=3)
    found = [record.message for record in caplog.records if "aux.step()" in record.message]
    assert found == ([UNCOUNTED.format(2)] if warns else [])


@pytest.mark.parametrize(
    "attach",
    [
        lambda model: AuxLosses(balance=0.1).attach(model),
        lambda model: observe(model, lambda record: None),
        lambda model: reroute(model, lambda proposal: proposal.routing),
        lambda model: RoutingMeter().attach(model),
    ],
)
def test_attaching_without_with_is_told(attach: Callable[[Any], Any], caplog: Any):
    attach(tiny_models.build("mixtral").model)
    gc.collect()
    assert [record.message for record in caplog.records if "attached nothing" in record.message]
    caplog.clear()
    with attach(tiny_models.build("mixtral").model.eval()):
        pass
    gc.collect()
    assert not caplog.records
