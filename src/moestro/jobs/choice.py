"""How many runs train at once."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import psutil
import torch

from moestro.errors import Misuse
from moestro.training.estimate import memory_bytes
from moestro.training.recipe import Recipe

PROCESS_BYTES = 600_000_000
"""Memory of a worker with its libraries, before it builds a model."""


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
