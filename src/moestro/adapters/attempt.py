"""Forgetting what layers saw in a part of a batch that broke off."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from moestro.adapters.batch import TrainerBatch

if TYPE_CHECKING:
    from moestro.adapters.layer_losses import LayerLosses, Seen


class Attempt:
    """The part of a batch that runs now: a pass of the model, or a trainer's micro-batch.

    A pass may run out of memory after some of its layers have run, and be run again on fewer rows. The statistics of
    the optimiser step must not hold the first attempt.
    """

    def __init__(self, layers: "Sequence[LayerLosses]") -> None:
        self.layers = layers
        self.before: list[Seen] | None = None
        """What layers had seen before the part that has not ended yet."""

    def begin(self) -> None:
        """Begin a part; forget the one before if it never ended."""
        self.undo()
        self.before = [layer.seen() for layer in self.layers]

    def end(self) -> None:
        """Let the part count."""
        self.before = None

    def undo(self) -> None:
        """Forget the part that has not ended."""
        if self.before is not None:
            for layer, seen in zip(self.layers, self.before, strict=True):
                layer.go_back_to(seen)
        self.before = None

    @contextmanager
    def of_trainer(self, trainer: TrainerBatch) -> Iterator[None]:
        """Count the passes until the context ends as one part, or not at all if it raises."""
        self.begin()
        trainer.computes_loss = True
        try:
            yield
            self.end()
        finally:
            trainer.computes_loss = False
            self.undo()
