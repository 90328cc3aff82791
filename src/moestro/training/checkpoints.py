"""Checkpoints that are either complete or ignored, and verified before use.

The Trainer writes a checkpoint file by file into its final folder, so a killed process leaves half of one behind. A
marker written last, with the size and hash of every file, tells a complete checkpoint from that.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path, PurePath

from torch import nn

from moestro.errors import Diverged, Misuse
from moestro.records import write_atomically

MARKER = "complete.json"


def mark_complete(folder: Path) -> None:
    """Write the marker, after everything else is on disk."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MARKER)
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    contents = {str(path.relative_to(folder)): [path.stat().st_size, digest(path)] for path in files}
    write_atomically(folder / MARKER, json.dumps(contents, indent=1))


def digest(path: Path) -> str:
    """Hash of a file's contents."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def verify(folder: Path, advice: str) -> None:
    """Raise Misuse, ending with `advice`, if the files of a marked folder differ from its marker."""

    def require(condition: bool, what: str) -> None:
        if not condition:
            raise Misuse(f"{kind(folder)} {folder} is corrupt: {what}; {advice}")

    for name, (size, expected) in read_marker(folder, require).items():
        path = folder / name
        require(path.is_file(), f"{name} is missing")
        require(path.stat().st_size == size, f"{name} must have {size} bytes, got {path.stat().st_size}")
        require(digest(path) == expected, f"the contents of {name} have changed")


def verify_if_marked(folder: Path) -> None:
    """Raise Misuse if `folder` has a marker and its files differ from it."""
    if (folder / MARKER).exists():
        verify(folder, "restore it, or start its run again to write it anew")


def read_marker(folder: Path, require: Callable[[bool, str], None]) -> dict[str, tuple[int, str]]:
    """Return size and hash of every file that the marker names. Weights must be among them."""
    try:
        marked = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        contents = {str(PurePath(name)): (int(size), str(expected)) for name, (size, expected) in marked.items()}
    except (ValueError, TypeError, AttributeError, RecursionError):
        contents = {}
    within = all(not PurePath(name).is_absolute() and ".." not in PurePath(name).parts for name in contents)
    require(within and any(name.endswith(".safetensors") for name in contents), f"{MARKER} cannot be read")
    return contents


def kind(folder: Path) -> str:
    """Return what errors call a folder of weights: "checkpoint" or "model"."""
    return "checkpoint" if re.fullmatch(r"checkpoint-\d+", folder.name) else "model"


def step_of(folder: Path) -> int:
    """The optimiser step that a checkpoint folder was written at."""
    return int(folder.name.rpartition("-")[2])


def checkpoints(run: Path) -> list[Path]:
    """Every checkpoint folder of a run, oldest first, complete or not."""
    folders = [
        path for path in run.glob("checkpoint-*") if path.is_dir() and re.fullmatch(r"checkpoint-\d+", path.name)
    ]
    return sorted(folders, key=step_of)


def last_complete(run: Path) -> tuple[Path | None, list[Path]]:
    """(the newest complete checkpoint, verified; the newer ones that were never finished).

    Raises Misuse where a complete one is corrupt.
    """
    unfinished = []
    for folder in reversed(checkpoints(run)):
        if (folder / MARKER).exists():
            verify(folder, f"remove {folder} to resume from an earlier checkpoint")
            check_step(folder)
            return folder, unfinished
        unfinished.append(folder)
    return None, unfinished


def check_step(folder: Path) -> None:
    """Raise Misuse if a checkpoint's trainer state is from another step than its name says."""
    state = folder / "trainer_state.json"
    step = json.loads(state.read_text(encoding="utf-8"))["global_step"] if state.exists() else None
    if step != step_of(folder):
        raise Misuse(f"checkpoint {folder} must hold the state of step {step_of(folder)}, got step {step}: remove it")


def refuse_non_finite(model: nn.Module, step: int) -> None:
    """Raise Diverged if any parameter is NaN or infinite: such a checkpoint must not be saved as complete."""
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise Diverged(f"parameter {name} is not finite after step {step}; try a lower learning_rate", step=step)
