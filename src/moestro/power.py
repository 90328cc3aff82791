"""What a study of a few seeds can find: the power of the paired t test and of the equivalence test.

Both answers are in units of the deviation that one study saw, and with three seeds that is easily half or twice the
true one. A formula for a known deviation would therefore promise too much: its number for power 0.8 is found by 0.63 of
studies with three seeds. Here the power is averaged over the deviations that a study may see. The promise is that of
this experiment, which `scripts/verdict_simulation.py` runs: take the number from one study; let the truth be that
number; a new study of the same size finds it with probability `power`.
"""

import math
from functools import cache

import numpy as np
from jaxtyping import Float
from scipy import optimize, special, stats

from moestro.errors import Misuse

ALPHA = 0.05
POWER = 0.8
_QUANTILES = 250
"""Points per integral over deviations: the power is exact within 0.001."""


def minimum_detectable_effect(deviation: float, seeds: int, *, alpha: float = ALPHA, power: float = POWER) -> float:
    """Return the true difference that a new study finds with probability `power`, in the deviation's unit.

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
    """Return the margin within which a new study finds equal recipes with probability `power`, in the deviation's unit.

    Arguments as of `minimum_detectable_effect`; `alpha` is the level of each of the two one-sided tests.
    """
    return _multiple(seeds, alpha, power, equivalence=True) * deviation / math.sqrt(seeds)


@cache
def _multiple(seeds: int, tail: float, power: float, *, equivalence: bool) -> float:
    """Return the multiple of the first study's standard error that a new study finds with that power."""
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
    """Return equally likely values of a sample deviation over the true one."""
    shares = (np.arange(_QUANTILES) + 0.5) / _QUANTILES
    return np.sqrt(stats.chi2.ppf(shares, freedom) / freedom)
