"""Runs that fail: noted in their folders, so that a comparison goes on without them and does not try them again."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moestro.comparison import FailedRun
from moestro.errors import Diverged
from moestro.records import read_record, write_record
from moestro.training.ranks import on_first_rank

FAILED = "failed.json"
"""Why a run failed, in its folder."""


@contextmanager
def noted_divergence(folder: Path, seed: int) -> Iterator[None]:
    """Note in the run's folder that it diverged; raise the same error again, without trying, if it did before.

    Other failures are not noted: they may have causes that the user has removed since.
    """
    note = folder / FAILED
    known = on_first_rank(lambda: read_record(FailedRun, note) if note.exists() else None)
    if known is not None:
        raise Diverged(f"failed before: {known.reason} (to try again, remove {folder})", step=known.step)
    try:
        yield
    except Diverged as error:
        failed = FailedRun(seed=seed, reason=str(error), step=error.step)
        on_first_rank(lambda: write_record(failed, note))
        raise
