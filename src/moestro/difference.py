"""What a comparison says of two recipes, as plain records. `moestro.statistics` computes them."""

from dataclasses import dataclass
from typing import Literal

from moestro.gate.ranges import Positive, check

Verdict = Literal["better", "worse", "equivalent", "not answered", "too few seeds to rank", "failed"]

MIN_SEEDS = 3
ALPHA = 0.05
"""Level of every test, after Holm's adjustment."""
MARGIN = 0.02
"""Default equivalence margin in nats per token: 2 % of the perplexity."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A recipe's endpoint minus the first recipe's, paired by seed, over the seeds with which both finished.

    `interval` and all test results are None if there is no test: with fewer than three seeds; if every seed gave the
    same difference (their spread then says nothing about noise); or if one of the recipe's own runs failed (its other
    runs are then a biased sample).
    """

    by_seed: tuple[float, ...]
    mean: float
    deviation: float | None  # sample standard deviation of `by_seed`; None with one seed
    interval: tuple[float, float] | None  # 95 %, not adjusted for the number of recipes
    p: float | None
    p_holm: float | None
    minimum_detectable: float | None  # the true difference that a new study of this size detects four times in five
    verdict: Verdict
    margin: float | None = None  # the equivalence margin; None in files of earlier versions
    p_equivalence: float | None = None  # of the hypothesis that the true difference is at least the margin in size
    p_equivalence_holm: float | None = None
    minimum_margin: float | None = (
        None  # the margin within which a new study shows an equal recipe equivalent four times in five
    )

    @property
    def within_margin(self) -> bool:
        """True if the true difference is shown to be below the margin; the verdict may still be better or worse."""
        return self.p_equivalence_holm is not None and self.p_equivalence_holm < ALPHA


@dataclass(frozen=True, slots=True, kw_only=True)
class DocumentBootstrap:
    """How far the difference per token hangs on which documents were held out, for the same trained models."""

    difference: float
    interval: tuple[float, float] | None  # 95 % percentiles; None with a single document
    documents: int
    resamples: int
    seed: int


def check_margin(margin: float) -> float:
    """Return the margin; raise Misuse unless it is above 0 and finite."""
    check("margin", margin, Positive)
    return margin
