"""Losses on router weights say in one line where there are no such weights."""

from typing import Any

import pytest
import tiny_models
import torch
from accelerate import cpu_offload

from moestro import AuxLosses, Misuse
from test_aux_losses import tiny_model

LOSSES = pytest.mark.parametrize(
    "losses", [{"router_orthogonality": 1.0}, {"simbal": 1.0}], ids=lambda x: next(iter(x))
)


@LOSSES
def test_offloaded(losses: dict[str, Any]):
    model = tiny_models.build("qwen3_moe").model.train()
    cpu_offload(model, execution_device="cpu")
    ids = torch.randint(3, tiny_models.VOCABULARY, (2, 8))
    with (
        AuxLosses(**losses).attach(model),
        pytest.raises(Misuse, match="is offloaded: load it without, or set them to 0"),
    ):
        model(input_ids=ids, labels=ids)


@pytest.mark.parametrize("name", ["balance", "orthogonality", "router_z"])
def test_other_losses_work_on_offloaded_weights(name: str):
    tiny = tiny_models.build("qwen3_moe")
    model, ids = tiny.model.train(), torch.randint(3, tiny_models.VOCABULARY, (2, 8))

    def loss(attached: bool) -> float:
        with AuxLosses(**({name: 1.0} if attached else {})).attach(model):
            return model(input_ids=ids, labels=ids).loss.item()

    expected = loss(True)
    assert expected != loss(False)
    cpu_offload(model, execution_device="cpu")
    assert loss(True) == expected


@LOSSES
def test_a_quantised_weight(losses: dict[str, Any], unchecked: None):
    model = tiny_models.build("qwen3_moe").model.train()
    with AuxLosses(**losses).attach(model) as aux:
        for state in aux._layers:
            holder, name = state.layer.weight_at  # type: ignore[misc]
            setattr(holder, name, torch.nn.Parameter(getattr(holder, name).to(torch.int8), requires_grad=False))
            with pytest.raises(Misuse, match="is quantised"):
                state.router_weight()


@LOSSES
def test_one_expert(losses: dict[str, Any]):
    with (
        pytest.raises(Misuse, match="needs two experts at least, whose rows can differ, and there is 1"),
        AuxLosses(**losses).attach(tiny_model(top_k=1, num_experts=1)),
    ):
        pass
