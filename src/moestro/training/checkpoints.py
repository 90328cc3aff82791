"""Checkpoints that can be trusted: complete or not there, and what they hold verified before anything is resumed.

The Trainer writes a checkpoint file by file into its final folder, so a killed process leaves half of one behind. A
marker written last, with the size and hash of every file, tells a complete checkpoint from that.
"""

import hashlib
import json
import os
import re
from pathlib import Path

from torch import nn

from moestro.errors import Misuse, TrainingFailed
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


def verify(folder: Path) -> None:
    """Raise Misuse if a marked checkpoint does not hold what its marker says."""
    contents = json.loads((folder / MARKER).read_text())
    for name, (size, expected) in contents.items():
        path = folder / name
        advice = f"remove {folder} to resume from an earlier checkpoint"
        if not path.exists():
            raise Misuse(f"checkpoint {folder} is corrupt: {name} is missing; {advice}")
        if path.stat().st_size != size:
            raise Misuse(
                f"checkpoint {folder} is corrupt: {name} must have {size} bytes, got {path.stat().st_size}; {advice}"
            )
        if digest(path) != expected:
            raise Misuse(f"checkpoint {folder} is corrupt: the contents of {name} have changed; {advice}")


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
            verify(folder)
            return folder, unfinished
        unfinished.append(folder)
    return None, unfinished


def refuse_non_finite(model: nn.Module, step: int) -> None:
    """Raise TrainingFailed if any parameter is NaN or infinite: such a checkpoint must not look good."""
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise TrainingFailed(f"parameter {name} is not finite after step {step}")
