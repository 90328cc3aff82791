"""Share attempts among worker processes: the parent's side."""

import os
import signal
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

import torch
from rich.console import Console

from moestro.attempts import Attempt, make
from moestro.comparison import FailedRun, Run
from moestro.data.preparation import PreparedData
from moestro.errors import Interrupted
from moestro.jobs.choice import Jobs
from moestro.jobs.process import work
from moestro.training.failures import FAILED
from moestro.training.progress import ProgressBars
from moestro.training.runs import SUMMARY
from moestro.training.train import Options

SPAWN = get_context("spawn")


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
