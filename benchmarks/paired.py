"""Arms that take turns in one process, so that what drifts drifts for all: the parts that benchmarks share."""

import math
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
import tyro

from moestro import Misuse


def start(main: Callable[[Any], None], sizes: Any, what: str) -> None:
    """Read the command line into `sizes`, and run `main` on it; end with one line where the sizes cannot work."""
    try:
        chosen = tyro.cli(sizes, description=what)
        check(chosen)
        main(chosen)
    except Misuse as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def check(sizes: Any) -> None:
    """Raise Misuse where sizes cannot be built or measured, before any work."""
    given = asdict(sizes)
    for name, value in given.items():
        least = 0 if name == "warm_up" else 1
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int) and not isinstance(number, bool) and number < least:
                raise Misuse(f"--{name.replace('_', '-')} must be {least} or more, got {number}")
            if isinstance(number, float) and not 0 < number < math.inf:
                raise Misuse(f"--{name.replace('_', '-')} must be above 0 and finite, got {number}")
    if given.get("tokens", 0) % given.get("sequence", 1):
        raise Misuse(f"--tokens must be a multiple of --sequence ({sizes.sequence}), got {sizes.tokens}")
    if given.get("device", "cpu") != "cpu" and not torch.cuda.is_available():
        raise Misuse(f"--device must be cpu where there is no GPU, got {sizes.device}")
    for name in ("hidden", "width", "expert_width"):
        if given.get(name, 0) % 8:  # grouped_mm wants rows of 16 bytes
            raise Misuse(f"--{name.replace('_', '-')} must be a multiple of 8, got {given[name]}")
    if "top_k" in given and "experts" in given:
        most, fewest = (largest(given["top_k"]), -largest(given["experts"], -1))
        if most > fewest:
            raise Misuse(f"--top-k must be at most --experts ({fewest}), got {most}")


def largest(value: int | tuple[int, ...], sign: int = 1) -> int:
    """Return the largest of one number or several, each times `sign`."""
    return max(sign * number for number in (value if isinstance(value, tuple) else (value,)))


def heads(hidden: int, width: int) -> int:
    """Return how many attention heads of about `width` a hidden size, a multiple of 8, divides into."""
    return next(n for n in range(max(1, hidden // width), 0, -1) if hidden % (2 * n) == 0)


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
        low, middle, high = quartiles(ratios)
        memory = f"{peak_gib(arm):.2f}" if peak_gib else ""
        lines.append(f"| {arm} | {statistics.median(taken):.0f} | {middle:.3f} | {low:.3f} to {high:.3f} | {memory} |")
    return "\n".join(lines)


def quartiles(values: list[float]) -> list[float]:
    """Return the quartiles; of one value that value."""
    return statistics.quantiles(values * 2 if len(values) == 1 else values, n=4, method="inclusive")


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
