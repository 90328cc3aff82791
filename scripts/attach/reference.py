"""The slow truth of auxiliary losses on a stock model: loops over tokens, and over the eager weights of its experts."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from attach.stock import Seen, Stock, edges
from moestro import reference


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
        total = total + reference.overlap(outputs, form="cosine")
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


def total(stock: Stock, loss: Callable[[Seen, list[int]], Tensor], layers: Sequence[Seen]) -> Tensor:
    """Rows by their share, summed over the layers where the loss applies, divided by the number of MoE blocks."""
    blocks = len({seen.layer.block for seen in stock.layers})
    value = torch.zeros(())
    for seen in layers:
        for share, row in zip(stock.shares, seen.rows, strict=True):
            value = value + share * loss(seen, row)
    return value / blocks
