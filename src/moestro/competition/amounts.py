"""How much competes, and how much of it is held at once: numbers that plan a run, without torch."""

import math

ROUNDING = 1e-9
"""What a product may miss a whole number by: 0.1 * 30 is a little more than 3, and 3 * (1 / 3) may be less than 1."""

NUMBERS, ROWS = 2**22, 256
"""Of experts' outputs so many numbers are held at once; but at least so many tokens' outputs, for each part reads (and
casts) the weights of all experts."""


def number_competing(rate: float, length: int) -> int:
    """How many of a sequence's tokens compete."""
    return math.ceil(rate * length - ROUNDING)


def share_of_steps(rate: float, max_layers: int | None, num_layers: int) -> float:
    """In how many of the steps each layer competes."""
    return rate if max_layers is None else min(rate, max_layers / num_layers)


def rows_at_once(num_experts: int, dim: int) -> int:
    """Tokens that all experts answer together."""
    return max(ROWS, NUMBERS // (num_experts * dim))
