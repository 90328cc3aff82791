"""What there is to choose about competition, checked without torch: recipes are planned by it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from moestro.competition.amounts import number_competing, share_of_steps
from moestro.errors import Misuse
from moestro.gate.ranges import Number, Positive, PositiveShare, Seed, Steps, Weight, check_fields

By = Literal["tokens", "steps"]

Scale = Literal["none", "mean", "standard", "log"]
"""Responses as they are; over each expert's running mean; less that mean, over its running standard deviation; the same
of their logarithms."""

Weights = Literal["softmax", "share", "router"]
"""Shares of the winners: softmax of their scaled responses (v1), parts of their sum (v2), or the router's own scores
at them, which then get the gradient of the task."""

Target = Literal["experts", "winners"]
"""Softmax of the scaled responses over all experts (v2), or over the winners and 0 elsewhere (v1)."""

Response = Callable[[Any], Any]
"""A function of outputs, Float["*rows dim"], that returns one number of each, Float["*rows"]."""

NAMES = ("l2", "rms", "softplus", "relu", "silu", "sigmoid")
"""Names of the functions in `moestro.competition.responses.RESPONSES`."""
POSITIVE = frozenset({"l2", "rms", "softplus", "relu", "sigmoid"})
"""Those that are never negative, so that a winner's part of their sum is one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compete:
    """When experts compete, how the winners are found and weighed, and what the router is to learn from it."""

    response: Response | str = "l2"
    """l2, rms, softplus, relu, silu or sigmoid (see `moestro.competition.responses`), or a function of outputs."""
    response_scale: Scale = "log"
    """What makes responses comparable between experts; log takes responses that are never negative (lengths are
    nearly log-normal)."""
    balance_winners: Weight = 0.1
    """How fast an offset per expert moves against what it won, so that all win about equally often and the router
    learns a balanced choice: per step in which a layer competes and 100 % of wins above the mean, in mean standard
    deviations of a token's strengths. It acts on target and shares too. 0: never."""
    temperature: Positive = 1.0
    """Softmax temperature of the target and of the winners' weights."""
    target: Target = "experts"
    forward: bool = True
    """Competing tokens go to the winners; otherwise the router's choice stands, and is only taught."""
    weights: Weights = "softmax"
    through_weights: bool = False
    """Experts get gradient through their shares too, which takes every chosen expert's output by itself."""
    balance_competing: bool = True
    """Losses on the router's scores (balance, variance, z) reach the router from competing tokens too."""
    by: By = "tokens"
    """tokens: some of each sequence, in every layer and step. steps: all of them, in some layers and steps."""
    rate: PositiveShare = 1 / 32
    """Share of the tokens that compete, rounded up in each sequence; or of the steps in which a layer does."""
    max_layers: Steps | None = None
    """Largest number of layers that compete in one step; requires `by = "steps"`."""
    start_step: Number = 0
    end_step: Steps | None = None
    """Experts compete from `start_step` up to, but not including, `end_step` (None: to the end)."""
    tie_break: Weight = 1e-3
    """A random number up to this is added to scaled responses where winners are chosen: experts that are copies of
    each other, as after upcycling, win by chance."""
    seed: Seed = 0

    def __post_init__(self) -> None:
        if not isinstance(self.response, str) and not callable(self.response):
            raise Misuse(f"response must be a name or a function of outputs, got {self.response!r}")
        check_fields(self)
        if isinstance(self.response, str) and self.response not in NAMES:
            raise Misuse(f"response must be one of {', '.join(NAMES)}, got {self.response!r}")
        if self.max_layers is not None and self.by == "tokens":
            raise Misuse("max_layers requires by = steps, got by = tokens: set by to steps, or max_layers to none")
        if self.balance_winners and self.response_scale not in ("standard", "log"):
            raise Misuse(
                f"balance_winners needs response_scale = standard or log, got {self.response_scale}: set "
                "balance_winners to 0"
            )
        if self.end_step is not None and self.end_step <= self.start_step:
            raise Misuse(f"end_step must lie after start_step ({self.start_step}), got {self.end_step}")
        positive = callable(self.response) or self.response in POSITIVE
        if self.response_scale == "log" and not positive:
            raise Misuse(f"response_scale = log needs a response that is never negative, got {self.response}")
        if self.weights == "share" and (self.response_scale in ("standard", "log") or self.response not in POSITIVE):
            raise Misuse(f"weights = share needs one of the responses {', '.join(sorted(POSITIVE))}, not standardised")
        if self.through_weights and (self.weights == "router" or not self.forward):
            raise Misuse("through_weights needs forward, and weights that are made of responses")

    def share(self, num_layers: int, sequence_length: int) -> float:
        """Of the tokens of sequences of that length, in so many layers, how many compete unless competition rests."""
        if self.by == "tokens":
            return number_competing(self.rate, sequence_length) / sequence_length
        return share_of_steps(self.rate, self.max_layers, num_layers)

    def rests(self, step: int) -> bool:
        """Whether nobody competes in this step."""
        return step < self.start_step or (self.end_step is not None and step >= self.end_step)


def check_lessons(rule: Compete | None, *, distillation: float, diversity: float) -> None:
    """Raise Misuse if one of the losses on competition has a weight, and `rule` gives it nothing to learn from."""
    if rule is None and (distillation or diversity):
        raise Misuse("distillation and diversity learn from competition: set compete, or both to 0")
    if diversity and rule is not None and not rule.forward:
        raise Misuse("diversity looks at winners that run: set forward, or diversity to 0")
