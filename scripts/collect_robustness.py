"""Collects what `moestro inspect --robustness` found of a study's runs: one table, means over seeds.

    python scripts/collect_robustness.py runs/robustness

Below the folder stands RECIPE/seed-N/routing.json. Figures are rises in held-out loss, nats per token, against the
undisturbed model; ± is the standard deviation over seeds.
"""

import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Annotated

import tyro
from one_line import one_line

from moestro import Misuse


def rises(path: Path) -> dict[tuple[str, float, str], float]:
    """What each test did to one run: (kind, amount, scope) to the rise."""
    (checkpoint,) = json.loads(path.read_text())["checkpoints"]
    tests = checkpoint["robustness"]["tests"]
    return {
        (test["kind"], test["amount"], test["scope"]["label"]): test["rise"]
        for test in tests
        if test["rise"] is not None
    }


def shown(values: list[float]) -> str:
    """Mean and spread."""
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{spread}" if values else ""


def main(study: Annotated[Path, tyro.conf.Positional]) -> None:
    """Print the table."""
    found: dict[str, list[dict]] = defaultdict(list)
    for path in sorted(study.glob("*/seed-*/routing.json")):
        found[path.parts[-3]].append(rises(path))
    if not found:
        raise Misuse(f"the folder must hold RECIPE/seed-N/routing.json, got {study}")
    tests = list(dict.fromkeys(test for runs in found.values() for run in runs for test in run))
    print(f"| test | amount | layers | {' | '.join(found)} |", "|---|--:|---|" + "--:|" * len(found), sep="\n")
    for test in tests:
        cells = [shown([run[test] for run in runs if test in run]) for runs in found.values()]
        print(f"| {test[0]} | {test[1]:g} | {test[2]} | {' | '.join(cells)} |")


if __name__ == "__main__":
    with one_line():
        tyro.cli(main, description=__doc__)
