"""Progress of long work on stderr, silent while it is short or nobody watches."""

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from moestro.gate.visible import visible

Item = TypeVar("Item")


def watched(items: Iterable[Item], doing: str, *, total: int | None = None, patience: float = 2.0) -> Iterator[Item]:
    """Pass `items` through; after `patience` seconds show how many went by, if stderr is a terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    progress = Progress(*columns, console=console, transient=True)
    task = progress.add_task(visible(doing), total=total)
    show_at = time.monotonic() + patience if console.is_terminal else float("inf")
    try:
        for item in items:
            yield item
            progress.advance(task)
            if time.monotonic() > show_at:
                progress.start()
                show_at = float("inf")
    finally:
        if progress.live.is_started:
            progress.stop()
