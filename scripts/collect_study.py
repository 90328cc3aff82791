"""Collects the finished runs of a study: one table of all of them, and their summaries in one file to be committed.

    python scripts/collect_study.py runs/cartesian docs/results/cartesian

It prints the table as Markdown, and writes `runs.jsonl.gz` to the second folder: one run a line, its recipe, data hash,
environment and summary as `moestro` wrote them, so that a later study can go on from there.
"""

import gzip
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def finished(folder: Path) -> Iterator[dict[str, Any]]:
    """Every run below the folder that has a summary."""
    for path in sorted(folder.glob("**/summary.json")):
        run, environment, summary = (
            json.loads((path.parent / name).read_text()) for name in ("run.json", "environment.json", "summary.json")
        )
        yield {**run, "environment": environment, "summary": summary}


def row(run: dict[str, Any], domains: list[str]) -> str:
    """One run as a line of the table."""
    training, summary = run["recipe"]["training"], run["summary"]
    held_out, layers = summary["held_out"], summary["layers"]
    composed = [layer["composed"] for layer in layers if layer.get("composed")]
    cells = [
        run["recipe"]["name"],
        f"{training['learning_rate']:g}",
        f"{training['tokens']:,}",
        str(run["seed"]),
        f"{held_out['loss']:.4f}",
        *(f"{held_out['domains'][domain]['loss']:.3f}" for domain in domains),
        f"{mean([layer['max_vio_data'] for layer in layers]):.2f}" if layers else "",
        f"{mean([c['size'] for c in composed]):.2f}" if composed else "",
        f"{mean([c['mutual_information'] - c['mutual_information_shuffled'] for c in composed]):.2f}"
        if composed
        else "",
    ]
    return f"| {' | '.join(cells)} |"


def mean(values: list[float]) -> float:
    """Their arithmetic mean."""
    return sum(values) / len(values)


def main() -> None:
    source, target = map(Path, sys.argv[1:])
    runs = sorted(finished(source), key=lambda r: (r["recipe"]["training"]["tokens"], r["recipe"]["name"], r["seed"]))
    domains = sorted(runs[0]["summary"]["held_out"]["domains"])
    names = [
        "recipe",
        "learning rate",
        "tokens",
        "seed",
        "held-out loss",
        *domains,
        "MaxVio",
        "composed",
        "pair information",
    ]
    print(f"| {' | '.join(names)} |", "|---|" + "--:|" * (len(names) - 1), sep="\n")
    for run in runs:
        print(row(run, domains))
    target.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(run, sort_keys=True) + "\n" for run in runs)
    (target / "runs.jsonl.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))


if __name__ == "__main__":
    main()
