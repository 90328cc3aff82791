"""Arms that take turns in one process, so that what drifts drifts for all: the parts that benchmarks share."""

import platform
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
import transformers


def rounds(
    arms: Sequence[str], step: Callable[[str, int], float], *, number: int, warm_up: int
) -> dict[str, list[float]]:
    """What `step(arm, round)` returned for every arm in every round after the warm-up.

    Their order is drawn anew each round: who comes after whom matters (caches, freed memory).
    """
    times: dict[str, list[float]] = {arm: [] for arm in arms}
    for index in range(warm_up + number):
        for arm in random.sample(list(arms), len(arms)):
            taken = step(arm, index)
            if index >= warm_up:
                times[arm].append(taken)
        print(f"\rround {index + 1} of {warm_up + number}", end="", file=sys.stderr)
    print(file=sys.stderr)
    return times


def milliseconds(step: Callable[[], object], device: str) -> float:
    """How long it takes; on a CPU in time of this process alone, where others may be busy."""
    clock = time.perf_counter if device == "cuda" else time.process_time
    wait(device)
    start = clock()
    step()
    wait(device)
    return 1e3 * (clock() - start)


def wait(device: str) -> None:
    """Until the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def table(what: str, times: Mapping[str, list[float]], base: str, peak_gib: Callable[[str], float] | None) -> str:
    """Median milliseconds of every arm, and its ratio to `base` of the same round."""
    lines = [f"| {what} | ms a step (CPU time on a CPU) | ratio | quartiles | peak GiB |", "|---|--:|--:|--:|--:|"]
    for arm, taken in times.items():
        ratios = [ours / theirs for ours, theirs in zip(taken, times[base], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        memory = f"{peak_gib(arm):.2f}" if peak_gib else ""
        lines.append(f"| {arm} | {statistics.median(taken):.0f} | {middle:.3f} | {low:.3f} to {high:.3f} | {memory} |")
    return "\n".join(lines)


def report(what: str, sizes: Any, times: Mapping[str, list[float]], base: str, steps: Callable[[str], object]) -> None:
    """Print machine, versions, sizes and the table, with peak memory of `steps(arm)` where `sizes.memory` is set."""
    where = machine(sizes.device)
    print(f"{where}; torch {torch.__version__}, transformers {transformers.__version__}; {sizes}\n")
    print(table(what, times, base, (lambda arm: peak_gib(sizes, arm, steps)) if sizes.memory else None))


def peak_gib(sizes: Any, arm: str, steps: Callable[[str], object]) -> float:
    """Peak memory of `steps(arm)`: on a GPU what torch allocated, on a CPU the resident set of a process of its own.

    For the latter this program is started again with `--only` and all of its sizes; it must print `resident_gib()`.
    """
    if sizes.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        steps(arm)
        return torch.cuda.max_memory_allocated() / 2**30
    flags = [f"--only={arm}"]
    for name, value in asdict(sizes).items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, tuple):
            flags += [f"--{flag}", *map(str, value)]
        elif name != "only":
            flags.append(f"--{flag}={value}")
    done = subprocess.run([sys.executable, sys.argv[0], *flags], capture_output=True, text=True, check=True)
    return float(done.stdout)


def resident_gib() -> float:
    """The most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def machine(device: str) -> str:
    """The device's name; of a processor as Linux gives it, with what matters for bf16."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        with open("/proc/cpuinfo") as info:
            fields = dict(line.split(":", 1) for line in info.read().split("\n\n")[0].splitlines() if ":" in line)
    except OSError:
        return platform.processor()
    known = {name.strip(): value.strip() for name, value in fields.items()}
    features = [name for name in ("amx_bf16", "avx512_bf16") if name in known.get("flags", "").split()]
    return f"{known.get('model name', platform.processor())} ({', '.join(features) or 'no bf16 instructions'})"
