"""Which differences between recipes are more than noise.

Recipes are paired by seed: both arms of a pair see the same data in the same order and share what initialisation they
can, so the noise that a seed brings to both cancels. The interval and the p-value are those of the paired t test over
seeds; p-values are adjusted over recipes by Holm's method. The document bootstrap answers another question (other
held-out documents, the same trained models) and is therefore kept apart: it never decides a verdict.

Every endpoint here is a loss: lower is better, and a difference is the recipe minus the first recipe.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike
from scipy import optimize, stats

from moestro.errors import Misuse

Verdict = Literal["better", "worse", "not answered", "too few seeds to rank"]

MIN_SEEDS = 3
CONFIDENCE = 0.95
ALPHA = 0.05
POWER = 0.8


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A recipe's endpoint minus the first recipe's, paired by seed.

    `interval`, `p`, `p_holm` and `minimum_detectable` are None where there is no paired t test: with fewer than three
    seeds, or where every seed gave the same difference (then the seeds varied nothing, and their spread says nothing
    about noise).
    """

    by_seed: tuple[float, ...]
    mean: float
    deviation: float | None  # sample standard deviation of `by_seed`; None with one seed
    interval: tuple[float, float] | None  # 95 %, not adjusted for the number of recipes
    p: float | None
    p_holm: float | None
    minimum_detectable: float | None
    verdict: Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class DocumentBootstrap:
    """How far the difference per token hangs on which documents were held out, for the same trained models."""

    difference: float
    interval: tuple[float, float] | None  # 95 % percentiles; None with a single document
    documents: int
    resamples: int
    seed: int


def compare_with_first(endpoints: Sequence[Sequence[float]]) -> tuple[Difference, ...]:
    """The paired difference of every recipe but the first to the first, judged together.

    Args:
        endpoints: per recipe, its endpoint for every seed, seeds in the same order.

    Raises:
        Misuse: as `paired_difference`.
    """
    first, *others = endpoints
    alone = [paired_difference(values, first) for values in others]
    adjusted = iter(holm([d.p for d in alone if d.p is not None]))
    return tuple(_judged(d, None if d.p is None else next(adjusted)) for d in alone)


