"""Seconds until the command line answers: help, refusals of mistyped words, and the cost of recipes.

Run it on an idle machine: python benchmarks/startup.py
"""

import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from statistics import median

from paired import machine, start

WORDS = [
    ["--help"],
    ["train", "--help"],
    ["compare", "--help"],
    ["inspect", "--help"],
    ["recipes", "--help"],
    ["fly"],
    ["train", "smoe", "--nothing"],
    ["train", "nothing"],
    ["train", "smoe:top_k=17"],
    ["train", "smoe", "--set", "width=800000", "num_experts=60000", "num_layers=2000"],
    ["compare", "smoe", "dense:tokens=9999"],
    ["inspect"],
]
COSTS = [["compare", "smoe", "cartesian", "--dry-run"], ["recipes"]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """The measurement."""

    repeats: int = 5
    """How often each command runs; the median is printed."""
    costs: bool = True
    """Measure the commands that print costs too."""


def seconds(arguments: list[str]) -> tuple[float, float]:
    """Wall and user time of `moestro ARGUMENTS`."""
    start, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    subprocess.run([sys.executable, "-m", "moestro.cli", *arguments], capture_output=True)
    return time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - used


def main(sizes: Sizes) -> None:
    print(machine("cpu"))
    print("\n| command | seconds | of them user time |\n|---|---|---|")
    for arguments in [*WORDS, *(COSTS if sizes.costs else [])]:
        wall, user = zip(*(seconds(arguments) for _ in range(sizes.repeats)), strict=True)
        print(f"| moestro {' '.join(arguments)} | {median(wall):.2f} | {median(user):.2f} |", flush=True)


if __name__ == "__main__":
    start(main, Sizes, __doc__ or "")
