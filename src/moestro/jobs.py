"""Train several runs at once, each in a process of its own.

A worker process lives for many runs, because importing torch and transformers takes as long as a small run. Ctrl-C
reaches the parent alone, which passes it on: a worker is started with SIGINT blocked. A worker ends at once when the parent is
killed, so that the same command finds every run unlocked.
"""

import os
import signal
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import TextIOBase
from itertools import count
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

import psutil
import torch
from rich.console import Console

from moestro.attempts import Attempt, make
from moestro.comparison import FailedRun, Run
from moestro.data.preparation import PreparedData
from moestro.errors import Interrupted, Misuse
from moestro.gate.libraries import quiet
from moestro.gate.visible import make_visible
from moestro.training.estimate import memory_bytes
from moestro.training.failures import FAILED
from moestro.training.progress import ProgressBars, Progressed
from moestro.training.recipe import Recipe
from moestro.training.runs import SUMMARY
from moestro.training.train import Options

PROCESS_BYTES = 600_000_000
"""Memory in bytes of a worker with its libraries, before it builds a model."""
SPAWN = get_context("spawn")


@dataclass(frozen=True, slots=True, kw_only=True)
class Jobs:
    """How many runs train at once, and the CPU threads of each."""

    jobs: int = 1
    threads: int = 1


