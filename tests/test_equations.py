"""What docstrings promise about equations: value and gradient of the papers' own, written out over all tokens."""

from typing import Any

import pytest
import torch
from torch import Tensor

from moestro import AuxLosses, LayerRecord, observe
from moestro.adapters import moe_layers
from test_aux_losses import ragged_batch, tiny_model


def batch() -> dict[str, Tensor]:
    """Rows of unequal length, of which unequal shares are labels."""
    found = ragged_batch(rows=6)
    for row, skipped in enumerate((0, 9, 2, 7, 1, 11)):
        found["labels"][row, 1:skipped] = -100
    return found


def dense(record: LayerRecord) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, scores at the chosen experts over their sum, and choices, of the valid tokens."""
    assert record.routing.scores is not None and record.batch.valid is not None
    scores, chosen = record.routing.scores, torch.zeros_like(record.routing.scores)
    chosen = chosen.scatter(-1, record.routing.expert, 1.0)
    kept = scores * chosen
    valid = record.batch.valid
    return scores[valid], (kept / kept.sum(-1, keepdim=True))[valid], chosen[valid]


def variance(record: LayerRecord) -> Tensor:
    """Guo et al., Eq. 7, over the number of tokens; its mean has a gradient."""
    _, share, _ = dense(record)
    return -(share - share.mean(0)).square().sum() / share.shape[1] / len(share)


def balance(record: LayerRecord) -> Tensor:
    """Qiu et al., Eq. 4: E sum_e f_e P_e."""
    scores, _, chosen = dense(record)
    return scores.shape[1] * ((chosen.sum(0) / chosen.sum()) * scores.mean(0)).sum()


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
@pytest.mark.parametrize("name", ["variance", "balance"])
def test_over_the_batch_it_is_the_papers_equation(name: str, scores: str):
    model, inputs, records = tiny_model(scores=scores), batch(), list[LayerRecord]()
    options: dict[str, Any] = {name: 1.0, f"{name}_over": "batch"}
    aux = AuxLosses(**options)
    with aux.attach(model, add_to_loss=False), observe(model, records.append):
        model(**inputs)
        ours = aux.total()
    assert ours is not None
    equation = {"variance": variance, "balance": balance}[name]
    theirs = torch.stack([equation(record) for record in records]).sum() / 2  # blocks
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    weights = [layer.router.weight for layer in moe_layers(model)]
    found, truth = (torch.autograd.grad(loss, weights, retain_graph=True) for loss in (ours, theirs))
    for one, other in zip(found, truth, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()


def test_rows_without_labels_count_too():
    """An equation over all tokens: with labels in one row only its value is the same."""
    values = []
    for rows_with_labels in (6, 1):
        model, inputs = tiny_model(), batch()
        inputs["labels"][rows_with_labels:] = -100
        aux = AuxLosses(variance=1.0, variance_over="batch")
        with aux.attach(model, add_to_loss=False):
            model(**inputs)
            values.append(aux.total())
    torch.testing.assert_close(values[0], values[1])
