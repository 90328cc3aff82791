"""Write the results of a run: each file atomically and the summary last, so that a killed finish can be repeated."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from moestro.comparison import Run
from moestro.errors import Misuse
from moestro.evaluation import Evaluation
from moestro.gate.loading import load_arrays
from moestro.gate.writing import failures_as_os_errors
from moestro.models import MoestroForCausalLM
from moestro.records import read_record, write_record
from moestro.training.checkpoints import MARKER, mark_complete, verify
from moestro.training.runs import SUMMARY

MODEL = "model"
LOSSES = "held_out.npz"


def write_results(
    folder: Path, model: MoestroForCausalLM, tokenizer: PreTrainedTokenizerBase, evaluation: Evaluation, run: Run
) -> Run:
    """Write the model, the held-out losses per document and, last, the summary. Return the run."""
    with whole_folder(folder / MODEL) as place, failures_as_os_errors(place):
        model.save_pretrained(place)
        tokenizer.save_pretrained(place)
        mark_complete(place)
    partial = folder / f"{LOSSES}.part"
    with partial.open("wb") as file:
        np.savez(file, nll=evaluation.nll, tokens=evaluation.tokens)
    partial.replace(folder / LOSSES)
    write_record(run, folder / SUMMARY)
    return run


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder that replaces `folder` when the context ends without an error."""
    place = folder.with_name(f"{folder.name}.part")
    for left in (place, folder):  # left by a killed finish
        if left.exists():
            shutil.rmtree(left)
    place.mkdir()
    yield place
    place.rename(folder)


def read_finished(folder: Path, console: Console) -> Run | None:
    """Read a run's summary; None if the run is not finished.

    Raises:
        Misuse: the summary cannot be read, or the model beside it is not the one that the run wrote.
    """
    if not (folder / SUMMARY).exists():
        return None
    advice = f"remove {folder / SUMMARY} to write it anew from the last checkpoint"
    try:
        run = read_record(Run, folder / SUMMARY)
    except Misuse as error:
        raise Misuse(f"{error}; {advice}") from None
    model = folder / MODEL
    if (model / MARKER).exists():
        verify(model, advice)
    elif run.steps is not None:  # only earlier versions wrote no marker
        console.print(f"warning: {model} is missing or has lost {MARKER}; {advice}", markup=False)
    return run


def read_losses(folder: Path) -> tuple[Float[np.ndarray, " documents"], Int[np.ndarray, " documents"]]:
    """Read (nll, tokens) of each held-out document. Raise Misuse if the file is missing or damaged."""
    path = folder / LOSSES
    advice = f"remove {folder / SUMMARY} to write it anew from the last checkpoint"
    kept = load_arrays(path, ("nll", "tokens"), f"{path} must hold the losses of a finished run ({advice})")
    return kept["nll"], kept["tokens"]
