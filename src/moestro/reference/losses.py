"""Auxiliary losses in plain loops over tokens, experts and pairs."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from moestro.reference.layers import Choice


def load_balance(choices: Sequence[Choice], *, load: Sequence[float] | None = None) -> Tensor:
    """E sum_e f_e P_e over the given tokens; f counts all their choices unless a load is given."""
    num_experts = len(choices[0].probabilities)
    if load is None:
        count = [0.0] * num_experts
        for choice in choices:
            for e in choice.experts:
                count[e] += 1
        load = [c / sum(count) for c in count]
    total = choices[0].probabilities.new_zeros(())
    for e in range(num_experts):
        mass = choices[0].probabilities.new_zeros(())
        for choice in choices:
            mass = mass + choice.probabilities[e]
        total = total + load[e] * mass / len(choices)
    return num_experts * total


def router_z(choices: Sequence[Choice]) -> Tensor:
    """Mean squared log-sum-exp of the logits."""
    total = choices[0].logits.new_zeros(())
    for choice in choices:
        total = total + torch.log(torch.exp(choice.logits).sum()) ** 2
    return total / len(choices)


def overlap(
    outputs: Sequence[Float[Tensor, " dim"]],
    *,
    form: str,
    eps: float = 1e-6,
    ridge: float = 0.0,
    shares: Sequence[float] | None = None,
) -> Tensor:
    """How much one token's expert outputs point the same way.

    Paper: Guo et al. 2025, arXiv:2505.22323, Eq. 6 (`projection`), literally; `span` is what its code computes.
    """
    total = torch.zeros((), dtype=outputs[0].dtype) if outputs else torch.zeros(())
    for j, y in enumerate(outputs):
        others = [(k, other) for k, other in enumerate(outputs) if k != j]
        if form == "span":
            total = total + squared_projection_on_span(y, [other for _, other in others], ridge)
            continue
        for k, other in others:
            if form == "projection":
                projection = (y @ other) / (other @ other + eps) * other
                total = total + projection @ projection
            elif y.any() and other.any():
                cosine = (y @ other) / torch.sqrt((y @ y) * (other @ other))
                total = total + cosine**2 * (1.0 if shares is None else shares[j] * shares[k])
    return total


def squared_projection_on_span(
    y: Float[Tensor, " dim"], others: Sequence[Float[Tensor, " dim"]], ridge: float = 0.0
) -> Tensor:
    """Squared length of y's projection on the span of the others, by Gram-Schmidt.

    A ridge gives every other vector one more coordinate of its own, sqrt(ridge) times its length.
    """
    basis: list[Tensor] = []
    y = torch.cat([y, y.new_zeros(len(others))])
    for k, other in enumerate(others):
        own = [other.new_zeros(()) for _ in others]
        if other.any():
            own[k] = torch.sqrt(ridge * (other @ other)) if ridge else own[k]
        rest = torch.cat([other, torch.stack(own)])
        size = float(rest.detach().norm())
        for direction in basis:
            rest = rest - (rest @ direction) * direction
        if float(rest.detach().norm()) > 1e-9 * size:  # else it lies in the span already
            basis.append(rest / rest.norm())
    total = y.new_zeros(())
    for direction in basis:
        total = total + (y @ direction) ** 2
    return total


def sparse_scores(probabilities: Float[Tensor, " experts"], experts: Sequence[int]) -> Float[Tensor, " experts"]:
    """One token's s: its probabilities at the chosen experts, of sum 1, and 0 elsewhere."""
    total = probabilities.new_zeros(())
    for e in experts:
        total = total + probabilities[e]
    row = [probabilities.new_zeros(()) for _ in probabilities]
    for e in experts:
        row[e] = probabilities[e] / total
    return torch.stack(row)


def mean_scores(scores: Sequence[Float[Tensor, " experts"]]) -> Float[Tensor, " experts"]:
    """sbar_j = mean_i s_ij."""
    total = torch.zeros_like(scores[0])
    for row in scores:
        total = total + row
    return total / len(scores)


def variance(
    scores: Sequence[Float[Tensor, " experts"]],
    *,
    form: str = "column",
    mean: Float[Tensor, " experts"] | None = None,
    cap: float | None = None,
) -> Tensor:
    """Mean over tokens of -(1/n) sum_j (s_ij - sbar_j)^2, with a given mean or, with its gradient, the tokens' own.

    Paper: Guo et al. 2025, arXiv:2505.22323, Eq. 7. In the row form sbar_j is 1/n.
    """
    num_experts = len(scores[0])
    mean = mean_scores(scores) if mean is None else mean
    total = scores[0].new_zeros(())
    for row in scores:
        squared = row.new_zeros(())
        for e in range(num_experts):
            squared = squared + (row[e] - (mean[e] if form == "column" else 1 / num_experts)) ** 2
        total = total - (squared if cap is None or squared <= cap else cap) / num_experts
    return total / len(scores)


def router_orthogonality(weight: Float[Tensor, "experts dim"]) -> Tensor:
    """Mean of (cosine of two rows, minus 1 for a row with itself) squared; zero rows have cosine 0."""
    total = weight.new_zeros(())
    for i, row in enumerate(weight):
        for j, other in enumerate(weight):
            both = row.any() and other.any()
            cosine = (row @ other) / torch.sqrt((row @ row) * (other @ other)) if both else 0.0
            total = total + (cosine - float(i == j)) ** 2
    return total / len(weight) ** 2


def simbal(weight: Float[Tensor, "experts dim"]) -> Tensor:
    """Sum of |<row i, row j> - I_ij|."""
    total = weight.new_zeros(())
    for i, row in enumerate(weight):
        for j, other in enumerate(weight):
            total = total + ((row @ other) - float(i == j)).abs()
    return total
