"""Competition as the papers and their code have it, and ours: keyword arguments of `moestro.AuxLosses`."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from moestro.competition.settings import Compete


def v1_paper(num_blocks: int) -> dict[str, Any]:
    """Lengths, a softmax over the winners' for weights and target; mean squared error.

    Paper: Pham et al. 2024, arXiv:2402.02526. Departs from the paper: router and target are compared expert by expert,
    and the target is detached; rate, cap and coefficients are those of v2.
    """
    rule = Compete(response="l2", target="winners", weights="softmax", **AS_PUBLISHED)
    return {"distillation": 1e-3 * num_blocks, "distillation_form": "mse", "compete": rule}


def v2_paper(num_blocks: int) -> dict[str, Any]:
    """Mean softplus; winners weighed by their part of the sum; mean squared error, more on the winners; diversity.

    Paper: Nguyen et al. 2025, arXiv:2505.13380, with the coefficients of its language models. They are given per layer
    and add up over layers; ours are a mean over blocks.
    """
    return v2_code(num_blocks) | {"distillation_winners": 0.2, "diversity_form": "pairs"}


def v2_code(num_blocks: int) -> dict[str, Any]:
    """What the public code of v2 does: no extra weight on the winners, diversity over k squared.

    Left out, as they change no value or cannot be wanted: losers with graph, competition in evaluation and none where
    the input is frozen, a schedule that starves the last layers, routers that start alike, and a balance loss on
    competition's own scores, through two softmaxes.
    """
    rule = Compete(response="softplus", weights="share", **AS_PUBLISHED)
    return {
        "distillation": 1e-3 * num_blocks,
        "distillation_form": "mse",
        "diversity": 5e-3 * num_blocks,
        "diversity_form": "squares",
        "compete": rule,
    }


def ours(num_blocks: int) -> dict[str, Any]:
    """Logarithms of lengths, standardised, wins balanced; some tokens of every sequence; Kullback-Leibler divergence.

    What favours it: docs/results/compete.md. The weight is 0.1 at the six blocks it was measured with.
    """
    return {"distillation": num_blocks / 60, "compete": Compete()}


AS_PUBLISHED: Mapping[str, Any] = MappingProxyType(
    {
        "response_scale": "none",
        "balance_winners": 0.0,
        "through_weights": True,
        "balance_competing": False,
        "by": "steps",
        "rate": 0.07,
        "max_layers": 3,
        "tie_break": 0.0,
    }
)
"""What both papers share: responses as they are, steps in which some layers compete with all tokens."""
PRESETS: Mapping[str, Callable[[int], dict[str, Any]]] = MappingProxyType(
    {"v1-paper": v1_paper, "v2-paper": v2_paper, "v2-code": v2_code, "ours": ours}
)
"""Each is given the number of blocks that hold experts: losses are averaged over them."""
