"""Where a run goes on: from its newest complete checkpoint, with the metrics up to there and no others."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

from rich.console import Console

from moestro.errors import Misuse
from moestro.records import write_atomically
from moestro.training.checkpoints import checkpoints, last_complete, step_of
from moestro.training.intervals import steps_per_log
from moestro.training.runs import METRICS


def resume_point(folder: Path, steps: int, console: Console) -> Path | None:
    """Return the checkpoint from which a run of `steps` steps goes on; None where it starts.

    Unfinished checkpoints go, lest they push a complete one out of those that are kept, and so do metrics from after
    the checkpoint, which the run writes again. The console tells both, and whether earlier metrics are lost.

    Raises:
        Misuse: a complete checkpoint is corrupt, or from after the run's last step.
    """
    if beyond := [path for path in checkpoints(folder) if step_of(path) > steps]:
        raise Misuse(f"checkpoints of a run of {steps} steps must not be from after them, got {beyond[-1]}: remove it")
    checkpoint, unfinished = last_complete(folder)
    for path in unfinished:
        console.print(f"skipping {path}: it was never finished", markup=False)
        shutil.rmtree(path)
    step = step_of(checkpoint) if checkpoint else 0
    if checkpoint is not None:
        console.print(f"resuming from {checkpoint}", markup=False)
    kept = keep_metrics_until(folder / METRICS, step)
    expected = range(steps_per_log(steps), step + 1, steps_per_log(steps))
    if lost := set(expected) - kept:
        console.print(
            f"warning: {folder / METRICS} has lost {len(lost)} of the {len(expected)} points before step {step}: "
            "the learning curve will be incomplete",
            markup=False,
        )
    return checkpoint


def keep_metrics_until(path: Path, step: int) -> set[int]:
    """Drop the lines after `step`, and those that cannot be read; return the steps that are left."""
    if not path.exists():
        return set()
    lines = [line for line in readable_metrics(path) if line["step"] <= step]
    write_atomically(path, "".join(json.dumps(line) + "\n" for line in lines))
    return {line["step"] for line in lines}


def readable_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines that a run wrote, without those that a crash or a full disk cut short, each step once."""
    found = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            values = json.loads(line)
            numbers = [float(value) for value in values.values()]
            if all(map(math.isfinite, numbers)) and values.keys() >= {"step", "tokens", "loss"}:
                found[values["step"]] = values
        except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
            continue
    return [found[step] for step in sorted(found)]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics file; none where there is no file."""
    return readable_metrics(path) if path.exists() else []
