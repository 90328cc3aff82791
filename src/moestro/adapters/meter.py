"""Adding up what the routing of a model looks like while it runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields

import torch.distributed as dist
from torch import nn

from moestro.adapters.observe import Pass, observe
from moestro.metrics import RoutingFigures, RoutingSums, routing_figures, routing_sums
from moestro.routing import LayerRecord


class RoutingMeter:
    """Per layer, the sums of all batches since the last `reset`, of the passes in training mode or of the others."""

    def __init__(self, num_domains: int = 1, *, training: bool = False) -> None:
        self.num_domains, self.training = num_domains, training
        self.sums: dict[str, RoutingSums] = {}

    @contextmanager
    def attach(self, model: nn.Module) -> Iterator[Pass]:
        """Count every forward pass of `model` until the context ends; recomputations are not counted again."""
        with observe(model, self._count) as current:
            yield current

    def _count(self, record: LayerRecord) -> None:
        if record.recomputed or record.layer.router.training != self.training:
            return
        name, sums = record.layer.name, routing_sums(record, self.num_domains)
        self.sums[name] = self.sums[name] + sums if name in self.sums else sums

    def figures(self) -> dict[str, RoutingFigures]:
        """Figures per layer, over all ranks (call it on all of them)."""
        if dist.is_initialized():
            for sums in self.sums.values():
                for f in fields(sums):
                    dist.all_reduce(getattr(sums, f.name))
        return {name: routing_figures(sums) for name, sums in self.sums.items()}

    def reset(self) -> None:
        """Start anew."""
        self.sums = {}
