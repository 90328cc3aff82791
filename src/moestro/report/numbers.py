"""Numbers as people read them. A true minus sign, and a dash where there is nothing to say."""

import math
from collections.abc import Sequence

ABSENT = "–"
_METRIC = (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3))
_BINARY = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))


def fixed(value: float | int | None, decimals: int = 3) -> str:
    """`value` with that many decimals; never a negative zero."""
    if value is None:
        return ABSENT
    text = f"{value:,.{decimals}f}"
    return text.replace("-", "−") if float(text.replace(",", "")) else text.lstrip("-")


def signed(value: float | int, decimals: int = 3) -> str:
    """`value` with its sign, also a plus."""
    text = fixed(value, decimals)
    return text if text.startswith("−") or not text.strip("0.,") else "+" + text


def metric(value: float | int | None) -> str:
    """A count in three significant digits: 8.00M, 1.31B."""
    if value is None:
        return ABSENT
    for unit, size in _METRIC:
        if abs(value) >= size * 0.9995:
            return f"{_three_digits(value / size)}{unit}"
    return f"{value:.0f}"


def memory(value: float | int | None) -> str:
    """Bytes in three significant digits: 1.22 GiB."""
    if value is None:
        return ABSENT
    for unit, size in _BINARY:
        if value >= size * 0.9995:
            return f"{_three_digits(value / size)} {unit}"
    return f"{value:.0f} B"


def decimals_for(scale: float) -> int:
    """Decimals that show two digits of something as large as `scale`, between 3 and 6 of them."""
    if scale <= 0 or not math.isfinite(scale):
        return 3
    return min(max(1 - math.floor(math.log10(scale)), 3), 6)


def mean(values: Sequence[float | None]) -> float | None:
    """The mean of the values that are known; None where none is."""
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def _three_digits(value: float) -> str:
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value) * 1.0005)))}f}"
