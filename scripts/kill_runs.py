"""Kill small runs at random moments, start them again, and check that nothing differs from a run that was left alone.

    python scripts/kill_runs.py --kills 10 --only last-evaluation --folder /tmp/kills

Five kinds of kill, each by SIGKILL: `anywhere` in `moestro train`, in its `last-evaluation`, of one of two `ranks` (the
other one is then ended, as a launcher does it), anywhere in `compare`, and of one of its two ranks (`ranks-compare`).
Compared bit by bit: weights, losses per document, and, but for times, metrics, summaries and comparison. Results are
kept in --folder, so that the script itself goes on where it was stopped. Processes are forked from one that has
imported everything; with --torchrun, two ranks are started by it.
"""

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from safetensors.numpy import load_file

KINDS = ("anywhere", "last-evaluation", "ranks", "compare", "ranks-compare")
STEPS, BATCH = 16, 128
RECIPE = "deepseek-v3+compete:balance_over=lagged,balance=0.05,rate=0.1,start=0"
SMALL = ["--sequence-length", "32", "--batch-tokens", str(BATCH), "--vocab-size", "300", "--dtype", "float32"]
SMALL += ["--tokens", str(STEPS * BATCH), "--set", "hidden_size=16", "num_layers=2", "num_heads=2", "width=8"]
CHANGING = {"seconds", "tokens_per_second", "peak_memory_bytes", "created", "environment", "command"}
PATIENCE = 900.0
"""Seconds for one start on a busy machine."""


def write_corpus(folder: Path) -> list[str]:
    """Two domains, each with its own words; returns the arguments that name them."""
    draw = random.Random(0)
    for domain in range(2):
        place = folder / f"domain{domain}"
        place.mkdir(parents=True, exist_ok=True)
        words = ["".join(draw.choices("abcdefghij"[domain::2], k=5)) for _ in range(12)]
        for index in range(24):
            (place / f"{index}.txt").write_text(" ".join(draw.choices(words, k=150)))
    return ["--data", str(folder / "domain0"), str(folder / "domain1")]


def command(kind: str, corpus: list[str], out: Path) -> list[str]:
    """The arguments of `moestro`."""
    if kind.endswith("compare"):
        what = ["compare", "smoe", "fine-grained", "--seeds", "1", "--allow-unequal"]
    else:
        what = ["train", RECIPE]
    return [*what, *corpus, *SMALL, "--out", str(out)]


