"""A worker process: it makes the attempts that the parent sends."""

import os
import signal
import threading
from dataclasses import replace
from io import TextIOBase
from multiprocessing.connection import Connection
from typing import Any

import torch
from rich.console import Console

from moestro.attempts import Attempt, make
from moestro.data.preparation import PreparedData
from moestro.errors import Interrupted, Misuse
from moestro.gate.libraries import quiet
from moestro.gate.visible import make_visible
from moestro.training.progress import Progressed
from moestro.training.train import Options


class Lines(TextIOBase):
    """A text file that sends each line to the parent."""

    def __init__(self, connection: Connection) -> None:
        self.connection, self.rest = connection, ""

    def write(self, text: str) -> int:
        """Send each complete line, and keep the rest for the next call. Return the number of characters taken."""
        *lines, self.rest = (self.rest + text).split("\n")
        for line in lines:
            self.connection.send(("line", line))
        return len(text)


def work(connection: Connection, end: Connection, data: PreparedData, options: Options, threads: int) -> None:
    """Run a worker process: make the attempts that `connection` brings, until the other end of `end` is closed."""
    try:
        signal.signal(signal.SIGTERM, stop_at_once)
        threading.Thread(target=end_with, args=(end,), daemon=True).start()
        make_visible()
        quiet()
        torch.set_num_threads(threads)
        console = Console(file=Lines(connection), width=10_000)  # type: ignore[arg-type]  # rich only writes
        while True:
            connection.send(outcome(connection.recv(), data, connection, console, options))
    except KeyboardInterrupt:  # perhaps within a message, so nothing can be told: the parent sees the process end
        os._exit(130)


def outcome(
    attempt: Attempt, data: PreparedData, connection: Connection, console: Console, options: Options
) -> tuple[str, object]:
    """Return ("result", the run or its failure), or ("stopped", the exception that must end the comparison)."""

    def show(progressed: Progressed) -> None:
        connection.send(("progress", replace(progressed, title=attempt.title)))

    try:
        return "result", make(attempt, data, console=console, options=replace(options, show=show))
    except (Misuse, Interrupted) as error:
        return "stopped", error


def stop_at_once(number: int, frame: Any) -> None:
    """Raise KeyboardInterrupt on SIGTERM. While a run trains, `Interruption` handles the signal instead."""
    raise KeyboardInterrupt


def end_with(lifeline: Connection) -> None:
    """Wait until the parent closes its end of the lifeline or is killed, then end this process at once."""
    lifeline.poll(None)
    os._exit(0)
