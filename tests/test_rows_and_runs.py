"""Labels that are not one per token, and layers that run several times in a pass: truth is a plain loop."""

from typing import Any

import pytest
import tiny_models
import torch
import transformers
from torch import nn
from transformers import Qwen3MoeForSequenceClassification

from moestro import AuxLosses, Misuse, observe
from moestro.adapters.batch import describe, labels_of_rows, share_of_sequences
from test_aux_losses import assert_equal

ROWS, LENGTH = 4, 6


def classifier(package: str, **options: Any) -> nn.Module:
    config = tiny_models.build(package).model.config
    config.num_labels = 3
    for name, value in options.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    name = type(tiny_models.build(package).model).__name__.replace("ForCausalLM", "ForSequenceClassification")
    return getattr(transformers, name)(config).train()


def row_loop(model: nn.Module, inputs: dict[str, Any], weights: list[float]) -> dict[str, torch.Tensor]:
    """The gradient of router_z, row by row: mean over tokens, times the row's weight; mean over layers."""
    model.zero_grad()
    for row, weight in enumerate(weights):
        records: list[Any] = []
        with observe(model, records.append):
            model(**{name: value[row : row + 1] for name, value in inputs.items()})
        losses = [record.proposed.logits.logsumexp(-1).square().mean() for record in records]
        (weight * torch.stack(losses).mean()).backward()
    return routers(model)


def routers(model: nn.Module) -> dict[str, torch.Tensor]:
    named = model.named_parameters()
    return {n: p.grad.clone() for n, p in named if p.grad is not None and n.endswith(("gate.weight", "router.weight"))}


def totals(model: nn.Module, batches: list[dict[str, Any]], items: int | None) -> dict[str, torch.Tensor]:
    model.zero_grad()
    aux = AuxLosses(router_z=1.0)
    with aux.attach(model, add_to_loss=False):
        for batch in batches:
            model(**batch, num_items_in_batch=items)
            total = aux.total()
            assert total is not None
            total.backward()
    return routers(model)


LABELS = {
    "classes": torch.tensor([0, 2, 1, 1]),
    "a class is missing": torch.tensor([0, -100, 1, 1]),
    "numbers": torch.tensor([0.5, -1.0, 2.0, 0.0]),
    "several per row": torch.tensor([[1.0, 0, 1], [0, 0, 1], [1, 1, 1], [0, 0, 0]]),
}
PROBLEMS = {"numbers": {"num_labels": 1}, "several per row": {"problem_type": "multi_label_classification"}}


@pytest.mark.parametrize("package", ["qwen3_moe", "mixtral", "gpt_oss"])
@pytest.mark.parametrize("kind", LABELS)
def test_a_rows_share_is_its_labels(package: str, kind: str):
    model, labels = classifier(package, **PROBLEMS.get(kind, {})), LABELS[kind]
    ids = torch.randint(3, 64, (ROWS, LENGTH))
    items = int((labels != -100).sum())
    weights = ((labels != -100).view(ROWS, -1).sum(1) / items).tolist()
    truth = row_loop(model, {"input_ids": ids}, weights)
    for size in (4, 2, 1):
        parts = [{"input_ids": ids[i : i + size], "labels": labels[i : i + size]} for i in range(0, ROWS, size)]
        assert_equal(totals(model, parts, items), truth)


def test_as_many_classes_as_tokens_are_not_labels_of_tokens():
    model = classifier("qwen3_moe", num_labels=LENGTH, problem_type="multi_label_classification")
    assert isinstance(model, Qwen3MoeForSequenceClassification)
    ids, labels = torch.randint(3, 64, (2, LENGTH)), torch.zeros(2, LENGTH)
    labels[0, :3] = -100
    truth = row_loop(model, {"input_ids": ids}, [3 / 9, 6 / 9])
    with AuxLosses(router_z=1.0).attach(model, add_to_loss=False) as aux:
        assert aux._watch is not None
        batch = describe({"input_ids": ids, "labels": labels}, labels_tokens=aux._watch.labels_tokens)
    assert batch.label is None
    share = share_of_sequences(batch, 9, rows=labels_of_rows({"labels": labels}, shifts_labels=False))
    torch.testing.assert_close(share, torch.tensor([3 / 9, 6 / 9]))
    assert truth