def run_moestro(arguments: list[str], environment: dict[str, str], log: str) -> None:
    """Be `moestro ARGUMENTS`, with what it prints in a file."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ |= environment
    sys.argv = ["moestro", *arguments]
    from moestro.cli import main

    main()


class Start:
    """One start of `moestro`, on one rank or two."""

    def __init__(self, arguments: list[str], ranks: int, log: Path, torchrun: bool) -> None:
        self.torchrun = torchrun and ranks > 1
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = str(free.getsockname()[1])
        if self.torchrun:
            launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", f"--master-port={port}"]
            self.launcher = subprocess.Popen(
                [sys.executable, *launcher, "-m", "moestro.cli", *arguments], stdout=log.open("a"), stderr=log.open("a")
            )
            return
        context = multiprocessing.get_context("forkserver")
        several = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_PORT": port}
        self.processes = [
            context.Process(
                target=run_moestro,
                args=(
                    arguments,
                    {"MASTER_ADDR": "localhost", "RANK": str(r), "LOCAL_RANK": str(r)} | several if ranks > 1 else {},
                    str(log),
                ),
            )
            for r in range(ranks)
        ]
        for process in self.processes:
            process.start()

    def codes(self) -> list[int | None]:
        """Exit codes; None for what still runs."""
        return [self.launcher.poll()] if self.torchrun else [process.exitcode for process in self.processes]

    def alive(self) -> bool:
        """Whether anything runs; where one rank failed the others are ended, as a launcher does."""
        codes = self.codes()
        if any(codes) and None in codes:
            self.end()
        return None in codes

    def end(self) -> None:
        """End what is left: with SIGTERM, then with SIGKILL."""
        if self.torchrun:
            self.launcher.wait(PATIENCE)
            return
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            process.join(10)
            if process.exitcode is None:
                process.kill()
                process.join()

    def kill(self, draw: random.Random) -> bool:
        """Kill one process, and have the others ended; False if everything had ended before."""
        if self.torchrun:
            workers = psutil.Process(self.launcher.pid).children(recursive=True) if self.launcher.poll() is None else []
            for worker in draw.sample(workers, min(1, len(workers))):
                worker.send_signal(signal.SIGKILL)
            self.launcher.wait(PATIENCE)
            return self.launcher.returncode != 0
        draw.choice(self.processes).kill()
        self.end()
        return any(process.exitcode == -signal.SIGKILL for process in self.processes)

    def wait(self) -> bool:
        """Wait for the end; whether every rank ended with 0."""
        until = time.monotonic() + PATIENCE
        while self.alive():
            if time.monotonic() > until:
                self.kill(random.Random(0))
                return False
            time.sleep(0.02)
        return not any(self.codes())


def has_begun(kind: str, out: Path) -> bool:
    """Whether the part of a run has begun in which it shall be killed."""
    if kind == "last-evaluation":
        return (out / f"checkpoint-{STEPS}" / "complete.json").exists()
    return out.exists()


def left_alone(kind: str, corpus: list[str], out: Path, torchrun: bool) -> float:
    """Run to the end; returns the seconds of the part in which others are killed."""
    ranks, log = (2 if kind.startswith("ranks") else 1), out.with_suffix(".log")
    start = Start(command(kind, corpus, out), ranks, log, torchrun)
    while not has_begun(kind, out) and start.alive():
        time.sleep(0.005)
    begun = time.monotonic()
    if not start.wait():
        raise SystemExit(f"the run that is left alone failed: {log.read_text()[-2000:]}")
    return time.monotonic() - begun


def kill_once(
    kind: str, corpus: list[str], out: Path, seconds: float, draw: random.Random, torchrun: bool
) -> dict[str, Any]:
    """Kill a run at a random moment, start it again until it ends by itself, and compare."""
    ranks, log = (2 if kind.startswith("ranks") else 1), out.with_suffix(".log")
    for attempt in range(20):
        shutil.rmtree(out, ignore_errors=True)
        start = Start(command(kind, corpus, out), ranks, log, torchrun)
        while not has_begun(kind, out) and start.alive():
            time.sleep(0.002)
        delay = draw.uniform(0, seconds) * 0.9**attempt  # a faster moment of this machine: it had ended before
        time.sleep(delay)
        if start.kill(draw):
            break
    state = sorted(path.name for path in out.iterdir()) if out.exists() else []
    started = Start(command(kind, corpus, out), ranks, log, torchrun).wait()
    wrong = [] if started else [f"the next start failed: {log.read_text()[-500:]}"]
    return {"after": round(delay, 3), "left": state, "wrong": wrong}


def differences(a: Path, b: Path) -> list[str]:
    """What differs between two folders of results, but for times; nothing if they are the same bit by bit."""
    found = []
    names = [
        {str(p.relative_to(f)) for p in f.rglob("*") if p.is_file() and p.suffix in (".json", ".jsonl", ".npz")}
        for f in (a, b)
    ]
    compared = {n for n in names[0] | names[1] if "checkpoint-" not in n and "environment" not in n}
    for name in sorted(compared | {str(p.relative_to(a)) for p in a.rglob("model/*.safetensors")}):
        if not ((a / name).exists() and (b / name).exists()):
            found.append(f"{name} is missing in one")
        elif not same(a / name, b / name):
            found.append(f"{name} differs")
    return found


def same(a: Path, b: Path) -> bool:
    """Whether two files hold the same, but for times and folders."""
    if a.suffix in (".npz", ".safetensors"):
        one, two = (load_file(path) if path.suffix == ".safetensors" else np.load(path) for path in (a, b))
        return set(one) == set(two) and all(np.array_equal(one[name], two[name], equal_nan=True) for name in one)
    one, two = (
        [json.loads(line) for line in path.read_text().splitlines()]
        if path.suffix == ".jsonl"
        else json.loads(path.read_text())
        for path in (a, b)
    )
    return steady(one) == steady(two)


def steady(value: Any) -> Any:
    """A JSON value without what changes from run to run."""
    if isinstance(value, dict):
        return {name: steady(item) for name, item in value.items() if name not in CHANGING}
    return [steady(item) for item in value] if isinstance(value, list) else value


def kills(kind: str, number: int, folder: Path, corpus: list[str], torchrun: bool) -> list[dict[str, Any]]:
    """The results of `number` kills of one kind; those that an earlier start of this script has are read."""
    kept = folder / f"{kind}.jsonl"
    results = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    if len(results) >= number:
        return results[:number]
    whole = folder / f"{kind}-whole"
    shutil.rmtree(whole, ignore_errors=True)
    seconds = left_alone(kind, corpus, whole, torchrun)
    for index in range(len(results), number):
        out = folder / f"{kind}-{index}"
        result = kill_once(kind, corpus, out, seconds, random.Random(f"{kind} {index}"), torchrun)
        result["wrong"] += differences(whole, out)
        results.append(result)
        with kept.open("a") as file:
            file.write(json.dumps(result) + "\n")
        print(
            f"{kind} {index}: {result['after']:.2f} s of {seconds:.2f} s: {result['wrong'] or 'the same'}", flush=True
        )
        if not result["wrong"]:
            shutil.rmtree(out)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10, help="of each kind")
    parser.add_argument("--only", choices=KINDS, action="append", help="one kind (may be repeated)")
    parser.add_argument("--folder", type=Path, required=True, help="where results are kept")
    parser.add_argument("--torchrun", action="store_true", help="start two ranks by torchrun")
    options = parser.parse_args()
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    os.environ |= {"MOESTRO_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    slow_to_import = ["moestro.commands.work.train", "moestro.commands.work.compare"]
    multiprocessing.get_context("forkserver").set_forkserver_preload(slow_to_import)
    corpus = write_corpus(folder / "corpus")
    found = {kind: kills(kind, options.kills, folder, corpus, options.torchrun) for kind in options.only or KINDS}
    print(f"{'kind':<16}{'kills':>6}{'bit-identical':>15}")
    for kind, results in found.items():
        print(f"{kind:<16}{len(results):>6}{sum(not result['wrong'] for result in results):>15}")
    return int(any(result["wrong"] for results in found.values() for result in results))


if __name__ == "__main__":
    sys.exit(main())
