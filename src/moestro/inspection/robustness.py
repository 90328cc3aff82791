"""How much a model's loss rises when its routing is perturbed at evaluation, one layer at a time and all.

Paper: Su et al. 2024 (CartesianMoE), arXiv:2410.16077: every token's routed expert of the highest probability is
disabled. Departs from the paper: it does not say in which layers; here every test states its scope.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import nn

from moestro.adapters.layers import labels
from moestro.adapters.reroute import reroute
from moestro.errors import Misuse
from moestro.inspection.places import in_blocks, places
from moestro.perturbations import add_noise, disable, replace_at_random
from moestro.routing import MoELayer, Reroute

NOISE = (0.1, 0.3, 1.0)
"""In units of the standard deviation of a token's logits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scope:
    """The layers that a test perturbs."""

    words: str
    """ "layer 3", "first of layers 1 to 3", "all layers", "all layers but layer 0"."""
    label: str
    """The same for an axis: "3", "first", "all"."""
    layers: tuple[str, ...]
    """Their names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RobustnessTest:
    """One pass over the text under one perturbation."""

    kind: Literal["disabled", "replaced", "noise"]
    """Top experts disabled, top experts replaced at random, or noise on the logits."""
    amount: float
    """How many experts of each token, or how much noise."""
    scope: Scope
    loss: float | None = None
    """Nats per token; None where it could not be tested."""
    rise: float | None = None
    """Above the undisturbed loss."""
    perplexity: float | None = None
    obstacle: str = ""
    """Why it could not be tested."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Robustness:
    """How much one checkpoint's loss rises under each perturbation."""

    loss: float
    """Undisturbed."""
    perplexity: float | None
    tests: tuple[RobustnessTest, ...]
    looked_up: str
    """The layers whose choice is looked up by token, so that nothing can be disabled there; empty without them."""
    seed: int = 0
    """Of what is drawn at random."""


def scopes(layers: Sequence[MoELayer]) -> list[Scope]:
    """Every layer singly; and where several blocks hold several, the first of each block, the second, and so on."""
    found = [
        Scope(words=f"layer {label}", label=label, layers=(layer.name,))
        for layer, label in zip(layers, labels(layers), strict=True)
    ]
    for ordinal, alike in in_blocks(layers).items():
        names = tuple(layer.name for layer in alike)
        if len(names) > 1:
            found.append(Scope(words=f"{ordinal} of {places(alike)}", label=ordinal, layers=names))
    return found


def everywhere(layers: Sequence[MoELayer], but: Sequence[MoELayer] = ()) -> Scope:
    """All of the layers, without some."""
    names = tuple(layer.name for layer in layers if layer not in but)
    return Scope(words=f"all layers but {places(but)}" if but else "all layers", label="all", layers=names)


def planned(layers: Sequence[MoELayer], count: int = 1) -> list[RobustnessTest]:
    """Which tests to make: 1 to `count` experts disabled in every scope, and all else in all layers."""
    looked_up = [layer for layer in layers if layer.scores is None]
    learned = everywhere(layers, looked_up)
    narrow = [scope for scope in scopes(layers) if set(scope.layers) <= set(learned.layers)]
    tests: list[RobustnessTest] = []
    for number in range(1, count + 1):
        if learned.layers:
            tests += [
                RobustnessTest(kind="disabled", amount=float(number), scope=scope) for scope in (*narrow, learned)
            ]
        tests.append(RobustnessTest(kind="replaced", amount=float(number), scope=everywhere(layers)))
    if learned.layers:
        tests += [RobustnessTest(kind="noise", amount=scale, scope=learned) for scale in NOISE]
    return tests


def perturbation(test: RobustnessTest, seed: int) -> Reroute:
    """The reroute of a test."""
    if test.kind == "noise":
        return add_noise(test.amount, seed)
    return disable(int(test.amount)) if test.kind == "disabled" else replace_at_random(int(test.amount), seed)


def measure_robustness(
    model: nn.Module,
    layers: Sequence[MoELayer],
    undisturbed: float,
    loss_of: Callable[[AbstractContextManager[Any], str], float],
    *,
    count: int = 1,
    seed: int = 0,
) -> Robustness:
    """Make all tests. `loss_of(context, words)`: the model's loss within a context that reroutes it."""
    plan = planned(layers, count)
    tests = []
    for number, test in enumerate(plan, start=1):
        rerouted = reroute(model, dict.fromkeys(test.scope.layers, perturbation(test, seed)))
        try:
            loss = loss_of(rerouted, f"robustness, test {number} of {len(plan)}")
        except Misuse as error:  # some rules have no expert to spare, and say so
            tests.append(replace(test, obstacle=str(error)))
            continue
        tests.append(with_loss(test, loss, undisturbed))
    looked_up = [layer for layer in layers if layer.scores is None]
    return Robustness(
        loss=undisturbed,
        perplexity=perplexity_of(undisturbed),
        tests=tuple(tests),
        looked_up=places(looked_up) if looked_up else "",
        seed=seed,
    )


def with_loss(test: RobustnessTest, loss: float, undisturbed: float) -> RobustnessTest:
    """A test with its result."""
    if not math.isfinite(loss):
        return replace(test, obstacle="the loss is not finite")
    return replace(test, loss=loss, rise=loss - undisturbed, perplexity=perplexity_of(loss))


def perplexity_of(loss: float) -> float | None:
    """Its exponential; None beyond what a float holds."""
    return math.exp(loss) if loss < 700 else None
