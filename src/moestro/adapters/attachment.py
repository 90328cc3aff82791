"""A context manager that warns if it is never entered: `aux.attach(model)` without `with` would attach nothing."""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import wraps
from types import TracebackType
from typing import Generic, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
logger = logging.getLogger(__name__)


def attachment(function: Callable[P, Iterator[T]]) -> Callable[P, "Attachment[T]"]:
    """Make a context manager of a generator function, as `contextlib.contextmanager` does."""
    make = contextmanager(function)

    @wraps(function)
    def attach(*args: P.args, **kwargs: P.kwargs) -> Attachment[T]:
        return Attachment(make(*args, **kwargs), function.__qualname__)

    return attach


class Attachment(AbstractContextManager[T], Generic[T]):
    """The context in which something is attached."""

    def __init__(self, context: AbstractContextManager[T], name: str) -> None:
        self._context, self._name, self._entered = context, name, False

    def __enter__(self) -> T:
        self._entered = True
        return self._context.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return self._context.__exit__(kind, error, trace)

    def __del__(self) -> None:
        if not self._entered:
            logger.warning("%s attached nothing: write `with ...:` around the code that it is for", self._name)
