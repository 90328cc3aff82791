"""Making the subject of a package: its tiny model, and all that the checks hold it against."""

import tempfile
from collections.abc import Sequence

import tiny_models
import torch
from torch import Tensor

from attach import reference as truth
from attach.states import implementation
from attach.stock import Stock, run_stock
from attach.subject import Subject
from moestro.adapters import moe_layers
from moestro.routing import MoELayer


def build(package: str) -> Subject:
    """The subject of a package."""
    tiny = tiny_models.build(package, padded=True)
    subject = Subject(package, tiny.model, tiny.inputs, moe_layers(tiny.model))
    with tempfile.TemporaryDirectory() as folder:
        subject.stock_keys = subject.save(folder)
    roughen(subject.layers)
    for name in ("grouped_mm", "eager"):
        with implementation(subject, name):
            subject.plain[name] = subject.step()
    stock = run_stock(subject.model, subject.inputs, subject.layers)
    subject.seen = stock.layers
    for name, value in true_losses(subject, stock).items():
        subject.right[name] = value.detach(), subject.gradient(value, retain_graph=True)
    return subject


@torch.no_grad()
def roughen(layers: Sequence[MoELayer]) -> None:
    """Move what starts at 0 or 1 and would hide mistakes: scales, norms and biases; let some tokens skip experts."""
    generator = torch.Generator().manual_seed(2)
    for layer in layers:
        for parameter in [*layer.experts.parameters(), *layer.router.parameters()]:
            if parameter.ndim == 1 and parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
        if type(layer.router).__name__ == "ZayaRouter":
            # Not by its own bias, which transformers sets to -1 when it loads a checkpoint.
            layer.router.balancing_biases[-1] = -1.0
            layer.router.balancing_biases[:-1] -= 1.05


def true_losses(subject: Subject, stock: Stock) -> dict[str, Tensor]:
    """Each loss that applies, in loops."""
    losses = {"balance": truth.total(stock, truth.balance, subject.learned)}
    if any(seen.layer.scores != "probabilities" for seen in subject.seen):
        losses["router_z"] = truth.total(stock, truth.router_z, subject.learned)
    if subject.several:
        losses["orthogonality"] = truth.total(stock, truth.orthogonality, subject.seen)
        losses["variance"] = truth.total(stock, truth.variance, subject.learned)
    return losses
