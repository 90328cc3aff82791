"""Collects the finished runs of a study: one table of all of them, and their summaries in one file to be committed.

    python scripts/collect_study.py runs/cartesian docs/results/cartesian

It prints the table as Markdown, and writes `runs.jsonl.gz` to the second folder: one run a line, its recipe, data hash,
environment and summary as `moestro` wrote them, so that a later study can go on from there.
"""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import tyro
from one_line import one_line

from moestro import Misuse

MEASURES = (
    ("MaxVio", ("max_vio_data",), 2),
    ("domain information", ("domain_mutual_information", "domain_mutual_information_shuffled"), 3),
    ("cosine", ("cosine",), 3),
    ("composed", ("composed",), 2),
    ("pair information", ("pair_information", "pair_information_shuffled"), 2),
    ("agreement", ("agreement",), 3),
    ("best fixed choice", ("agreement_shuffled",), 3),
    ("regret", ("regret",), 3),
)
"""Titles of columns, the figures of a layer they show (above chance where that is the second), decimals."""


def finished(folder: Path) -> Iterator[dict[str, Any]]:
    """Every run below the folder that has a summary."""
    for path in sorted(folder.glob("**/summary.json")):
        run, environment, summary = (
            json.loads((path.parent / name).read_text()) for name in ("run.json", "environment.json", "summary.json")
        )
        yield {**run, "environment": environment, "summary": summary}


def row(run: dict[str, Any], domains: list[str]) -> list[str]:
    """One run's cells."""
    training, summary = run["recipe"]["training"], run["summary"]
    held_out, layers, competed = summary["held_out"], summary["layers"], summary["competed"]
    return [
        run["recipe"]["name"],
        f"{training['learning_rate']:g}",
        f"{training['tokens']:,}",
        str(run["seed"]),
        f"{held_out['loss']:.4f}",
        *(f"{held_out['domains'][domain]['loss']:.3f}" for domain in domains),
        *(cell(measured(layers, *names), decimals) for _, names, decimals in MEASURES),
        cell(competed and competed["competition"] - competed["router"], 3),
    ]


def measured(layers: list[dict[str, Any]], name: str, chance: str | None = None) -> float | None:
    """Mean over layers of a number, above chance where that is named; None where no layer has it."""
    figures = [layer["figures"] for layer in layers if layer["figures"].get(name) is not None]
    return sum(f[name] - (f[chance] if chance else 0.0) for f in figures) / len(figures) if figures else None


def cell(value: float | None, decimals: int) -> str:
    """A number, or nothing."""
    return "" if value is None else f"{value:.{decimals}f}"


def main(source: Annotated[Path, tyro.conf.Positional], target: Annotated[Path, tyro.conf.Positional]) -> None:
    """Print the table of the runs below `source`, and write them to `target`."""
    runs = sorted(finished(source), key=lambda r: (r["recipe"]["training"]["tokens"], r["recipe"]["name"], r["seed"]))
    if not runs:
        raise Misuse(f"the folder must hold finished runs of moestro, got {source}")
    domains = sorted(runs[0]["summary"]["held_out"]["domains"])
    names = [
        "recipe",
        "learning rate",
        "tokens",
        "seed",
        "held-out loss",
        *domains,
        *(title for title, _, _ in MEASURES),
        "competing at test",
    ]
    columns = [column for column in zip(names, *(row(run, domains) for run in runs), strict=True) if any(column[1:])]
    head, *lines = zip(*columns, strict=True)
    print(f"| {' | '.join(head)} |", "|---|" + "--:|" * (len(head) - 1), sep="\n")
    for cells in lines:
        print(f"| {' | '.join(cells)} |")
    target.mkdir(parents=True, exist_ok=True)
    records = "".join(json.dumps(run, sort_keys=True) + "\n" for run in runs)
    (target / "runs.jsonl.gz").write_bytes(gzip.compress(records.encode(), mtime=0))


if __name__ == "__main__":
    with one_line():
        tyro.cli(main, description=__doc__)
