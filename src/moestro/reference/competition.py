"""Competition of a whole layer in plain loops over tokens and experts.

Paper: Nguyen et al. 2025, arXiv:2505.13380 (v2), and Pham et al. 2024, arXiv:2402.02526 (v1).
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from moestro.reference.layers import Choice, ExpertWeights, choose, swiglu


class Contest(NamedTuple):
    """One token's competition. All but the outputs and the choice is without gradient."""

    choice: Choice
    """The router's."""
    responses: list[float]
    target: list[float]
    winners: list[int]
    outputs: list[Float[Tensor, " dim"]]
    """Of the winners."""


def respond(output: Float[Tensor, " dim"], kind: str) -> Tensor:
    """One number of an expert's output."""
    d = len(output)
    if kind in ("l2", "rms"):
        length = torch.sqrt(sum((v * v for v in output), torch.zeros(())))
        return length if kind == "l2" else length / math.sqrt(d)
    of_one: dict[str, Callable[[Tensor], Tensor]] = {
        "softplus": lambda v: torch.log(1 + torch.exp(v)),
        "relu": lambda v: v if v > 0 else v * 0,
        "silu": lambda v: v / (1 + torch.exp(-v)),
        "sigmoid": lambda v: 1 / (1 + torch.exp(-v)),
    }
    return torch.stack([of_one[kind](v) for v in output]).sum() / d


def on_scale(
    response: Tensor, expert: int, scale: str, mean: Sequence[float], std: Sequence[float], offset: Sequence[float]
) -> Tensor:
    """A response as it is, over its expert's mean, or standardised, it or its logarithm, plus an offset."""
    if scale == "none":
        return response
    response = torch.log(response) if scale == "log" else response
    return response / mean[expert] if scale == "mean" else (response - mean[expert]) / std[expert] + offset[expert]


def softmax(values: Sequence[Tensor]) -> list[Tensor]:
    """Exponentials over their sum, of the distances from the largest, which change nothing but the overflow."""
    largest = max(v.item() for v in values)
    exponentials = [torch.exp(v - largest) for v in values]
    total = sum(exponentials[1:], exponentials[0])
    return [e / total for e in exponentials]


def competing_layer(
    hidden: Float[Tensor, "tokens dim"],
    router: Float[Tensor, "experts dim"],
    experts: Sequence[ExpertWeights],
    competes: Sequence[bool],
    *,
    response: str,
    response_scale: str = "none",
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    offset: Sequence[float] = (),
    temperature: float = 1.0,
    target: str = "experts",
    weights: str = "softmax",
    through_weights: bool = True,
    forward: bool = True,
    **rule,
) -> tuple[Float[Tensor, "tokens dim"], list[Contest | None]]:
    """The layer's output, and the contest of each token that competes."""
    outputs, contests = [], []
    for x, compete in zip(hidden, competes, strict=True):
        choice = choose(x, router, **rule)
        answers = [swiglu(x, w) for w in experts]
        chosen, shares, contest = choice.experts, choice.weights, None
        if compete:
            raw = [respond(answer, response) for answer in answers]
            scaled = [on_scale(r, e, response_scale, mean, std, offset) for e, r in enumerate(raw)]
            winners = sorted(range(len(experts)), key=lambda e, s=scaled: -s[e].item())[: len(choice.experts)]
            preferred = winners if target == "winners" else list(range(len(experts)))
            q = dict(zip(preferred, softmax([scaled[e].detach() / temperature for e in preferred]), strict=True))
            contest = Contest(
                choice=choice,
                responses=[r.item() for r in raw],
                target=[q[e].item() if e in q else 0.0 for e in range(len(experts))],
                winners=winners,
                outputs=[answers[e] for e in winners],
            )
            if forward:
                total = sum(w.item() for w in choice.weights)
                won = [scaled[e] if through_weights else scaled[e].detach() for e in winners]
                if weights == "softmax":
                    parts = softmax([s / temperature for s in won])
                else:
                    parts = won if weights == "share" else [choice.probabilities[e] for e in winners]
                    parts = [p / sum(parts[1:], parts[0]) for p in parts]
                chosen, shares = winners, [total * p for p in parts]
        y = torch.zeros_like(x)
        for e, weight in zip(chosen, shares, strict=True):
            y = y + weight * answers[e]
        outputs.append(y)
        contests.append(contest)
    return torch.stack(outputs), contests


def distillation(contests: Sequence[Contest], form: str, winners: float = 0.0) -> Tensor:
    """Mean over contests of how far the router's probabilities are from the target."""
    total = torch.zeros(())
    for contest in contests:
        p, q = contest.choice.probabilities, contest.target
        if form == "kl":
            of_token = sum(q[e] * (math.log(q[e]) - torch.log(p[e])) for e in range(len(q)) if q[e] > 0)
        else:
            size = len(q) if form == "relative-mse" else 1
            of_token = sum((size * (p[e] - q[e])) ** 2 for e in range(len(q))) / len(q)
            of_winners = sum((size * (p[e] - q[e])) ** 2 for e in contest.winners) / len(contest.winners)
            of_token = of_token + winners * of_winners
        total = total + of_token
    return total / max(1, len(contests))


def diversity(contests: Sequence[Contest], form: str = "pairs") -> Tensor:
    """Mean over contests of the mean cosine between two winners' outputs."""
    total = torch.zeros(())
    for contest in contests:
        k = len(contest.winners)
        cosines = torch.zeros(())
        for i, a in enumerate(contest.outputs):
            for j, b in enumerate(contest.outputs):
                if i != j:
                    cosines = cosines + (a @ b) / torch.sqrt((a @ a) * (b @ b))
        if k > 1:
            total = total + cosines / (k * (k - 1) if form == "pairs" else k * k)
    return total / max(1, len(contests))
