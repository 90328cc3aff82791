"""Losses are blind to the units of hidden states: what is recommended does no harm to outliers."""

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from competing import OneLayer, batch
from moestro import AuxLosses, Compete, losses
from moestro.adapters.applicability import LOSSES
from moestro.inspection.findings import SUGGESTED
from moestro.training.recipes import recipe
from outliers import OUTLIER, TYPICAL, lengths, outlier_ids, outlier_model
from test_losses_specialise import make_record

ROOT = Path(__file__).parent.parent
CALL = re.compile(r"AuxLosses\(([^()]*orthogonality=[^()]*)\)")
COMPETES = {
    "distillation": {"compete": Compete(rate=1.0, forward=False, tie_break=0.0)},
    "diversity": {"compete": Compete(rate=1.0, tie_break=0.0)},  # of winners, who must run
}


def recommended() -> dict[str, dict[str, Any]]:
    """What the documentation tells a user to attach, by where it says so."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    lines = {f"{page.name} {n}": call for page in pages for n, call in enumerate(CALL.findall(page.read_text()))}
    found = {where: eval(f"dict({call})") for where, call in lines.items()}
    found["inspect"] = {name: float(weight) for name, weight in SUGGESTED.items()}
    specialised = asdict(recipe("smoe+specialise").losses)
    return found | {"+specialise": {name: value for name, value in specialised.items() if name in AuxLosses().__dict__}}


def norms(model: nn.Module, loss: torch.Tensor) -> torch.Tensor:
    """Length of the gradient on the experts and on the routers."""
    groups = [[p for name, p in model.named_parameters() if part in name] for part in ("experts", "gate.weight")]
    return torch.stack([length_of_gradient(loss, group) for group in groups])


def length_of_gradient(loss: torch.Tensor, parameters: list[torch.Tensor]) -> torch.Tensor:
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return torch.cat([g.flatten() for g in found if g is not None]).norm()


def trained(aux: AuxLosses, steps: int = 12) -> tuple[float, torch.Tensor]:
    """The task's loss after some steps, and the gradient of all auxiliary losses over the task's at the first."""
    model, ids, ratio = outlier_model(), outlier_ids(), torch.zeros(2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    with aux.attach(model, add_to_loss=False):
        for step in range(steps):
            loss, total = model(input_ids=ids, labels=ids).loss, aux.total()
            if step == 0 and total is not None:
                ratio = norms(model, total) / norms(model, loss)
            optimizer.zero_grad()
            (loss if total is None else loss + total).backward()
            nn.utils.clip_grad_norm_(list(model.parameters()), 1.0)
            optimizer.step()
            aux.step()
    with torch.no_grad():
        return float(model(input_ids=ids, labels=ids).loss), ratio


def test_the_model_has_the_outliers_of_real_weights():
    for found in lengths(outlier_model(), outlier_ids()).values():
        assert 0.5 * TYPICAL < found.median() < 2 * TYPICAL
        assert 0.5 * OUTLIER < found.max() < 2 * OUTLIER


@pytest.mark.parametrize("where", recommended())
def test_what_is_recommended_trains_outliers_as_well_as_nothing_does(where: str):
    plain, _ = trained(AuxLosses())
    loss, ratio = trained(AuxLosses(**recommended()[where]))
    assert loss < plain + 0.2
    assert (ratio < 0.1).all(), ratio


def test_readme_and_inspect_recommend_the_same():
    assert {name: recommended()["README.md 0"][name] for name in SUGGESTED} == recommended()["inspect"]
    assert sum(where.startswith("README") for where in recommended()) == 1
    assert sum(where.startswith("attach") for where in recommended()) == 3


def test_projection_at_the_same_weight_would_ruin_it():
    """The check above can fail: squared lengths outweigh the task."""
    plain, _ = trained(AuxLosses())
    loss, ratio = trained(AuxLosses(orthogonality=1e-3, orthogonality_form="projection"))
    assert loss > plain + 0.5 and (ratio > 10).all()


@pytest.mark.parametrize("name", LOSSES)
def test_the_default_form_is_blind_to_the_length_of_outputs(name: str):
    """Experts that scale their outputs change neither a loss's value nor its gradient, but for the factor itself."""

    def at(scale: float) -> dict[str, torch.Tensor]:
        model = OneLayer(seed=3).train()
        with torch.no_grad():
            model.layer.experts.down_proj.mul_(scale)
        aux = AuxLosses(**({name: 1.0} | COMPETES.get(name, {})))
        with aux.attach(model, add_to_loss=False):
            for step in range(2):  # competition measures its scale in the first
                model.zero_grad()
                model(**batch(3, 6, seed=step))
                aux.total().backward()  # type: ignore[union-attr]
                aux.step()
        found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        if "layer.experts.down_proj" in found:
            found["layer.experts.down_proj"] *= scale
        return found | {"value": aux.last[name]}

    truth = at(1.0)
    assert any(value.norm() > 0 for key, value in truth.items() if key != "value")
    for scale in (1e-3, 1e4):
        for key, value in at(scale).items():
            assert (value - truth[key]).norm() <= 1e-3 * truth[key].norm() + 1e-6, f"{key} at {scale}"


@given(
    form=st.sampled_from(["cosine", "weighted"]),
    power=st.floats(-3, 4),
    outliers=st.integers(0, 6),
    seed=st.integers(0, 99),
)
def test_tokens_of_any_length_count_alike(form: Any, power: float, outliers: int, seed: int):
    """A few tokens, or all of them, with outputs 1e-3 to 1e4 times as long: the same value, and the same turn."""
    draw = torch.Generator().manual_seed(seed)
    base, scale = torch.randn(6, 3, 5, generator=draw) + 0.5, torch.ones(6, 1, 1)
    scale[:outliers] = 10.0**power
    expert = torch.arange(3).expand(6, 3).contiguous()
    found = []
    for factor in (torch.ones_like(scale), scale):
        outputs = (base * factor).requires_grad_()
        record = make_record(expert, 3, scores=torch.full((6, 3), 1 / 3), outputs=outputs)
        value = losses.orthogonality(record, form).sum.sum()
        found.append((value, torch.autograd.grad(value, outputs)[0] * factor))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


def test_the_target_of_competition_is_bounded_by_outliers():
    """One token of 14,000 among those of 100 in the statistics: the target of every other stays near what it was."""
    model = outlier_model()
    aux = AuxLosses(distillation=0.1, compete=Compete(rate=1.0, forward=False))
    with aux.attach(model, add_to_loss=False):
        for _ in range(2):
            loss, total = model(input_ids=outlier_ids(), labels=outlier_ids()).loss, aux.total()
            assert total is not None
            ratio = (norms(model, total) / norms(model, loss))[1]
            aux.step()
    assert aux.last["distillation"] < 3 * torch.log(torch.tensor(4.0)) and ratio < 1.0
