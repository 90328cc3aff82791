"""What each MoE layer of a stock model is given in a pass, captured by hooks of our own while nothing watches it.

So nothing of the package stands between the model and what is checked against it but the handles' `router`, `experts`,
`block` and `scores`, which other checks hold against the model.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moestro.routing import MoELayer


@dataclass
class Seen:
    """What one layer was given in one pass, with its graph, and which tokens of which row count."""

    layer: MoELayer
    hidden: Tensor
    index: Tensor
    weight: Tensor
    routed: Any
    """What the router returned."""
    rows: list[list[int]]
    """The valid tokens of each row."""

    @property
    def logits(self) -> Tensor:
        """What the router returned for the experts: some routers score more than them."""
        first = self.routed if isinstance(self.routed, Tensor) else self.routed[0]
        return first.reshape(len(self.index), -1)[:, : self.layer.num_experts]


@dataclass
class Stock:
    """One pass of the unwatched model."""

    layers: list[Seen]
    shares: list[float]
    """Label tokens of each row over those of the batch."""


def run(model: nn.Module, inputs: dict[str, Tensor]) -> Any:
    """One pass; the seed is for the families that draw experts at random."""
    torch.manual_seed(1)
    return model(**inputs)


def run_stock(model: nn.Module, inputs: dict[str, Tensor], layers: Sequence[MoELayer]) -> Stock:
    """Run the model as it is, and see what its MoE layers are given."""
    given: dict[str, tuple] = {}
    routed: dict[str, Any] = {}
    with ExitStack() as hooks:
        for layer in layers:
            note_given = lambda _, args, name=layer.name: given.__setitem__(name, args)
            note_routed = lambda _, args, out, name=layer.name: routed.__setitem__(name, out)
            hooks.enter_context(layer.experts.register_forward_pre_hook(note_given))
            hooks.enter_context(layer.router.register_forward_hook(note_routed))
        output = run(model, inputs)
    seen = []
    for layer in layers:
        hidden, index, weight = given[layer.name][:3]
        seen.append(
            Seen(
                layer=layer,
                hidden=hidden.reshape(-1, hidden.shape[-1]),
                index=index,
                weight=weight,
                routed=routed[layer.name],
                rows=valid_tokens(layer, inputs, index),
            )
        )
    return Stock(layers=seen, shares=shares_of_rows(output, inputs))


@contextmanager
def runs(modules: Mapping[str, nn.Module]) -> Iterator[Counter[str]]:
    """How often each module runs."""
    count = Counter[str]()
    with ExitStack() as hooks:
        for name, module in modules.items():
            note = lambda _, args, name=name: count.update([name])
            hooks.enter_context(module.register_forward_pre_hook(note))
        yield count


def valid_tokens(layer: MoELayer, inputs: dict[str, Tensor], index: Tensor) -> list[list[int]]:
    """The tokens of each row that are not padding."""
    tokens = inputs["input_ids"]
    valid = inputs.get("attention_mask", torch.ones_like(tokens))
    if "decoder_input_ids" in inputs and ".decoder." in layer.name:
        valid = torch.ones_like(inputs["decoder_input_ids"])  # the canvas of block diffusion is never padded
    length = valid.shape[1]
    assert valid.numel() == len(index)
    return [[row * length + t for t in range(length) if valid[row, t]] for row in range(len(valid))]


def shares_of_rows(output: Any, inputs: dict[str, Tensor]) -> list[float]:
    """Label tokens by row, over all: those whose logits the model's own loss depends on. Rows count alike without."""
    rows = len(inputs["input_ids"])
    if "labels" not in inputs:
        return [1 / rows] * rows
    (gradient,) = torch.autograd.grad(output.loss, output.logits, retain_graph=True)
    own = [int(row.any(-1).sum()) for row in gradient]
    return [count / sum(own) for count in own]


def edges(seen: Seen, token: int) -> list[int]:
    """The experts that a token goes to. Zaya's tokens that chose to skip the experts show as going to expert 0."""
    experts = seen.index[token].tolist()
    return experts if type(seen.layer.router).__name__ != "ZayaRouter" or seen.weight[token].any() else []


def load(seen: Seen) -> Tensor:
    """Choices per expert, counted one by one."""
    total = torch.zeros(seen.layer.num_experts)
    for row in seen.rows:
        for token in row:
            for expert in edges(seen, token):
                total[expert] += 1
    return total
