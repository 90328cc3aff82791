"""Runs that train at once: as many as fit, the same bits as one after another, and nothing lost when one is killed."""

import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.numpy import load_file

from command_line import SMALL, moestro, sources, start, write_corpus
from moestro import Misuse
from moestro.comparison import Comparison
from moestro.jobs.choice import Jobs, choose
from moestro.records import read_record
from moestro.training.recipes import recipe

RECIPES = [recipe("smoe"), recipe("cartesian")]
pytestmark = pytest.mark.xdist_group("jobs")


@pytest.fixture
def machine(monkeypatch):
    """Makes a machine of some cores, gigabytes and GPUs."""

    def make(cores: int, gigabytes: float, gpus: int = 0) -> None:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)))
        memory = type("Memory", (), {"available": gigabytes * 1e9})
        monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)

    return make


@pytest.mark.parametrize(
    ("place", "asked", "threads", "runs", "expected"),
    [
        ((2, 20), None, None, 15, Jobs(jobs=2, threads=1)),
        ((8, 20), None, None, 3, Jobs(jobs=3, threads=1)),
        ((8, 20), None, 4, 15, Jobs(jobs=2, threads=4)),
        ((8, 2), None, None, 15, Jobs(jobs=2, threads=1)),
        ((8, 0.1), None, None, 15, Jobs(jobs=1, threads=1)),
        ((2, 20), 5, None, 15, Jobs(jobs=5, threads=1)),
        ((64, 500, 4), None, None, 15, Jobs(jobs=4, threads=1)),
    ],
)
def test_as_many_jobs_as_cores_or_gpus_memory_and_runs_allow(machine, place, asked, threads, runs, expected):
    machine(*place)
    assert choose(asked, threads, RECIPES, runs) == expected


def test_more_jobs_than_memory_are_refused(machine):
    machine(8, 2)
    with pytest.raises(Misuse, match=r"jobs must be at most 2, because a run takes about 0\.\d of the 2\.0 GB of free"):
        choose(3, None, RECIPES, 15)


def test_under_a_launcher_one_run_trains_at_a_time(machine, monkeypatch):
    machine(8, 20)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert choose(None, None, RECIPES, 15).jobs == 1
    with pytest.raises(Misuse, match="jobs must be 1 under a launcher"):
        choose(2, None, RECIPES, 15)


@pytest.mark.parametrize("words", [["--jobs", "0"], ["--jobs", "x"], ["--threads", "0"]])
def test_misuse_is_one_line(words, monkeypatch, capsys):
    assert moestro(monkeypatch, "compare", "smoe", *words) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("jobs") / "corpus")


@pytest.fixture(scope="module")
def arguments(corpus: Path) -> list[str]:
    return [
        "compare",
        "smoe",
        "dense",
        "--seeds",
        "2",
        "--allow-unequal",
        "--tokens",
        "12800",
        *sources(corpus),
        *SMALL,
    ]


@pytest.fixture(autouse=True)
def cache(corpus: Path, monkeypatch) -> None:
    monkeypatch.setenv("MOESTRO_CACHE", str(corpus.parent / "cache"))


def finish(command: subprocess.Popen) -> tuple[int, str]:
    out, err = command.communicate(timeout=300)
    return command.returncode, out + err


def equal(one: Path, other: Path) -> bool:
    """Whether two comparisons hold the same weights and losses, to the last bit."""
    a, b = (read_record(Comparison, folder / "comparison.json") for folder in (one, other))
    assert [[run.held_out for run in r.runs] for r in a.recipes] == [
        [run.held_out for run in r.runs] for r in b.recipes
    ]
    places = sorted(path.relative_to(one) for path in one.rglob("model/model.safetensors"))
    assert len(places) == 4
    weights = [(load_file(one / place), load_file(other / place)) for place in places]
    return all((x[name] == y[name]).all() for x, y in weights for name in x)


def wait_until(holds: Callable[[], object], seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.05)


def training(folder: Path) -> list[Path]:
    """Runs that have begun to train and are not finished."""
    begun = {path.parent for path in folder.rglob("metrics.jsonl")}
    return sorted(place for place in begun if not (place / "summary.json").exists())


