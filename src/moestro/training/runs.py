"""A run is a folder. What it holds says what it is, how far it came, and whether it is finished.

`run.json` (what was asked, resolved), `environment.json`, `metrics.jsonl`, `choices/` (what routers chose on a part of
the held-out text, at each point of the curve), `checkpoint-N/`, `held_out.npz` (loss per document), `model/` (the final
weights) and, written last, `summary.json`, whose presence means finished.
"""

import json
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

from moestro.data.preparation import PreparedData
from moestro.errors import Misuse
from moestro.records import write_atomically
from moestro.training.recipe import Recipe

RUN = "run.json"
SUMMARY = "summary.json"
METRICS = "metrics.jsonl"
CHOICES = "choices"


def describe_run(recipe: Recipe, data: PreparedData, seed: int) -> dict[str, Any]:
    """What identifies a run: two runs that agree here are the same run."""
    return {"recipe": asdict(recipe), "seed": seed, "data": data.hash}


def open_run(folder: Path, description: dict[str, Any]) -> None:
    """Make the folder, or check that what it holds is this very run. Raises Misuse where it is another."""
    path = folder / RUN
    if path.exists():
        there, here = json.loads(path.read_text()), json.loads(json.dumps(description))
        difference = first_difference(identity(there), identity(here))
        if difference:
            field, old, new = difference
            raise Misuse(
                f"{folder} holds another run: {field} is {old!r} there and {new!r} here; "
                "name another folder with --out, or remove that one"
            )
        return
    if folder.exists() and any(folder.iterdir()):
        raise Misuse(f"{folder} must be empty or hold a run of moestro: it has files but no {RUN}")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "environment.json", json.dumps(environment(), indent=1))
    write_atomically(path, json.dumps(description, indent=1))


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


def environment() -> dict[str, str]:
    """Versions and hardware, for whoever wants to reproduce a run."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else processor()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "platform": platform.platform(),
        "device": device,
        "threads": str(torch.get_num_threads()),
    }


def processor() -> str:
    """The processor's name, as Linux knows it."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if "model name" in line] if info.exists() else []
    name = names[0].partition(":")[2].strip() if names else platform.processor()
    amx = " with AMX" if torch.backends.cpu.get_cpu_capability() and has_amx(info) else ""
    return name + amx


def has_amx(info: Path) -> bool:
    """Whether the processor has bf16 tile products."""
    return info.exists() and "amx_bf16" in info.read_text()


def keep_metrics_until(path: Path, step: int) -> None:
    """Drop the lines after `step`: a run that resumes there writes them again."""
    if not path.exists():
        return
    lines = [line for line in path.read_text().splitlines() if line.endswith("}") and json.loads(line)["step"] <= step]
    write_atomically(path, "".join(line + "\n" for line in lines))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file."""
    return [json.loads(line) for line in path.read_text().splitlines()]