@pytest.mark.parametrize(
    ("inputs", "items", "shares"),
    [
        ({"start_positions": torch.tensor([1, 2])}, 4, [0.25, 0.25]),
        ({"shift_labels": torch.tensor([[1, -100, 2, -100], [-100] * 4])}, 4, [0.5, 0.0]),
        ({"labels": torch.tensor([[1, 1, -100, 2], [-100] * 4])}, 4, [0.5, 0.0]),
        ({"labels": torch.full((2, 4), -100)}, 4, [0.0, 0.0]),
        ({"labels": torch.tensor([1, 0, 1, 1, -100, 1, 2, 1])[None]}, 10, [0.3, 0.3]),  # rows laid end to end
        ({"labels": torch.ones(2, 7, dtype=torch.long)}, 24, [0.25, 0.25]),  # images' tokens beside the text's
        ({"labels": torch.tensor([1, 0])}, None, [0.5, 0.5]),
        ({}, None, [0.5, 0.5]),
    ],
)
def test_shares_by_labels_of_other_shapes(inputs: dict[str, Any], items: int | None, shares: list[float]):
    inputs = {"input_ids": torch.zeros(2, 4, dtype=torch.long)} | inputs
    rows = labels_of_rows(inputs, shifts_labels=True)
    share = share_of_sequences(describe(inputs), items, rows=rows)
    torch.testing.assert_close(share, torch.tensor(shares))


def test_choices_share_their_example_and_items_without_labels_are_refused():
    ids = torch.zeros(2, 3, 5, dtype=torch.long)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([2, 0])}
    batch = describe(inputs, labels_tokens=False)
    share = share_of_sequences(batch, 4, rows=labels_of_rows(inputs, shifts_labels=False))
    torch.testing.assert_close(share, torch.full((6,), 1 / 12))
    with pytest.raises(Misuse, match="labels that it counts must be given too"):
        share_of_sequences(describe({"input_ids": ids[0]}), 4)


def shared(package: str) -> Any:
    """The second sparse layer's experts and router are the first's."""
    model = tiny_models.build(package).model
    blocks = [block for block in model.model.layers if hasattr(block.mlp, "experts")]
    blocks[1].mlp = blocks[0].mlp
    return model


def looped(package: str) -> Any:
    """Every block runs twice in a row."""
    model = tiny_models.build(package).model
    for block in model.model.layers:
        once = block.forward
        block.forward = lambda hidden, once=once, **rest: once(once(hidden, **rest), **rest)
    return model


@pytest.mark.parametrize("make", [shared, looped])
@pytest.mark.parametrize("package", ["qwen3_moe", "mixtral", "olmoe", "deepseek_v3"])
def test_the_runs_of_a_layer_add_up(package: str, make: Any):
    model, ids = make(package), torch.randint(3, 64, (2, LENGTH))
    losses: dict[str, list[torch.Tensor]] = {}

    def take(record: Any) -> None:
        losses.setdefault(record.layer.name, []).append(record.proposed.logits.logsumexp(-1).square().mean())

    with observe(model, take):
        model(input_ids=ids)
    torch.stack([torch.stack(runs).sum() for runs in losses.values()]).mean().backward()
    truth = routers(model)
    aux = AuxLosses(router_z=1.0)
    model.zero_grad()
    with aux.attach(model, add_to_loss=False):
        model(input_ids=ids)
        aux.total().backward()  # type: ignore[union-attr]
        runs = sum(len(found) for found in losses.values())
        top_k = aux._layers[0].layer.top_k
        assert sum(state.load.sum() for state in aux._layers) == runs * 2 * LENGTH * top_k
    assert sum(aux.firings.values()) == runs
    assert_equal(routers(model), truth)


def test_experts_that_two_routers_share_are_refused():
    model = tiny_models.build("mixtral").model
    model.model.layers[1].mlp.experts = model.model.layers[0].mlp.experts
    with pytest.raises(Misuse, match="share their experts"), AuxLosses(balance=1.0).attach(model):
        pass


def test_a_router_that_two_layers_share_is_one_of_each():
    model, ids = tiny_models.build("mixtral").model, torch.randint(3, 64, (2, LENGTH))
    model.model.layers[1].mlp.gate = model.model.layers[0].mlp.gate
    truth = row_loop(model, {"input_ids": ids}, [0.5, 0.5])
    assert_equal(totals(model, [{"input_ids": ids}], None), truth)


def test_a_selection_bias_that_two_layers_share_is_refused():
    model = tiny_models.build("deepseek_v3").model
    model.model.layers[2].mlp.gate = model.model.layers[1].mlp.gate
    with pytest.raises(Misuse, match="share one selection bias"), AuxLosses(bias_rate=0.1).attach(model):
        pass
