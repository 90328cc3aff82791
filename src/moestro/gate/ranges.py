"""State the range of a field once, in its annotation, and check it wherever the field is set.

A dataclass declares `rate: Annotated[float, Range(above=0, at_most=1)]`, or one of the named ranges below, and calls
`check_fields(self)` in `__post_init__`. So the command line and the API refuse the same values in the same words.
"""

import types
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache
from math import isfinite
from numbers import Integral, Real
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from moestro.errors import Misuse
from moestro.gate.visible import shortened


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """The numbers that a field may hold."""

    at_least: int | float | None = None
    above: int | float | None = None
    at_most: int | float | None = None
    below: int | float | None = None

    def violated(self, value: Any) -> str:
        """Return the violated bound in words; empty if `value` lies within the range."""
        if self.at_least is not None and not value >= self.at_least:
            return f"at least {self.at_least:,}"
        if self.above is not None and not value > self.above:
            return f"above {self.above:,}"
        if self.at_most is not None and not value <= self.at_most:
            return f"at most {self.at_most:,}"
        if self.below is not None and not value < self.below:
            return f"below {self.below:,}"
        return ""

    @property
    def words(self) -> str:
        """The bounds in words that follow "a number", such as " above 0 and at most 1"; empty without bounds."""
        low = f" of at least {self.at_least:,}" if self.at_least is not None else ""
        low = f" above {self.above:,}" if self.above is not None else low
        high = f"at most {self.at_most:,}" if self.at_most is not None else ""
        high = f"below {self.below:,}" if self.below is not None else high
        return f"{low} and {high}" if low and high else low or (f" {high}" if high else "")


Weight = Annotated[float, Range(at_least=0)]
"""The weight of a loss, or another number whose 0 means "off"."""
Positive = Annotated[float, Range(above=0)]
Share = Annotated[float, Range(at_least=0, at_most=1)]
PositiveShare = Annotated[float, Range(above=0, at_most=1)]
Decay = Annotated[float, Range(at_least=0, below=1)]
"""The decay of a running mean."""
Seed = Annotated[int, Range(at_least=0, at_most=2**32 - 1)]
"""The seeds that numpy, torch and Python all accept."""
Number = Annotated[int, Range(at_least=0, at_most=10**9)]
"""A count that may be 0."""
Steps = Annotated[int, Range(at_least=1, at_most=10**9)]
Tokens = Annotated[int, Range(at_least=1, at_most=10**16)]
Bytes = Annotated[int, Range(at_least=1, at_most=2**53)]
Length = Annotated[int, Range(at_least=2, at_most=2**24)]
"""Tokens of a sequence."""
BatchTokens = Annotated[int, Range(at_least=1, at_most=10**9)]
Vocabulary = Annotated[int, Range(at_least=1, at_most=10**7)]
Width = Annotated[int, Range(at_least=1, at_most=10**6)]
Layers = Annotated[int, Range(at_least=1, at_most=2_000)]
Heads = Annotated[int, Range(at_least=1, at_most=10**4)]
Experts = Annotated[int, Range(at_least=1, at_most=2**16)]
SharedExperts = Annotated[int, Range(at_least=0, at_most=2**10)]


def check_fields(record: Any) -> None:
    """Raise Misuse unless every field of the constructor satisfies its annotation."""
    hints = hints_of(type(record))
    for field in fields(record):
        if field.init:
            check(field.name, getattr(record, field.name), hints[field.name])


@cache
def hints_of(kind: Any) -> dict[str, Any]:
    """Return the annotations of a class or function, ranges included."""
    return get_type_hints(kind, include_extras=True)


def check(name: str, value: Any, hint: Any) -> None:
    """Raise Misuse, which calls the value `name`, unless `value` satisfies `hint`.

    numpy numbers count as Python numbers. True and False are not numbers, and numbers must be finite.
    """
    if (problem := wrong(value, hint)) is not None:
        raise Misuse(f"{name} must be {problem}, got {shown(value)}")


def wrong(value: Any, hint: Any) -> str | None:
    """Return in words what `hint` requires if `value` violates it; None if it fits or `hint` cannot be checked."""
    kind, *metadata = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    limits = next((item for item in metadata if isinstance(item, Range)), Range())
    if get_origin(kind) in (Union, types.UnionType):
        return wrong_for_all(value, get_args(kind))
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        fits = isinstance(value, str | int) and any(value == c and type(value) is type(c) for c in choices)
        return None if fits else either([str(choice) for choice in choices])
    if kind in (int, float):
        return wrong_number(value, kind, limits)
    if get_origin(kind) is tuple:
        return wrong_tuple(value, get_args(kind))
    if kind is bool:
        return None if isinstance(value, bool) or type(value).__name__ == "bool" else "True or False"
    if get_origin(kind) is Callable or kind is Any or not isinstance(kind, type):
        return None
    return None if isinstance(value, kind) else f"a {kind.__name__}" if kind is not str else "text"


def wrong_for_all(value: Any, kinds: tuple[Any, ...]) -> str | None:
    """Like `wrong`, for a union: None if one member fits, else the requirements of its members, None left out."""
    problems = [None if value is None else "" if kind is type(None) else wrong(value, kind) for kind in kinds]
    if value is None:
        return None if type(None) in kinds else either([wrong(value, kind) or "" for kind in kinds])
    return None if None in problems else either([problem for problem in problems if problem])


def wrong_number(value: Any, kind: type, limits: Range) -> str | None:
    """Like `wrong`, for a number: the violated bound, or the whole requirement if `value` is not such a number."""
    noun = "a whole number" if kind is int else "a number"
    if isinstance(value, bool) or not isinstance(value, Integral if kind is int else Real) or not finite(value):
        return noun + limits.words
    return limits.violated(value) or None


def wrong_tuple(value: Any, kinds: tuple[Any, ...]) -> str | None:
    """Like `wrong`, for a tuple (or list) of any length whose items all have the kind `kinds[0]`."""
    if not isinstance(value, tuple | list):
        return "a tuple"
    problems = (wrong(item, kinds[0]) for item in value)
    return next((f"a tuple whose items are {problem}" for problem in problems if problem), None)


def finite(value: Any) -> bool:
    """Return whether a number is finite and fits into a float."""
    try:
        return isfinite(value)
    except OverflowError:
        return False


def either(words: list[str]) -> str:
    """Join choices in words: "a or b", "one of a, b, c"."""
    return " or ".join(words) if len(words) < 3 else f"one of {', '.join(words)}"


def shown(value: Any) -> str:
    """Return the repr of a value, at most 60 characters long."""
    try:
        return shortened(repr(value), 60)
    except ValueError:  # Python does not print whole numbers of more than 4,300 digits
        return "a number of thousands of digits"