def paired_difference(recipe: Sequence[float], first: Sequence[float]) -> Difference:
    """The mean of `recipe - first` over seeds with its paired t interval, judged as the only recipe.

    Raises:
        Misuse: the two differ in length, are empty, or hold a value that is not finite.
    """
    a, b = np.asarray(recipe, dtype=np.float64), np.asarray(first, dtype=np.float64)
    _check_pairs(a, b)
    by_seed = a - b
    seeds = len(by_seed)
    deviation = float(by_seed.std(ddof=1)) if seeds > 1 else None
    interval = p = minimum_detectable = None
    if deviation is not None and seeds >= MIN_SEEDS and not _is_rounding(deviation, a, b):
        test = stats.ttest_rel(a, b)
        low, high = test.confidence_interval(CONFIDENCE)
        interval, p = (float(low), float(high)), float(test.pvalue)
        minimum_detectable = minimum_detectable_effect(deviation, seeds)
    difference = Difference(
        by_seed=tuple(by_seed.tolist()),
        mean=float(by_seed.mean()),
        deviation=deviation,
        interval=interval,
        p=p,
        p_holm=None,
        minimum_detectable=minimum_detectable,
        verdict="not answered",
    )
    return _judged(difference, p)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted for their number: claiming those below alpha keeps the chance of any false claim below alpha.

    Source: Holm 1979, "A simple sequentially rejective multiple test procedure", Scand. J. Statist. 6: the i-th
    smallest of m is multiplied by m - i + 1, and none may fall below a smaller one's.
    """
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    factors = len(p) - np.arange(len(p))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(factors * p[order]), 1.0)
    return adjusted.tolist()


def minimum_detectable_effect(deviation: float, seeds: int, *, alpha: float = ALPHA, power: float = POWER) -> float:
    """The true difference that a two-sided paired t test finds with probability `power`, in the deviation's unit.

    Args:
        deviation: standard deviation of the paired differences. Taken from the same few seeds it is itself uncertain.
        seeds: number of pairs, at least 2.
        alpha: the test's level, before any adjustment for the number of recipes.
        power: between `alpha` and 1.

    Source: the noncentral t distribution of the paired t statistic, with noncentrality effect * sqrt(seeds) /
    deviation.
    """
    if seeds < 2:
        raise Misuse(f"a minimum detectable effect needs at least 2 seeds, got {seeds}")
    return _noncentrality(seeds - 1, alpha, power) * deviation / math.sqrt(seeds)


@cache
def _noncentrality(freedom: int, alpha: float, power: float) -> float:
    """The noncentrality at which the t test with that many degrees of freedom has that power."""
    critical = stats.t.isf(alpha / 2, freedom)
    # The other tail (a large effect found with the wrong sign) is below 1e-4 at any power worth asking for.
    missing_power = lambda noncentrality: stats.nct.sf(critical, freedom, noncentrality) - power
    return float(optimize.root_scalar(missing_power, bracket=(0.0, 2 * critical + 5)).root)


def verdict(difference: Difference) -> Verdict:
    """What the seeds allow to be said of the recipe against the first.

    "better" and "worse" need all of: three seeds, a Holm-adjusted p below 0.05 (which implies a 95 % interval without
    zero), and a mean at least as large as the minimum detectable effect. The last is the strictest for few seeds: it
    asks the t statistic for the value that a test with 80 % power expects, so that a difference which such a study
    would mostly have missed is not claimed.
    """
    if len(difference.by_seed) < MIN_SEEDS:
        return "too few seeds to rank"
    if difference.interval is None or difference.p_holm is None or difference.minimum_detectable is None:
        return "not answered"
    if difference.p_holm >= ALPHA or abs(difference.mean) < difference.minimum_detectable:
        return "not answered"
    return "better" if difference.mean < 0 else "worse"


def document_bootstrap(
    recipe: ArrayLike, first: ArrayLike, tokens: ArrayLike, *, seed: int = 0, resamples: int = 9_999
) -> DocumentBootstrap:
    """The interval of the difference in loss per token, `recipe - first`, when held-out documents are drawn anew.

    Args:
        recipe: per document, the summed negative log-likelihood (nats), averaged over seeds.
        first: the same of the first recipe, documents in the same order.
        tokens: per document, the number of tokens that were predicted; at least one.
        seed: of the drawing; the result depends on nothing else that is random.
        resamples: how often the documents are drawn.

    Raises:
        Misuse: lengths differ, there is no document, one has no token, or a value is not finite.
    """
    a, b, count = (np.asarray(x, dtype=np.float64) for x in (recipe, first, tokens))
    _check_pairs(a, b)
    if count.shape != a.shape or not (np.isfinite(count) & (count >= 1)).all():
        raise Misuse("tokens must hold a count of at least 1 for every document")
    per_token = _per_token(a - b, count)
    return DocumentBootstrap(
        difference=float(per_token),
        interval=_percentile_interval(a - b, count, seed, resamples) if len(count) > 1 else None,
        documents=len(count),
        resamples=resamples,
        seed=seed,
    )


def _percentile_interval(
    nll: Float[np.ndarray, " documents"], tokens: Float[np.ndarray, " documents"], seed: int, resamples: int
) -> tuple[float, float]:
    result = stats.bootstrap(
        (nll, tokens),
        _per_token,
        paired=True,
        vectorized=True,
        method="percentile",
        confidence_level=CONFIDENCE,
        n_resamples=resamples,
        batch=max(1, 2_000_000 // len(tokens)),  # bounds memory: two arrays of this many doubles and their indices
        rng=np.random.default_rng(seed),
    )
    low, high = result.confidence_interval
    return float(low), float(high)


def _per_token(
    nll: Float[np.ndarray, "*draws documents"], tokens: Float[np.ndarray, "*draws documents"], axis: int = -1
) -> Float[np.ndarray, "*draws"] | np.float64:
    return nll.sum(axis=axis) / tokens.sum(axis=axis)


def _judged(difference: Difference, p_holm: float | None) -> Difference:
    adjusted = replace(difference, p_holm=p_holm)
    return replace(adjusted, verdict=verdict(adjusted))


def _is_rounding(deviation: float, a: Float[np.ndarray, " seeds"], b: Float[np.ndarray, " seeds"]) -> bool:
    """Whether a spread of `a - b` is no more than the rounding of values of their size."""
    return deviation <= 8 * float(np.finfo(np.float64).eps) * float(np.maximum(np.abs(a), np.abs(b)).max())


def _check_pairs(a: Float[np.ndarray, "..."], b: Float[np.ndarray, "..."]) -> None:
    if a.ndim != 1 or a.shape != b.shape or len(a) == 0:
        raise Misuse(
            f"paired values must be two lists of the same length, at least 1, got shapes {a.shape} and {b.shape}"
        )
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise Misuse("paired values must be finite")