def workers(command: subprocess.Popen) -> list[psutil.Process]:
    return [p for p in psutil.Process(command.pid).children() if "resource_tracker" not in " ".join(p.cmdline())]


@pytest.fixture(scope="module")
def alone(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The comparison, one run after another."""
    out = tmp_path_factory.mktemp("alone") / "one"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOESTRO_CACHE", str(out.parent / "cache"))
        assert finish(start(*arguments, "--jobs", "1", "--out", str(out)))[0] == 0
    return out


@pytest.mark.slow
def test_kills_of_workers_and_of_the_parent_lose_nothing(arguments, alone: Path, tmp_path: Path):
    out = tmp_path / "two"
    both = [*arguments, "--jobs", "2", "--out", str(out)]

    command = start(*both)
    wait_until(lambda: training(out))
    workers(command)[0].kill()
    code, said = finish(command)
    assert code == 1
    assert "its process ended with signal 9 (SIGKILL)" in said
    found = read_record(Comparison, out / "comparison.json")
    assert sum(len(r.failed) for r in found.recipes) == 1
    assert sum(len(r.runs) for r in found.recipes) == 3  # another worker took its place

    shutil.rmtree(out)
    command = start(*both)
    wait_until(lambda: training(out))
    left = workers(command)
    command.kill()
    command.wait()
    wait_until(
        lambda: not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in left)
    )  # one may still be importing
    assert finish(start(*both))[0] == 0
    assert equal(alone, out)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_stops_all_and_the_same_command_goes_on(number, arguments, alone: Path, tmp_path: Path):
    out = tmp_path / "two"
    both = [*arguments, "--jobs", "2", "--out", str(out)]
    command = start(*both)
    wait_until(lambda: training(out))
    command.send_signal(number)
    code, said = finish(command)
    assert code == 130
    assert "the same command goes on" in said
    assert "Traceback" not in said
    assert all(list(place.glob("checkpoint-*")) for place in training(out))
    assert finish(start(*both))[0] == 0
    assert equal(alone, out)


@pytest.mark.slow
def test_printed_commands_train_what_the_comparison_reads(arguments, alone: Path, tmp_path: Path):
    out = tmp_path / "two"
    both = [*arguments, "--out", str(out), "--learning-rate", "2e-3"]
    code, said = finish(start(*both, "--print-commands"))
    assert code == 0
    commands = [shlex.split(line) for line in said.splitlines() if line.startswith("moestro train")]
    assert len(commands) == 4
    assert not out.exists()
    for words in commands:
        assert finish(start(*words[1:]))[0] == 0
    written = {path: path.stat().st_mtime_ns for path in out.rglob("summary.json")}
    assert finish(start(*both))[0] == 0
    assert {path: path.stat().st_mtime_ns for path in out.rglob("summary.json")} == written
    assert equal(alone, out)


@pytest.fixture
def small_disk(tmp_path: Path):
    """Makes a folder a disk of its own that is soon full; returns what empties it and makes it a plain folder again."""
    mounted: list[Path] = []

    def make(folder: Path) -> Callable[[], None]:
        folder.mkdir(parents=True)
        mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "moestro-test", str(folder)]
        if subprocess.run(mount, capture_output=True, check=False).returncode:
            pytest.skip("a disk can only be mounted as root")
        mounted.append(folder)
        return lambda: unmount(folder)

    def unmount(folder: Path) -> None:
        subprocess.run(["umount", str(folder)], check=True)
        mounted.remove(folder)

    yield make
    for folder in list(mounted):
        unmount(folder)


@pytest.mark.slow
def test_a_full_disk_fails_one_run_and_the_same_command_finishes_it(arguments, alone: Path, tmp_path: Path, small_disk):
    out = tmp_path / "two"
    place = next(path.parent.relative_to(alone) for path in alone.rglob("seed-1/summary.json"))
    make_room = small_disk(out / place)
    both = [*arguments, "--jobs", "2", "--out", str(out)]
    code, said = finish(start(*both))
    assert code == 1 and "Traceback" not in said
    assert "No space left on device" in said, said
    found = read_record(Comparison, out / "comparison.json")
    assert sum(len(r.failed) for r in found.recipes) == 1
    assert sum(len(r.runs) for r in found.recipes) == 3
    make_room()
    assert finish(start(*both))[0] == 0
    assert equal(alone, out)
