"""The slow truth of auxiliary losses on a stock model: loops over tokens, and over the eager weights of its experts.

What each layer was given is captured by hooks of our own on the unwatched model, so that nothing of the package stands
between the model and this reference but the handles' `router`, `experts`, `block` and `scores`, which other checks hold
against the model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moestro import reference
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

    output: Any
    layers: list[Seen]
    shares: list[float]
    """Label tokens of each row over those of the batch."""


def run_stock(model: nn.Module, inputs: dict[str, Tensor], layers: Sequence[MoELayer]) -> Stock:
    """Run the model as it is, and see what its MoE layers are given."""
    given: dict[str, tuple] = {}
    routed: dict[str, Any] = {}
    handles = []
    for layer in layers:
        handles += [
            layer.experts.register_forward_pre_hook(lambda _, args, name=layer.name: given.__setitem__(name, args)),
            layer.router.register_forward_hook(lambda _, args, out, name=layer.name: routed.__setitem__(name, out)),
        ]
    torch.manual_seed(1)
    output = model(**inputs)
    for handle in handles:
        handle.remove()
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
    return Stock(output=output, layers=seen, shares=shares_of_rows(output, inputs))


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


def one_expert(experts: nn.Module, expert: int, x: Tensor) -> Tensor:
    """One expert on one token, from its weights alone. Only the gate, which is elementwise, is the model's own."""
    if hasattr(experts, "mlp"):  # dbrx: all experts of a layer in flat matrices
        w1, v1, w2 = (getattr(experts.mlp, n).view(experts.num_experts, -1, len(x))[expert] for n in ("w1", "v1", "w2"))
        return w2.T @ (experts.mlp.activation_fn(w1 @ x) * (v1 @ x))
    gated = getattr(experts, "has_gate", True)
    inside = projection(experts, "gate_up_proj" if gated else "up_proj", expert, x)
    inside = experts._apply_gate(inside) if gated else experts.act_fn(inside)
    y = projection(experts, "down_proj", expert, inside)
    return experts.post_expert_norm(y) if getattr(experts, "has_post_expert_norm", False) else y


def projection(experts: nn.Module, name: str, expert: int, x: Tensor) -> Tensor:
    """One of an expert's matrices on a vector, and its bias."""
    weight, bias = getattr(experts, name)[expert], getattr(experts, f"{name}_bias", None)
    y = x @ weight if getattr(experts, "is_transposed", False) else weight @ x
    return y if bias is None else y + bias[expert]


def probabilities(scores: str, logits: Tensor) -> Tensor:
    """One token's preferences, of sum 1."""
    if scores == "softmax":
        affinity = (logits - logits.max()).exp()
    elif scores == "sigmoid":
        affinity = 1 / (1 + (-logits).exp())
    elif scores == "sqrtsoftplus":
        affinity = (1 + logits.exp()).log().sqrt()
    else:
        affinity = logits
    return affinity / affinity.sum()


def choices(seen: Seen, row: list[int]) -> list[reference.Choice]:
    """Each token's routing."""
    kind = str(seen.layer.scores)
    return [
        reference.Choice(edges(seen, t), list(seen.weight[t]), probabilities(kind, seen.logits[t]), seen.logits[t])
        for t in row
    ]


def orthogonality(seen: Seen, row: list[int]) -> Tensor:
    """Mean over the row's tokens of how much the outputs of a token's experts point the same way."""
    total = seen.hidden.new_zeros(())
    for t in row:
        outputs = [one_expert(seen.layer.experts, e, seen.hidden[t]) for e in edges(seen, t)]
        total = total + reference.overlap(outputs, form="projection")
    return total / len(row)


def slot_scores(seen: Seen, row: list[int]) -> list[Tensor]:
    """Each token's s: its probabilities at its experts, of sum 1."""
    return [reference.sparse_scores(c.probabilities, c.experts) for c in choices(seen, row)]


def variance(seen: Seen, row: list[int]) -> Tensor:
    """Against the mean of the step before, which was the same pass: that of all valid tokens."""
    everything = slot_scores(seen, [t for tokens in seen.rows for t in tokens])
    return reference.variance(slot_scores(seen, row), mean=reference.mean_scores(everything).detach())


def balance(seen: Seen, row: list[int]) -> Tensor:
    """Within the row."""
    return reference.load_balance(choices(seen, row))


def router_z(seen: Seen, row: list[int]) -> Tensor:
    """Mean squared log-sum-exp of the logits."""
    return reference.router_z(choices(seen, row))


def total(stock: Stock, loss: Any, layers: Sequence[Seen]) -> Tensor:
    """Rows by their share, summed over the layers where the loss applies, divided by the number of MoE blocks."""
    blocks = len({seen.layer.block for seen in stock.layers})
    value = torch.zeros(())
    for seen in layers:
        for share, row in zip(stock.shares, seen.rows, strict=True):
            value = value + share * loss(seen, row)
    return value / blocks
