"""Bound the time of code that a file brings along, such as a chat template."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from moestro.errors import Misuse


@contextmanager
def within(seconds: float, problem: str) -> Iterator[None]:
    """Raise Misuse with `problem` if Python code in the context runs for longer than `seconds`.

    Only the main thread can be interrupted; in other threads the time is not bounded. A timer of the caller goes on
    afterwards.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def late(number: int, frame: Any) -> None:
        raise Misuse(problem)

    before = signal.signal(signal.SIGALRM, late)
    rest, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, rest)
        signal.signal(signal.SIGALRM, before)
