"""Seconds until the command line answers: help, refusals of mistyped words, and the list of recipes.

Run on an idle machine: python benchmarks/startup.py
"""

import subprocess
import sys
import time
from statistics import median

REPEATS = 5
COMMANDS = [
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
    ["train", "smoe", "--dry-run"],
    ["recipes"],
]


def seconds(arguments: list[str]) -> float:
    """How long `moestro ARGUMENTS` takes."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "moestro.cli", *arguments], capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    for arguments in COMMANDS:
        print(f"{median(seconds(arguments) for _ in range(REPEATS)):6.2f} s  moestro {' '.join(arguments)}", flush=True)


if __name__ == "__main__":
    main()
