"""A run is a folder. What it holds says what it is, how far it came, and whether it is finished.

`run.json` (what was asked, resolved; written first), `environment.json`, `metrics.jsonl`, `choices/` (what routers
chose on a part of the held-out text, at each point of the curve), `checkpoint-N/`, `model/` (the final weights, with a
marker that holds their hashes), `held_out.npz` (loss per document) and, written last, `summary.json`, whose presence
means finished. `.lock` is held by the process that trains.
"""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moestro.data.preparation import PreparedData
from moestro.errors import Misuse
from moestro.gate.loading import contents
from moestro.records import write_atomically
from moestro.training.environment import environment
from moestro.training.owner import LOCK, check_writable
from moestro.training.recipe import Recipe

RUN = "run.json"
ENVIRONMENT = "environment.json"
SUMMARY = "summary.json"
METRICS = "metrics.jsonl"
CHOICES = "choices"
LEFT_BY_A_START = {LOCK, f"{RUN}.part", ENVIRONMENT, f"{ENVIRONMENT}.part"}
"""Files that a process may leave if it is killed before it writes the run's identity."""
DTYPES = ("auto", "float32", "bfloat16")


def describe_run(recipe: Recipe, data: PreparedData, seed: int) -> dict[str, Any]:
    """What identifies a run: two runs that agree here are the same run."""
    return {"recipe": asdict(recipe), "seed": seed, "data": data.hash}


def check_folder(folder: Path) -> None:
    """Raise Misuse unless a run can live in `folder`: it is empty or absent, or holds a run or the start of one.

    Write nothing, so that a mistake is reported before any work.
    """
    if not os.path.exists(folder / SUMMARY):  # a finished run is only read
        check_writable(folder)
    names = {path.name for path, _ in contents(folder)}
    if RUN not in names and names - LEFT_BY_A_START:
        raise Misuse(f"{folder} must be empty or hold a run of moestro: it has files but no {RUN}")


def open_run(folder: Path, description: dict[str, Any]) -> None:
    """Write the identity of a new run, or raise Misuse if the folder holds another run."""
    check_folder(folder)
    if (folder / RUN).exists():
        check_identity(folder, description)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / RUN, json.dumps(description, indent=1))
    if not (folder / ENVIRONMENT).exists():
        write_atomically(folder / ENVIRONMENT, json.dumps(environment(), indent=1))


def check_identity(folder: Path, description: dict[str, Any]) -> None:
    """Raise Misuse unless the folder holds the run that `description` identifies."""
    there, here = read_description(folder / RUN), json.loads(json.dumps(description))
    if difference := first_difference(identity(there), identity(here)):
        field, old, new = difference
        raise Misuse(
            f"{folder} holds another run: {field} is {old!r} there and {new!r} here; "
            "name another folder with --out, or remove that one"
        )


def read_description(path: Path) -> dict[str, Any]:
    """Read a run's description. Raise Misuse if the file is damaged."""
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        whole = isinstance(description["recipe"], dict) and description["recipe"]["training"]["dtype"] in DTYPES
    except (ValueError, LookupError, TypeError, RecursionError):
        whole = False
    if not whole:
        raise Misuse(f"{path} must hold the description of a run, and is damaged: remove {path.parent} to train anew")
    return description


def identity(description: dict[str, Any]) -> dict[str, Any]:
    """A run's description without the recipe's, which is words: other words for it are no other run."""
    recipe = {name: value for name, value in description["recipe"].items() if name != "description"}
    return description | {"recipe": recipe}


def first_difference(a: Any, b: Any, name: str = "") -> tuple[str, Any, Any] | None:
    """The first leaf in which two trees of plain data differ: (its name, its value in a, its value in b)."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in [*a, *(key for key in b if key not in a)]:
            if found := first_difference(a.get(key), b.get(key), key):
                return found
        return None
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for left, right in zip(a, b, strict=True):
            if found := first_difference(left, right, name):
                return found
        return None
    return None if a == b else (name, a, b)
