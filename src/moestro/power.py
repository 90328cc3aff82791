"""The power of the paired t test and of the equivalence test with few seeds.

Both functions scale with the sample deviation of one study. With three seeds that is easily half or twice the true
deviation, so a formula for a known deviation is too optimistic: its effect for power 0.8 is detected by only 63 % of
studies with three seeds. Here the power is averaged over the distribution of the sample deviation. The meaning of the
result is that of an experiment, which `scripts/verdict_simulation.py` runs: compute the effect from one study; suppose
that it is the true difference; then a new study of the same size detects it with probability `power`.
"""

import math
from functools import cache

import numpy as np
from jaxtyping import Float
from scipy import optimize, special, stats

from moestro.difference import ALPHA
from moestro.errors import Misuse

POWER = 0.8
_QUANTILES = 250
"""Quantiles per integral over deviations; the power is accurate to 0.001."""


def minimum_detectable_effect(deviation: float, seeds: int, *, alpha: float = ALPHA, power: float = POWER) -> float:
    """Return the true difference that a new study detects with probability `power`, in the deviation's unit.

    Args:
        deviation: sample standard deviation of one study's paired differences.
        seeds: number of pairs in that study and in the new one, at least 2.
        alpha: two-sided level of the test; 0.05 / m for one of m recipes, the first step of Holm's method.
        power: between `alpha` and 1.

    Raises:
        Misuse: fewer than 2 seeds.
    """
    return _multiple(seeds, alpha / 2, power, equivalence=False) * deviation / math.sqrt(seeds)


def minimum_margin(deviation: float, seeds: int, *, alpha: float = ALPHA, power: float = POWER) -> float:
    """Return the smallest margin within which a new study shows two equal recipes equivalent with probability `power`.

    Arguments, unit and errors are those of `minimum_detectable_effect`, except that `alpha` is the level of each of the
    two one-sided tests.
    """
    return _multiple(seeds, alpha, power, equivalence=True) * deviation / math.sqrt(seeds)


@cache
def _multiple(seeds: int, tail: float, power: float, *, equivalence: bool) -> float:
    """Return the effect or margin, in standard errors of the first study, for which a new study has this power."""
    if seeds < 2:
        raise Misuse(f"power needs at least 2 seeds, got {seeds}")
    critical, ratio = float(stats.t.isf(tail, seeds - 1)), _deviation_ratios(seeds - 1)
    first, new = ratio[:, None], ratio[None, :]

    def missing_power(multiple: float) -> float:
        found = special.ndtr(multiple * first - critical * new)  # the new mean lies beyond its critical value
        return float((np.maximum(0.0, 2 * found - 1) if equivalence else found).mean()) - power

    highest = critical
    while missing_power(highest) < 0:
        highest *= 2
    return float(optimize.root_scalar(missing_power, bracket=(0.0, highest)).root)


def _deviation_ratios(freedom: int) -> Float[np.ndarray, " quantiles"]:
    """Return quantiles of the sample deviation over the true one, at the midpoints of equal shares."""
    shares = (np.arange(_QUANTILES) + 0.5) / _QUANTILES
    return np.sqrt(stats.chi2.ppf(shares, freedom) / freedom)
