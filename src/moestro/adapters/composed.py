"""How much the sub-layers of a block owe to each other: the composed term BA against B.

Linearised, two residual sub-layers in series are I + A + B + BA (CartesianMoE, arXiv:2410.16077). Only BA, what A's
output changes in B's, is new against sub-layers side by side.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moestro.adapters.wrappers import inner_model
from moestro.models.layers import SparseMoE
from moestro.models.modeling import MoestroDecoderLayer


@dataclass(frozen=True, slots=True, kw_only=True)
class ComposedFigures:
    """One later sub-layer B of a block, u the stream before the block's first sub-layer and u' the one that B reads."""

    size: float
    """||B(norm u') - B(norm u)|| / ||B(norm u)||, root of sums over tokens: 0 where sub-layers are parallel."""
    rerouted: float | None
    """Share of B's choices that it would not make of norm u; None where B is dense."""


@dataclass(eq=False)
class _Block:
    """What is seen of one block in one pass, and its sums over passes."""

    stream: Tensor | None = None
    inside: bool = False
    sums: dict[int, Float[Tensor, " 4"]] = field(default_factory=dict)
    """Per sub-layer: squared change, squared size without it, choices kept, choices."""


class ComposedMeter:
    """Runs the later sub-layers of our own models' blocks once more on the stream before the first, and compares.

    Foreign models have no such blocks; of them it finds nothing. Statistics that are taken in the same pass would count
    the second run too: give it passes of its own.
    """

    def __init__(self) -> None:
        self._blocks: dict[str, _Block] = {}

    @property
    def finds_nothing(self) -> bool:
        """Whether the model that it was attached to has no block of several sub-layers."""
        return not self._blocks

    @contextmanager
    def attach(self, model: nn.Module) -> Iterator[None]:
        """Look at every forward pass of `model` until the context ends."""
        with ExitStack() as stack:
            for name, layer in inner_model(model).named_modules():
                if isinstance(layer, MoestroDecoderLayer) and len(layer.feed_forward) > 1:
                    self._watch(stack, layer, self._blocks.setdefault(name, _Block()))
            yield

    def _watch(self, stack: ExitStack, layer: MoestroDecoderLayer, block: _Block) -> None:
        def keep(norm: nn.Module, args: tuple[Any, ...]) -> None:
            block.stream = args[0]

        stack.callback(layer.feed_forward_norm[0].register_forward_pre_hook(keep).remove)
        for index, (norm, sub_layer) in enumerate(zip(layer.feed_forward_norm, layer.feed_forward, strict=True)):
            if index:
                hook = comparing(block, index, norm)
                stack.callback(sub_layer.register_forward_hook(hook, with_kwargs=True).remove)

    def figures(self) -> dict[str, ComposedFigures]:
        """By name of the sub-layer."""
        found = {}
        for name, block in self._blocks.items():
            for index, sums in block.sums.items():
                changed, size, kept, choices = sums.tolist()
                found[f"{name}.feed_forward.{index}"] = ComposedFigures(
                    size=(changed / size) ** 0.5 if size else 0.0, rerouted=1 - kept / choices if choices else None
                )
        return found


def comparing(block: _Block, index: int, norm: nn.Module) -> Any:
    """A forward hook on a later sub-layer."""

    @torch.no_grad()
    def hook(sub_layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        if block.inside:
            return
        block.inside = True
        try:
            without = norm(block.stream)
            alone = sub_layer(without, **kwargs)
        finally:
            block.inside = False
        squares = torch.stack([(output - alone).double().square().sum(), alone.double().square().sum()])
        kept = choices_kept(sub_layer, kwargs.get("routed_by", args[0]), kwargs.get("routed_by", without))
        block.sums[index] = block.sums.get(index, 0) + torch.cat([squares, kept.to(squares)])

    return hook


def choices_kept(sub_layer: nn.Module, hidden: Tensor, without: Tensor) -> Float[Tensor, " 2"]:
    """Return how many of a sub-layer's choices for `hidden` it also makes for `without`, and the number of its choices.

    Both are 0 for a sub-layer without experts.
    """
    if not isinstance(sub_layer, SparseMoE):
        return torch.zeros(2)
    chosen, others = (sub_layer.router(x.flatten(0, -2))[2] for x in (hidden, without))
    kept = (chosen[:, :, None] == others[:, None, :]).any(-1)
    return torch.stack([kept.sum(), torch.ones_like(kept).sum()]).double()
