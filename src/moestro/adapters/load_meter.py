"""`LoadMeter`: what a training run logs about every layer, at the price of one count per layer and pass."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn

from moestro.adapters.tap import Pass
from moestro.adapters.watch import Listener, Watch, watch
from moestro.metrics import max_violation
from moestro.routing import LayerRecord, MoELayer, choices


@dataclass(frozen=True, slots=True)
class Load:
    """How a layer's choices are spread over its experts. `RoutingFigures` defines these figures."""

    max_vio_data: float
    dead_experts: int
    competing: int


class LoadMeter:
    """Counts the choices of each layer in training passes since the last `reset`."""

    def __init__(self) -> None:
        self._counts: dict[str, Float[Tensor, " experts_and_one"]] = {}
        """Choices per expert, and at the end the tokens that competed."""
        self._counting = False

    @contextmanager
    def attach(self, model: nn.Module) -> Iterator[Watch]:
        """Count every training pass of `model` until the context ends; recomputations are not counted again."""
        with watch(model, Listener(on_layer=self._take, on_begin=self._begin)) as watching:
            yield watching

    def _take(self, layer: MoELayer) -> Any:
        device = next(layer.experts.parameters()).device
        self._counts.setdefault(layer.name, torch.zeros(layer.num_experts + 1, dtype=torch.float64, device=device))
        return self._count

    def _begin(self, current: Pass, inputs: dict[str, Any]) -> None:
        self._counting = current.training

    @torch.no_grad()
    def _count(self, record: LayerRecord) -> None:
        if record.recomputed or not self._counting:
            return
        load = choices(record.routing, record.batch, record.layer.num_experts)
        competition = record.competition
        competing = load.new_zeros(1) if competition is None else competition.filled.sum().view(1)
        self._counts[record.layer.name] = self._counts[record.layer.name] + torch.cat([load, competing])

    def loads(self) -> dict[str, Load]:
        """Return the load of each layer that saw a token, over all ranks (call it on all of them)."""
        if not self._counts:
            return {}
        device = next(iter(self._counts.values())).device
        total = torch.cat([count.to(device) for count in self._counts.values()])
        if dist.is_initialized():
            dist.all_reduce(total)
        parts = total.cpu().split([len(count) for count in self._counts.values()])
        return {name: load_of(part) for name, part in zip(self._counts, parts, strict=True) if part[:-1].sum() > 0}

    def reset(self) -> None:
        """Start anew."""
        self._counts = {name: torch.zeros_like(count) for name, count in self._counts.items()}


def load_of(count: Float[Tensor, " experts_and_one"]) -> Load:
    """Return the figures of one layer."""
    load = count[:-1]
    return Load(max_vio_data=float(max_violation(load)), dead_experts=int((load == 0).sum()), competing=int(count[-1]))
