"""Test which differences between recipes exceed noise, and which are smaller than a margin.

Recipes are paired by seed: both arms of a pair see the same data in the same order and share what initialisation they
can, so the noise that a seed brings to both cancels. One rule decides (`verdict`): a recipe is better or worse if the
p-value of its paired t test over seeds, adjusted over recipes by Holm's method, is below 0.05. Otherwise it is
equivalent if two one-sided tests show, at the same level, that the true difference lies within a margin. The document
bootstrap answers another question (other held-out documents, the same trained models) and is therefore kept apart: it
never decides a verdict.

Every endpoint here is a loss: lower is better, and a difference is the recipe minus the first recipe.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike
from scipy import stats

from moestro.difference import ALPHA, MARGIN, MIN_SEEDS, Difference, DocumentBootstrap, Verdict, check_margin
from moestro.errors import Misuse
from moestro.power import minimum_detectable_effect, minimum_margin

CONFIDENCE = 0.95
_LARGEST = 1e100
"""Largest value that can safely be squared and summed; a float32 loss is far below."""


def compare_with_first(
    endpoints: Sequence[Sequence[float | None]], *, margin: float = MARGIN
) -> tuple[Difference | None, ...]:
    """Return the paired difference of every other recipe to the first, with p-values adjusted over recipes.

    A recipe gets None if there is no seed that both it and the first recipe finished.

    Args:
        endpoints: per recipe, its endpoint for every seed, seeds in the same order; None for a run that failed.
        margin: equivalence margin, in the endpoints' unit.

    Raises:
        Misuse: as `paired_difference`.
    """
    first, *others = endpoints
    alone = [_difference(values, first, check_margin(margin)) for values in others]
    p = holm([d.p for d in alone if d is not None and d.p is not None])
    p_equivalence = holm([d.p_equivalence for d in alone if d is not None and d.p_equivalence is not None])
    adjusted = iter(zip(p, p_equivalence, strict=True))
    return tuple(d if d is None or d.p is None else _adjusted(d, *next(adjusted), tested=len(p)) for d in alone)


def paired_difference(recipe: Sequence[float], first: Sequence[float], *, margin: float = MARGIN) -> Difference:
    """Return the difference `recipe - first` over seeds with its tests, without adjustment for other recipes.

    Raises:
        Misuse: the two differ in length, are empty, or hold a value that is not finite or beyond 1e100; the margin is
            not above 0 and finite.
    """
    (found,) = compare_with_first([first, recipe], margin=margin)
    assert found is not None  # no run failed
    return found


def _difference(recipe: Sequence[float | None], first: Sequence[float | None], margin: float) -> Difference | None:
    """Return the difference with its tests, not yet adjusted for the number of recipes."""
    failed = None in recipe
    if len(recipe) == len(first):
        both = [(x, y) for x, y in zip(recipe, first, strict=True) if x is not None and y is not None]
        if recipe and not both:
            return None
        recipe, first = [x for x, _ in both], [y for _, y in both]
    a, b = np.asarray(recipe, dtype=np.float64), np.asarray(first, dtype=np.float64)
    _check_pairs(a, b)
    by_seed = a - b
    deviation = float(by_seed.std(ddof=1)) if len(by_seed) > 1 else None
    found = Difference(
        by_seed=tuple(by_seed.tolist()),
        mean=float(by_seed.mean()),
        deviation=deviation,
        interval=None,
        p=None,
        p_holm=None,
        minimum_detectable=None,
        verdict="failed" if failed else "not answered" if len(by_seed) >= MIN_SEEDS else "too few seeds to rank",
        margin=margin,
    )
    if failed or deviation is None or len(by_seed) < MIN_SEEDS or _is_rounding(deviation, a, b):
        return found
    test = stats.ttest_rel(a, b)
    low, high = test.confidence_interval(CONFIDENCE)
    p_equivalence = equivalence_p(by_seed, margin)
    return replace(found, interval=(float(low), float(high)), p=float(test.pvalue), p_equivalence=float(p_equivalence))


def equivalence_p(
    by_seed: Float[np.ndarray, "*studies seeds"], margin: float
) -> Float[np.ndarray, "*studies"] | np.float64:
    """Return the p-value of two one-sided t tests: below alpha, the true mean lies between -margin and margin.

    Source: Schuirmann 1987, "A comparison of the two one-sided tests procedure and the power approach", J.
    Pharmacokinet. Biopharm. 15: both hypotheses, mean <= -margin and mean >= margin, must be rejected.
    """
    above = stats.ttest_1samp(by_seed, -margin, axis=-1, alternative="greater").pvalue
    below = stats.ttest_1samp(by_seed, margin, axis=-1, alternative="less").pvalue
    return np.maximum(above, below)


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


def verdict(difference: Difference) -> Verdict:
    """Return the verdict on the recipe against the first one. The first rule that applies decides.

    1. Fewer than three seeds: "too few seeds to rank".
    2. The Holm-adjusted p of the paired t test is below 0.05: "better" or "worse", by the sign of the mean. The
       difference may also be shown to be smaller than the margin (`within_margin`).
    3. The Holm-adjusted p of the equivalence test is below 0.05: "equivalent".
    4. "not answered".

    So if no recipe differs, at most 5 % of comparisons call any recipe better or worse. If every recipe differs by the
    margin, at most 5 % call any recipe equivalent.
    """
    if len(difference.by_seed) < MIN_SEEDS:
        return "too few seeds to rank"
    if difference.p_holm is not None and difference.p_holm < ALPHA:
        return "better" if difference.mean < 0 else "worse"
    return "equivalent" if difference.within_margin else "not answered"


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


def _adjusted(found: Difference, p_holm: float, p_equivalence_holm: float, *, tested: int) -> Difference:
    """Return the difference with its adjusted p-values, as one of `tested` recipes, and its verdict."""
    assert found.deviation is not None
    seeds, alpha = len(found.by_seed), ALPHA / tested
    found = replace(
        found,
        p_holm=p_holm,
        p_equivalence_holm=p_equivalence_holm,
        minimum_detectable=minimum_detectable_effect(found.deviation, seeds, alpha=alpha),
        minimum_margin=minimum_margin(found.deviation, seeds, alpha=alpha),
    )
    return replace(found, verdict=verdict(found))


def _is_rounding(deviation: float, a: Float[np.ndarray, " seeds"], b: Float[np.ndarray, " seeds"]) -> bool:
    """Whether a spread of `a - b` is no more than the rounding of values of their size."""
    return deviation <= 8 * float(np.finfo(np.float64).eps) * float(np.maximum(np.abs(a), np.abs(b)).max())


def _check_pairs(a: Float[np.ndarray, "..."], b: Float[np.ndarray, "..."]) -> None:
    if a.ndim != 1 or a.shape != b.shape or len(a) == 0:
        raise Misuse(
            f"paired values must be two lists of the same length, at least 1, got shapes {a.shape} and {b.shape}"
        )
    if not (np.abs([a, b]) <= _LARGEST).all():
        raise Misuse(f"paired values must be finite, and at most {_LARGEST:g} in size")
