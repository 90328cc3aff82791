"""Train one run of a comparison, or record how it failed."""

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from moestro.comparison import FailedRun, Run
from moestro.data.preparation import PreparedData
from moestro.errors import Diverged, TrainingFailed
from moestro.report.sentences import did_not_learn
from moestro.training.failures import noted_divergence
from moestro.training.ranks import on_first_rank
from moestro.training.recipe import Recipe
from moestro.training.runs import describe_run, open_run
from moestro.training.train import Options, train


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """A run that is to be trained, or only read if its folder holds it finished."""

    recipe: Recipe
    seed: int
    folder: Path
    title: str
    """Name of the run in messages."""


def make(attempt: Attempt, data: PreparedData, *, console: Console, options: Options) -> Run | FailedRun:
    """Train or read the run; return it, or the record of its failure. Print one line about it, and warnings.

    Failures of training and of the machine (a full disk) are returned, because other runs can go on.

    Raises:
        Misuse: the folder holds another run, or cannot be used.
        Interrupted: the user asked to stop.
    """
    title = attempt.title
    try:
        run = train_noted(attempt, data, console=console, options=options)
    except (TrainingFailed, OSError) as error:
        failed = failure(attempt.seed, error)
        console.print(f"{title}: {failed.reason}", markup=False)
        return failed
    speed = run.tokens_per_second or 0
    console.print(f"{title}: held-out loss {run.held_out.loss:.4f}, {speed:,.0f} tokens/s", markup=False)
    if words := did_not_learn(run):
        console.print(f"{title}: warning: {words}", markup=False)
    return run


def train_noted(attempt: Attempt, data: PreparedData, *, console: Console, options: Options) -> Run:
    """Train or read the run. If it diverges, record that in its folder, so that it is not tried again."""
    recipe, seed, folder = attempt.recipe, attempt.seed, attempt.folder
    # Check the identity first: a recorded failure must belong to this very run.
    on_first_rank(lambda: open_run(folder, describe_run(recipe, data, seed)))
    with noted_divergence(folder, seed):
        return train(recipe, data, folder, seed=seed, console=console, options=options)


def failure(seed: int, error: TrainingFailed | OSError) -> FailedRun:
    """Return the record of a failed run; its cause is "machine" for an OSError, else "training"."""
    if isinstance(error, OSError):
        named = f": {error.filename}" if error.filename else ""
        return FailedRun(seed=seed, reason=f"{error.strerror or error}{named}", cause="machine")
    return FailedRun(seed=seed, reason=str(error), step=error.step if isinstance(error, Diverged) else None)