def choose(asked: int | None, threads: int | None, recipes: Sequence[Recipe], runs: int) -> Jobs:
    """Return how many runs train at once, and the CPU threads of each.

    `asked` jobs if the user asked for a number; else one per GPU, or without GPUs one per `threads` CPU cores, but no
    more than fit the free memory or than there are `runs`. Under a launcher with several ranks it is one job. `threads`
    defaults to OMP_NUM_THREADS, else 1.

    Raises:
        Misuse: `asked` jobs do not fit the free memory, or `asked` exceeds 1 under a launcher with several ranks.
    """
    threads = threads or int(os.environ.get("OMP_NUM_THREADS") or 1)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if asked is not None and asked > 1:
            raise Misuse(f"jobs must be 1 under a launcher, whose ranks train one run together, got {asked}")
        return Jobs(threads=threads)
    devices = torch.cuda.device_count() or max(1, usable_cores() // threads)
    fitting = fitting_jobs(recipes)
    if asked is not None and asked > fitting:
        memory, needed = psutil.virtual_memory().available / 1e9, largest_bytes(recipes) / 1e9
        raise Misuse(
            f"jobs must be at most {fitting}, because a run takes about {needed:.1f} of the {memory:.1f} GB of free "
            f"memory, got {asked}"
        )
    return Jobs(jobs=asked or max(1, min(devices, fitting, runs)), threads=threads)


def usable_cores() -> int:
    """Return the CPU cores that this process may use; where the system does not say (macOS), all of them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def fitting_jobs(recipes: Sequence[Recipe]) -> int:
    """Return how many runs of the largest recipe fit this machine's free memory at once, at least 1.

    With GPUs return 1,000, which limits nothing: only a single run is checked against a GPU's memory (`check_memory`),
    never several that share one.
    """
    if torch.cuda.is_available():
        return 1_000
    return max(1, int(psutil.virtual_memory().available // largest_bytes(recipes)))


def largest_bytes(recipes: Sequence[Recipe]) -> float:
    """Return the memory in bytes of a worker that trains the largest recipe."""
    return PROCESS_BYTES + max(memory_bytes(recipe) for recipe in recipes)


def make_all(
    attempts: Sequence[Attempt], data: PreparedData, jobs: Jobs, *, console: Console, options: Options
) -> list[Run | FailedRun]:
    """Return the run or failure of each attempt, in order. Results do not depend on the number of jobs.

    Raises Misuse and Interrupted, after every worker has ended.
    """
    if jobs.jobs > 1 and len(unfinished := [a for a in attempts if not is_finished(a)]) > 1:
        trained = Workers(data, jobs, console, options).make_all(unfinished)
        found = {a.folder: result for a, result in zip(unfinished, trained, strict=True)}
    else:
        found = {}
    if not torch.cuda.is_available():
        torch.set_num_threads(jobs.threads)
    return [found.get(a.folder) or make(a, data, console=console, options=options) for a in attempts]


def is_finished(attempt: Attempt) -> bool:
    """Return whether nothing is left to train: the folder holds a finished run or the record of a divergence."""
    return (attempt.folder / SUMMARY).exists() or (attempt.folder / FAILED).exists()


@dataclass(slots=True)
class Worker:
    """A worker process, and the attempt that it is making."""

    number: int
    """Which of the GPUs it uses; a worker that takes the place of another has its number."""
    process: SpawnProcess
    connection: Connection
    lifeline: Connection
    """Write end of a pipe that carries nothing. It closes when the parent closes it or dies; the worker then ends."""
    place: int | None = None
    """Index of the attempt that the process is making; None while it is idle."""

    def stop(self) -> None:
        """Ask the process to stop its run with a checkpoint; asked again, it stops at once. An idle process ends."""
        if self.process.is_alive() and self.process.pid is not None:
            os.kill(self.process.pid, signal.SIGTERM)


class Workers:
    """Several processes that share a list of attempts."""

    def __init__(self, data: PreparedData, jobs: Jobs, console: Console, options: Options) -> None:
        self.data, self.jobs, self.console, self.options = data, jobs, console, options
        self.bars = ProgressBars(console)
        self.workers: list[Worker] = []
        self.stopped: BaseException | None = None

    def make_all(self, attempts: Sequence[Attempt]) -> list[Run | FailedRun]:
        """Return the run or failure of each attempt, in order.

        Raises what stopped the workers (Misuse or Interrupted), after all of them have ended.
        """
        results: dict[int, Run | FailedRun] = {}
        waiting = deque(range(len(attempts)))
        with self._listening():
            try:
                while (waiting and self.stopped is None) or any(w.place is not None for w in self.workers):
                    self._hand_out(waiting, attempts)
                    self._receive(attempts, results)
            finally:
                self._end()
        if self.stopped is not None:
            raise self.stopped
        return [results[place] for place in range(len(attempts))]

    def _hand_out(self, waiting: deque[int], attempts: Sequence[Attempt]) -> None:
        """Give every idle worker an attempt, and start workers while there are fewer than `jobs.jobs`."""
        while waiting and self.stopped is None:
            idle = next((w for w in self.workers if w.place is None), None)
            if idle is None and len(self.workers) == self.jobs.jobs:
                return
            worker = idle or self._start()
            try:
                worker.connection.send(attempts[waiting[0]])
            except OSError:  # it was killed while it was idle, so no attempt is lost
                worker.process.join()
                self.workers.remove(worker)
                continue
            worker.place = waiting.popleft()

    def _start(self) -> Worker:
        """Start a worker. With GPUs it sees one of them, taken in turn, so more workers than GPUs share GPUs."""
        taken = {worker.number for worker in self.workers}
        number = next(i for i in count() if i not in taken)  # that of a worker that died, if there is one
        threads = str(self.jobs.threads)
        settings = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
        if torch.cuda.is_available():
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
            devices = visible if visible != [""] else [str(i) for i in range(torch.cuda.device_count())]
            settings["CUDA_VISIBLE_DEVICES"] = devices[number % len(devices)]
        ours, theirs = SPAWN.Pipe()
        end, lifeline = SPAWN.Pipe(duplex=False)
        arguments = (theirs, end, self.data, self.options, self.jobs.threads)
        process = SPAWN.Process(target=work, args=arguments, daemon=True)
        with environment_variables(settings), blocked(signal.SIGINT):
            process.start()
        theirs.close()
        end.close()
        worker = Worker(number, process, ours, lifeline)
        self.workers.append(worker)
        return worker

    def _receive(self, attempts: Sequence[Attempt], results: dict[int, Run | FailedRun]) -> None:
        """Wait up to a second for messages of busy workers: show progress and lines, keep results, stop on an error."""
        busy = {w.connection: w for w in self.workers if w.place is not None}
        for connection in wait(list(busy), timeout=1.0):
            worker = busy[connection]  # type: ignore[index]
            assert worker.place is not None
            try:
                kind, told = worker.connection.recv()
            except (EOFError, OSError):
                self._bury(worker, attempts[worker.place], results)
                continue
            if kind == "progress":
                self.bars.show(told)
            elif kind == "line":
                self.console.print(told, markup=False, soft_wrap=True)
            else:
                if kind == "result":
                    results[worker.place] = told
                else:
                    self._stop(told)
                worker.place = None

    def _bury(self, worker: Worker, attempt: Attempt, results: dict[int, Run | FailedRun]) -> None:
        """Forget a worker whose process died; record its attempt as failed unless workers are being stopped anyway."""
        worker.process.join()
        self.workers.remove(worker)
        self.bars.remove(attempt.title)
        if self.stopped is not None or worker.place is None:
            return
        code = worker.process.exitcode or 0
        how = f"signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"exit code {code}"
        reason = f"its process ended with {how}; the same command goes on from its last checkpoint"
        results[worker.place] = FailedRun(seed=attempt.seed, reason=reason, cause="machine")
        self.console.print(f"{attempt.title}: {reason}", markup=False)

    def _stop(self, reason: BaseException) -> None:
        """Ask all workers to stop; `make_all` raises the first `reason` when they have ended."""
        self.stopped = self.stopped or reason
        for worker in self.workers:
            worker.stop()

    @contextmanager
    def _listening(self) -> Iterator[None]:
        """Pass Ctrl-C and SIGTERM on to the workers. In another thread than the main one, do nothing."""

        def request(number: int, frame: Any) -> None:
            self._stop(Interrupted("stopped; the same command goes on from the last checkpoints"))

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {s: signal.signal(s, request) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _end(self) -> None:
        """Close all lifelines, and wait until every process has ended."""
        for worker in self.workers:
            worker.lifeline.close()
        for worker in self.workers:
            worker.process.join()
        self.bars.display.stop()


@contextmanager
def blocked(number: signal.Signals) -> Iterator[None]:
    """Hold a signal back until the context ends. A process that is started within never receives it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def environment_variables(settings: dict[str, str]) -> Iterator[None]:
    """Set environment variables until the context ends. A process that starts within it inherits them for good."""
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


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
