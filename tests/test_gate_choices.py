"""Choices that no layer can run are refused by name, and experts without an answer do not pass in silence."""

import logging
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import tiny_models
import torch
from torch import Tensor

from competing import OneLayer, batch
from moestro import AuxLosses, Compete, Routing
from moestro.adapters import freeze, moe_layers, parameter_groups, reroute
from moestro.errors import Misuse, TrainingFailed

ABSENT: list[tuple[Callable[[Routing], Any], str]] = [
    (lambda r: replace(r, expert=r.expert + 100), "must lie between 0 and 7, got 10"),
    (lambda r: replace(r, expert=r.expert - 100), "must lie between 0 and 7, got -"),
    (lambda r: replace(r, expert=r.expert.float()), "must be whole numbers, got torch.float32"),
    (lambda r: replace(r, expert=r.expert[:, :1]), "must be of shape"),
    (lambda r: replace(r, expert=r.expert[1:], weight=r.weight[1:]), "must be of shape"),
    (lambda r: replace(r, weight=r.weight * math.nan), "must be finite"),
    (lambda r: None, "must return a Routing, got NoneType"),
]


@pytest.mark.parametrize(("change", "message"), ABSENT, ids=[message for _, message in ABSENT])
def test_a_choice_that_cannot_run_is_refused_by_name(change: Callable[[Routing], Any], message: str, unchecked) -> None:
    tiny = tiny_models.build("mixtral")
    model, name = tiny.model.eval(), moe_layers(tiny.model)[-1].name
    changed = {name: lambda proposal: change(proposal.routing)}
    with pytest.raises(Misuse, match=f"{name} {message}"), torch.no_grad(), reroute(model, changed):
        model(**tiny.inputs)


def lost(share: float) -> Callable[[Tensor], Tensor]:
    """A response that is NaN for this share of the tokens."""

    def respond(output: Tensor) -> Tensor:
        found = output.norm(dim=-1)
        token = torch.arange(found.numel()).view_as(found)
        return found.masked_fill(token < share * found.numel(), math.nan)

    return respond


@pytest.mark.parametrize("scale", ["log", "none"])
def test_a_layer_none_of_whose_responses_is_finite_stops_training_by_its_name(scale: Any):
    model = OneLayer().train()
    rule = Compete(rate=0.5, response=lost(1.0), response_scale=scale, balance_winners=0.0)
    aux = AuxLosses(distillation=0.1, compete=rule)
    with aux.attach(model):
        model(**batch(4, 16)).loss.backward()
        with pytest.raises(TrainingFailed, match="no response is finite at layer: its experts cannot compete"):
            aux.step()


def test_tokens_without_a_response_are_told_of_once(caplog: pytest.LogCaptureFixture):
    model = OneLayer().train()
    aux = AuxLosses(distillation=0.1, compete=Compete(rate=0.5, response=lost(0.25)))
    with aux.attach(model), caplog.at_level(logging.WARNING):
        for _ in range(3):
            model(**batch(4, 16)).loss.backward()
            aux.step()
    assert [record.getMessage() for record in caplog.records] == [
        "8 of 32 competing tokens at layer have no finite response"
    ]


NO_MODEL: list[Callable[[Any], Any]] = [
    lambda given: AuxLosses(balance=1.0).attach(given).__enter__(),
    lambda given: reroute(given, {}).__enter__(),
    lambda given: parameter_groups(given, 1e-3),
    lambda given: freeze(given, "router"),
]


@pytest.mark.parametrize("call", NO_MODEL, ids=["attach", "reroute", "parameter_groups", "freeze"])
@pytest.mark.parametrize("given", [None, 3, "mixtral"])
def test_what_is_no_model_is_refused(call: Callable[[Any], Any], given: Any, unchecked: None):
    with pytest.raises(Misuse, match=f"must be a torch.nn.Module, got {type(given).__name__}"):
        call(given)
