"""Record diverged runs in their folders, so that a comparison continues without them and does not retry them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moestro.comparison import FailedRun
from moestro.errors import Diverged
from moestro.records import read_record, write_record
from moestro.training.ranks import on_first_rank

FAILED = "failed.json"
"""Name of the file in a run's folder that records why it diverged."""


@contextmanager
def noted_divergence(folder: Path, seed: int) -> Iterator[None]:
    """Record in the run's folder that it diverged. If it diverged before, raise that error again without training.

    Other failures are not recorded: the user may have removed their cause.
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
