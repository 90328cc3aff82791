"""A loss with units says in its first step how large its gradient is beside the task's, and changes no gradient."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from moestro import AuxLosses
from moestro.adapters.gradient_ratio import measure
from outliers import outlier_ids, outlier_model
from test_callback import arguments, trainer_of
from test_loss_units import norms

RUINOUS: dict[str, Any] = {"balance": 1e-3, "orthogonality": 1e-3, "orthogonality_form": "projection"}


def by_hand(aux: AuxLosses) -> float:
    """The ratio on experts and routers together, of the first pass."""
    model, ids = outlier_model(), outlier_ids()
    with aux.attach(model, add_to_loss=False):
        loss, total = model(input_ids=ids, labels=ids).loss, aux.total()
        assert total is not None
        return float(norms(model, total).norm() / norms(model, loss).norm())


def one_pass(aux: AuxLosses, *, checkpointing: bool = False) -> dict[str, torch.Tensor]:
    model, ids = outlier_model(), outlier_ids()
    if checkpointing:
        model.gradient_checkpointing_enable()
    with aux.attach(model):
        model(input_ids=ids, labels=ids).loss.backward()
        aux.step()
        model(input_ids=ids, labels=ids).loss.backward()
        aux.step()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def warnings_of(caplog: Any) -> list[str]:
    return [r.getMessage() for r in caplog.records if "gradient" in r.getMessage() and r.name.startswith("moestro")]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_loop_is_warned_once_and_its_gradient_is_the_same(checkpointing: bool, caplog: Any, monkeypatch: Any):
    aux = AuxLosses(**RUINOUS)
    with caplog.at_level(logging.WARNING, "moestro"):
        found = one_pass(aux, checkpointing=checkpointing)
    (said,) = warnings_of(caplog)
    assert "orthogonality=0.001 outweighs the task" in said and 'orthogonality_form="cosine"' in said
    assert aux.gradient_ratios["orthogonality"] == pytest.approx(
        by_hand(AuxLosses(orthogonality=1e-3, orthogonality_form="projection")), rel=1e-4
    )
    assert aux.gradient_ratios["orthogonality"] > 100
    monkeypatch.setattr("moestro.adapters.aux_losses.unmeasured", lambda aux: {})
    plain = one_pass(AuxLosses(**RUINOUS), checkpointing=checkpointing)
    assert all(torch.equal(found[name], plain[name]) for name in plain)


@pytest.mark.parametrize("losses", [{"balance": 1e-2, "orthogonality": 0.1, "variance": 0.1}, {"router_z": 1e-9}])
def test_what_does_no_harm_is_not_warned_of(losses: dict[str, float], caplog: Any):
    with caplog.at_level(logging.WARNING, "moestro"):
        one_pass(aux := AuxLosses(**losses))
    assert not warnings_of(caplog)
    assert aux.gradient_ratios.keys() == losses.keys() & {"router_z"}


def test_relative_scaling_is_measured_when_it_begins_to_act(caplog: Any):
    with caplog.at_level(logging.WARNING, "moestro"):
        one_pass(aux := AuxLosses(**(RUINOUS | {"scaling": "relative"})))
    assert 0 < aux.gradient_ratios["orthogonality"] < 1 and not warnings_of(caplog)


def test_a_loss_that_warms_up_is_measured_at_its_full_weight():
    one_pass(slowly := AuxLosses(**RUINOUS, warmup_steps=100))
    one_pass(at_once := AuxLosses(**RUINOUS))
    assert slowly.gradient_ratios == pytest.approx(at_once.gradient_ratios, rel=1e-4)


def test_a_loop_that_adds_the_total_itself_without_a_loss_of_the_model_is_told(caplog: Any):
    model, ids, aux = outlier_model(), outlier_ids(), AuxLosses(**RUINOUS)
    with caplog.at_level(logging.WARNING, "moestro"), aux.attach(model, add_to_loss=False):
        for _ in range(2):
            logits = model(input_ids=ids).logits
            (nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()) + aux.total()).backward()
            aux.step()
    (said,) = warnings_of(caplog)
    assert "could not be measured: the model returned no loss" in said


@pytest.mark.parametrize("rows", [4, 1])
def test_a_trainer_logs_it_once(rows: int, tmp_path: Path, caplog: Any):
    ids = outlier_ids()
    batch = {"input_ids": ids, "labels": ids}
    args = arguments(tmp_path, rows=rows, accumulation=4 // rows, max_steps=3, logging_steps=1)
    trainer, aux = trainer_of(outlier_model(), args, batch=batch), AuxLosses(**RUINOUS)
    with caplog.at_level(logging.WARNING, "moestro"), aux.attach(trainer):
        trainer.train()
    assert len(warnings_of(caplog)) == 1
    logged = [e.get("aux/orthogonality/gradient_ratio") for e in trainer.state.log_history if "loss" in e]
    assert logged == [aux.gradient_ratios["orthogonality"], None, None] and logged[0] > 50
    if rows == 4:
        assert logged[0] == pytest.approx(by_hand(AuxLosses(orthogonality=1e-3, orthogonality_form="projection")), 1e-3)
    resumed = AuxLosses(**RUINOUS)
    resumed.load_state_dict(aux.state_dict())
    assert resumed.gradient_ratios == aux.gradient_ratios


def test_compiled_models_are_not_measured():
    model, aux = outlier_model(), AuxLosses(**RUINOUS)
    model.model.layers[0].compile()
    found = measure(aux, model, {}, torch.zeros(()), once="")
    assert found.keys() == {"orthogonality"} and found["orthogonality"] != found["orthogonality"]
