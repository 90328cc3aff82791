"""Resume a run from its newest complete checkpoint, with the metrics up to that step."""

import json
import shutil
from pathlib import Path
from typing import Any

from rich.console import Console

from moestro.errors import Misuse
from moestro.gate.ranges import finite
from moestro.records import write_atomically
from moestro.training.checkpoints import checkpoints, last_complete, step_of
from moestro.training.intervals import steps_per_log
from moestro.training.runs import METRICS


def resume_point(folder: Path, steps: int, console: Console) -> Path | None:
    """Return the checkpoint from which a run of `steps` steps resumes; None if it starts from scratch.

    Unfinished checkpoints are removed, because they would displace complete ones from the number that is kept. Metrics
    after the checkpoint are removed, because the run writes them again. The console reports removed checkpoints, and
    missing metrics before the checkpoint.

    Raises:
        Misuse: a complete checkpoint is corrupt, or a checkpoint is beyond the run's last step.
    """
    if beyond := [path for path in checkpoints(folder) if step_of(path) > steps]:
        raise Misuse(f"a run of {steps} steps must have no checkpoint beyond step {steps}, got {beyond[-1]}: remove it")
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
    """Remove lines after `step` and unreadable lines; return the remaining steps."""
    if not path.exists():
        return set()
    lines = [line for line in readable_metrics(path) if line["step"] <= step]
    write_atomically(path, "".join(json.dumps(line) + "\n" for line in lines))
    return {line["step"] for line in lines}


def readable_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the valid lines of a metrics file, one per step; skip lines that a crash or full disk truncated."""
    found = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if is_log(values):
            found[values["step"]] = values
    return [found[step] for step in sorted(found)]


def is_log(values: Any) -> bool:
    """Return whether a line of a metrics file holds finite numbers alone, with whole ones for step and tokens."""
    return (
        isinstance(values, dict)
        and all(type(value) in (int, float) and finite(value) for value in values.values())
        and (type(values.get("step")), type(values.get("tokens"))) == (int, int)
        and "loss" in values
    )


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the valid lines of a metrics file; none if there is no file."""
    return readable_metrics(path) if path.exists() else []
