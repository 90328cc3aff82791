"""Run one hostile case in this process, with its output, time and memory watched."""

import contextlib
import io
import logging
import os
import re
import resource
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

SECONDS, BYTES = 180, 4 * 2**30
"""What one draw may take: by the clock, since a pipe that is waited for takes no computing, so with room for a busy
machine; memory is counted from where the draw begins."""
STEERS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
PROGRESS = re.compile(r"dtype \w+: |skipping |resuming from |.*\d+%\||.*examples/s")
TRACE = "ran"


@dataclass
class Case:
    """Something to try: a command line, or a call of the API."""

    argv: list[str] = field(default_factory=list)
    call: Callable[[], Any] | None = None
    words: str = ""
    env: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return ascii(self.words or self.argv)[:300]


@dataclass
class Outcome:
    """How it ended, and what was wrong about that."""

    case: Case
    ended: str
    problem: str = ""


class TooSlow(BaseException):
    """The draw took too long."""


class Reached(BaseException):
    """The draw was accepted: training, which is not what is tried here, would begin."""


def prepared() -> None:
    """Import what the draws need, so that none of them pays for it."""
    import datasets  # noqa: F401
    import peft  # noqa: F401
    import torch._dynamo  # noqa: F401

    import moestro.commands.work.compare
    import moestro.commands.work.inspect
    import moestro.commands.work.train  # noqa: F401


def attempt(case: Case, folder: Path) -> Outcome:
    """Run a case within `folder`, where code that its files hold would leave a trace."""
    with watched(case, folder) as said:
        ended, problem = ending(case)
    if (folder / TRACE).exists():
        return Outcome(case, ended, "code of the files ran")
    if problem:
        return Outcome(case, ended, problem)
    printed = [line for line in re.split(r"[\r\n]+", said["err"]) if line.strip()]
    lines = [line for line in printed if not PROGRESS.match(line) and line not in said["notes"].splitlines()]
    if len(lines) > 1:
        return Outcome(case, ended, f"{len(lines)} lines: {ascii(lines)[:600]}")
    if STEERS.search(said["err"] + said["out"]) or any(len(line) > 1500 for line in lines):
        return Outcome(case, ended, f"not one visible line: {ascii(said['err'])[:300]}")
    return Outcome(case, ended)


def ending(case: Case) -> tuple[str, str]:
    """(how the case ended, what is wrong about that)."""
    from moestro.cli import main
    from moestro.errors import Misuse

    try:
        if case.call is None:
            main()
        else:
            case.call()
    except SystemExit as stop:
        code = stop.code or 0
        return f"exit {code}", "" if code in (0, 1, 2, 130) else "another exit code"
    except Misuse as error:
        return "exit 2", "several lines" if "\n" in str(error) else ""
    except Reached:
        return "accepted", ""
    except TooSlow:
        return "slow", f"took more than {SECONDS} s at {traceback.format_exc()[-900:]!r}"
    except BaseException as error:
        return "traceback", f"{type(error).__name__}: {str(error)[:200]} at {traceback.format_exc()[-700:]!r}"
    return "exit 0", ""


@contextlib.contextmanager
def watched(case: Case, folder: Path) -> Iterator[dict[str, str]]:
    """Run within `folder`, told yes to every question, with bounded time and memory; gives what was printed."""
    said = {"out": "", "err": "", "notes": ""}
    before = Path.cwd()
    (folder / "work").mkdir(exist_ok=True)
    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.object(sys, "argv", ["moestro", *case.argv]))
        stack.enter_context(patch.object(sys, "stdin", io.StringIO("y\n" * 50)))
        stack.enter_context(patch("moestro.training.train.build_model", side_effect=Reached))
        stack.enter_context(patch("moestro.jobs.workers.Workers.make_all", side_effect=Reached))  # in other processes
        stack.enter_context(patch.dict(os.environ, {"MOESTRO_CACHE": str(folder / "cache")} | case.env))
        stack.enter_context(noted(said))
        stack.enter_context(captured(said))
        stack.enter_context(bounded())
        os.chdir(folder / "work")
        stack.callback(os.chdir, before)
        yield said


@contextlib.contextmanager
def noted(said: dict[str, str]) -> Iterator[None]:
    """Keep what the package warns of, such as files left out: each is to be one visible line, and no complaint."""
    from moestro.gate.visible import one_line

    class Notes(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said["notes"] += one_line(record.getMessage()) + "\n"

    logger, notes = logging.getLogger("moestro"), Notes()
    logger.addHandler(notes)
    try:
        yield
    finally:
        logger.removeHandler(notes)


@contextlib.contextmanager
def captured(said: dict[str, str]) -> Iterator[None]:
    """Catch what is printed, by libraries that are not Python too."""
    files = {name: tempfile.TemporaryFile() for name in ("out", "err")}  # noqa: SIM115
    kept = {name: os.dup(number) for name, number in (("out", 1), ("err", 2))}
    streams = {"out": sys.stdout, "err": sys.stderr}
    for number, name in ((1, "out"), (2, "err")):
        streams[name].flush()
        os.dup2(files[name].fileno(), number)
        stream = io.TextIOWrapper(os.fdopen(os.dup(number), "wb"), errors="backslashreplace", write_through=True)
        setattr(sys, f"std{name}", stream)
    try:
        yield
    finally:
        for number, name in ((1, "out"), (2, "err")):
            getattr(sys, f"std{name}").close()
            setattr(sys, f"std{name}", streams[name])
            os.dup2(kept[name], number)
            os.close(kept[name])
            files[name].seek(0)
            said[name] = files[name].read().decode(errors="surrogateescape")
            files[name].close()


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Raise TooSlow after a while, and let no more memory be had than a draw may take."""

    def stop(*_: object) -> None:
        raise TooSlow

    kept = signal.signal(signal.SIGALRM, stop)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + BYTES, limits[1]))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, kept)
        resource.setrlimit(resource.RLIMIT_AS, limits)
