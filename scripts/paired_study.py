"""Compares recipes of a collected study, seed by seed, with the first of those named; and what their routers learnt.

    python scripts/paired_study.py docs/results/compete/runs.jsonl.gz --seeds 1 2 3 --learning-rate 0.002 \\
        --recipes smoe smoe+compete:balance_winners=0.05 smoe+compete:balance_winners=0.05@392790

`recipe@tokens` names runs of another budget than `--tokens`. Verdicts are those of `moestro compare`: a paired t test
per recipe, by Holm over those named.
"""

import gzip
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from collect_study import measured
from one_line import one_line

from moestro import Misuse
from moestro.difference import Difference
from moestro.statistics import compare_with_first

Run = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """Which runs."""

    runs: Annotated[Path, tyro.conf.Positional]
    recipes: tuple[str, ...]
    seeds: tuple[int, ...] = (1, 2, 3)
    learning_rate: float = 2e-3
    tokens: int = 400_000


def of_layers(name: str, chance: str | None = None) -> Callable[[Run], float | None]:
    """The mean over layers of one of their figures, above chance where that is named."""
    return lambda run: measured(run["summary"]["layers"], name, chance)


def above_fixed(run: Run) -> float | None:
    """How far agreement is above the best fixed choice's, as a share of what is left above that; mean over layers."""
    figures = [layer["figures"] for layer in run["summary"]["layers"]]
    pairs = [(f.get("agreement"), f.get("agreement_shuffled")) for f in figures]
    known = [(found - fixed) / (1 - fixed) for found, fixed in pairs if found is not None and fixed != 1]
    return statistics.fmean(known) if known else None


def gain(run: Run) -> float | None:
    """What competing at test adds to the loss."""
    competed = run["summary"]["competed"] or {}
    at_test, router = competed.get("competition"), competed.get("router")
    return None if at_test is None or router is None else at_test - router


MEASURES: tuple[tuple[str, Callable[[Run], float | None], str], ...] = (
    ("agreement with competition", of_layers("agreement"), ".3f"),
    ("of the best fixed choice", of_layers("agreement_shuffled"), ".3f"),
    ("agreement above fixed, share of the rest", above_fixed, ".3f"),
    ("regret", of_layers("regret"), ".3f"),
    ("competing at test, nats", gain, "+.3f"),
    ("entropy of the target", of_layers("target_entropy"), ".3f"),
    ("spread of responses", of_layers("spread"), ".2f"),
    ("MaxVio over all text", of_layers("max_vio_data"), ".2f"),
    ("MaxVio of winners", of_layers("winners_max_vio"), ".2f"),
    (
        "domain–expert information, nats",
        of_layers("domain_mutual_information", "domain_mutual_information_shuffled"),
        ".3f",
    ),
    ("cosine of two experts' outputs", of_layers("cosine"), ".3f"),
    ("overlap of neighbourhoods", of_layers("overlap"), ".3f"),
)


def chosen(runs: Sequence[Run], recipe: str, study: Study) -> list[Run]:
    """A recipe's runs, one per seed."""
    name, _, tokens = recipe.partition("@")
    budget = int(tokens) if tokens else study.tokens
    found = {}
    for run in runs:
        training = run["recipe"]["training"]
        key = (run["recipe"]["name"], training["tokens"], training["learning_rate"])
        if key == (name, budget, study.learning_rate):
            if run["seed"] in found:
                raise Misuse(f"there must be one run of {recipe} per seed, got two with seed {run['seed']}")
            found[run["seed"]] = run
    if missing := [seed for seed in study.seeds if seed not in found]:
        raise Misuse(f"{study.runs} must hold {recipe} with seed {', '.join(map(str, missing))}")
    return [found[seed] for seed in study.seeds]


def paired_row(name: str, losses: Sequence[float], difference: Difference | None) -> list[str]:
    """One recipe's cells in the table of losses."""
    spread = f" ± {statistics.stdev(losses):.3f}" if len(losses) > 1 else ""
    own = [f"`{name}`", f"{statistics.fmean(losses):.3f}{spread}"]
    if difference is None:
        return [*own, "", "", "", "", ""]
    low, high = difference.interval or (None, None)
    return [
        *own,
        ", ".join(f"{value:+.3f}" for value in difference.by_seed),
        f"{difference.mean:+.3f}",
        "" if low is None else f"[{low:+.3f}, {high:+.3f}]",
        difference.verdict,
        "" if difference.minimum_detectable is None else f"{difference.minimum_detectable:.3f}",
    ]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a Markdown table."""
    print(f"| {' | '.join(head)} |", "|---|" + "--:|" * (len(head) - 1), sep="\n")
    for cells in rows:
        print(f"| {' | '.join(cells)} |".replace("-0.", "−0."))
    print()


def main() -> None:
    study = tyro.cli(Study, description=__doc__)
    with gzip.open(study.runs, "rt") as file:
        runs = [json.loads(line) for line in file]
    found = [chosen(runs, recipe, study) for recipe in study.recipes]
    losses = [[run["summary"]["held_out"]["loss"] for run in own] for own in found]
    differences = [None, *compare_with_first(losses)]
    head = ["recipe", "held-out loss", "by seed", "difference", "95 % interval", "verdict", "least that would be found"]
    table(head, [paired_row(*cells) for cells in zip(study.recipes, losses, differences, strict=True)])
    rows = []
    for title, measure, form in MEASURES:
        values = [[value for run in own if (value := measure(run)) is not None] for own in found]
        rows.append([title, *(f"{statistics.fmean(v):{form}}" if v else "" for v in values)])
    table(["", *(f"`{recipe}`" for recipe in study.recipes)], rows)


if __name__ == "__main__":
    with one_line():
        main()
