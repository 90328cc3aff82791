"""Adding up what the routing of a model looks like while it runs."""

from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from itertools import pairwise
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn

from moestro.adapters.attachment import attachment
from moestro.adapters.tap import TAP, Pass, Tap
from moestro.adapters.watch import Listener, Watch, watch
from moestro.gate.ranges import Steps, check
from moestro.joint_routing import JointFigures, JointSums, joint_figures, joint_sums, no_joint_sums
from moestro.metrics import RoutingFigures, RoutingSums, no_sums, routing_figures, routing_sums
from moestro.routing import LayerRecord, MoELayer, Routing
from moestro.samples import sample_places, subset

Sums = TypeVar("Sums", RoutingSums, JointSums)

SAMPLE = 512
"""Tokens per layer and pass that are looked at in detail."""


class RoutingMeter:
    """Per layer, the sums of all batches since the last `reset`, of the passes in training or of the others.

    A pass is one in training when the model is in training mode and gradients are on.
    """

    def __init__(self, num_domains: int = 1, *, training: bool = False) -> None:
        check("num_domains", num_domains, Steps)
        self.num_domains, self.training = num_domains, training
        self.detailed = False
        """Whether passes are looked at in detail: overlap and cosines, of a sample of `SAMPLE` tokens."""
        self.sums: dict[str, RoutingSums] = {}
        """On each layer's device; empty where nothing was counted."""
        self.joint: dict[str, JointSums] = {}
        """Of each layer with the one before it in its block, where there is one; nothing of passes in training."""
        self._layers: dict[str, MoELayer] = {}
        self._before: tuple[MoELayer, Routing] | None = None
        self._counting = False

    @attachment
    def attach(self, model: nn.Module) -> Iterator[Watch]:
        """Count every forward pass of `model` until the context ends; recomputations are not counted again."""
        with watch(model, Listener(on_layer=self._take, on_begin=self._begin)) as watching:
            yield watching

    def _take(self, layer: MoELayer) -> Callable[[LayerRecord], None]:
        self._layers[layer.name] = layer
        return self._count

    def _begin(self, current: Pass, inputs: dict[str, Any]) -> None:
        self._counting, self._before = current.training == self.training, None

    def _count(self, record: LayerRecord) -> None:
        if record.recomputed or not self._counting:
            return
        if self.training and not self.detailed:
            self._add(record, None)
        else:
            self._look(record)  # pyright: ignore[reportAttributeAccessIssue]

    def _add(self, record: LayerRecord, sample: LayerRecord | None) -> None:
        name, sums = record.layer.name, routing_sums(record, self.num_domains, sample)
        self.sums[name] = self.sums[name] + sums if name in self.sums else sums

    @torch.compiler.disable  # shapes that depend on what tokens hold have no place in the graph of a compiled layer
    def _look(self, record: LayerRecord) -> None:
        self._add(record, sample_of(record) if self.detailed else None)
        if not self.training:  # there it would cost every step, and keep a routing with its graph alive
            self._count_pairs(record)

    def _count_pairs(self, record: LayerRecord) -> None:
        layer, before = record.layer, self._before
        self._before = layer, record.routing
        if before is None or before[0].block != layer.block:
            return
        earlier, routing = before
        sums = joint_sums(routing, record.routing, record.batch, (earlier.num_experts, layer.num_experts))
        self.joint[layer.name] = self.joint[layer.name] + sums if layer.name in self.joint else sums

    def figures(self) -> dict[str, RoutingFigures]:
        """Figures of each layer that saw a token, over all ranks (call it on all of them). Changes nothing."""
        mine = {name: self.sums.get(name) or self._nothing(layer) for name, layer in self._layers.items()}
        return {name: routing_figures(sums) for name, sums in over_ranks(mine).items() if sums.tokens > 0}

    def joint_figures(self) -> dict[str, JointFigures]:
        """Of each layer that another MoE layer of its block stands before, the two together; over all ranks."""
        mine = {
            later.name: self.joint.get(later.name)
            or no_joint_sums((earlier.num_experts, later.num_experts), device_of(later))
            for earlier, later in pairwise(self._layers.values())
            if earlier.block == later.block
        }
        return {name: joint_figures(sums) for name, sums in over_ranks(mine).items() if sums.tokens > 0}

    def _nothing(self, layer: MoELayer) -> RoutingSums:
        """A rank may have had no batch, and takes part in the reduction all the same."""
        return no_sums(self.num_domains, layer.num_experts, device_of(layer))

    def reset(self) -> None:
        """Start anew."""
        self.sums, self.joint = {}, {}


def over_ranks(mine: dict[str, Sums]) -> dict[str, Sums]:
    """The sums of all ranks, on the CPU: one reduction and one wait for the device, however many there are."""
    flat = [getattr(sums, f.name) for sums in mine.values() for f in fields(sums)]
    if not flat:
        return {}
    total = torch.cat([part.flatten().to(flat[0].device) for part in flat])
    if dist.is_initialized():
        dist.all_reduce(total)
    parts = iter(total.cpu().split([part.numel() for part in flat]))
    return {
        name: type(sums)(**{f.name: next(parts).view(getattr(sums, f.name).shape) for f in fields(sums)})
        for name, sums in mine.items()
    }


def device_of(layer: MoELayer) -> torch.device:
    """Where a layer's experts are."""
    return next(layer.experts.parameters()).device


@torch.no_grad()
def sample_of(record: LayerRecord) -> LayerRecord:
    """The record of at most `SAMPLE` of its valid tokens, with outputs.

    The tokens depend on the number of valid ones alone. Outputs that nobody else asked for are computed beside the
    pass, which runs as if nobody looked: its result, its graph and the random state are what they would be.
    """
    sample = subset(record, sample_places(record, SAMPLE))
    return sample if sample.outputs is not None else replace(sample, outputs=outputs_of(sample))


def outputs_of(record: LayerRecord) -> Float[Tensor, "tokens k dim"]:
    """What each chosen expert of a watched layer makes of the tokens, run once more."""
    tap: Tap = getattr(record.layer.experts, TAP)
    with torch.random.fork_rng([] if record.hidden.device.type == "cpu" else [record.hidden.device]):
        return tap.outputs(record.hidden, record.routing.expert, record.routing.weight)
