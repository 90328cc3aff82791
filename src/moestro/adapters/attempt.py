"""Discard the statistics of a pass or micro-batch that failed before its end."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from moestro.adapters.batch import TrainerBatch

if TYPE_CHECKING:
    from moestro.adapters.layer_losses import LayerLosses, Seen


class Attempt:
    """The part of a batch that is running: one forward pass of the model, or one micro-batch of a trainer.

    A pass may run out of memory after some of its layers have run, and then run again on fewer rows. The statistics of
    the optimiser step must not include the failed attempt.
    """

    def __init__(self, layers: "Sequence[LayerLosses]") -> None:
        self.layers = layers
        self.before: list[Seen] | None = None
        """Statistics of each layer when the current part began; None between parts."""

    def begin(self) -> None:
        """Begin a part. Discard the previous one if it never ended."""
        self.undo()
        self.before = [layer.seen() for layer in self.layers]

    def end(self) -> None:
        """Keep the statistics of the current part."""
        self.before = None

    def undo(self) -> None:
        """Discard the statistics of the current part."""
        if self.before is not None:
            for layer, seen in zip(self.layers, self.before, strict=True):
                layer.go_back_to(seen)
        self.before = None

    @contextmanager
    def of_trainer(self, trainer: TrainerBatch) -> Iterator[None]:
        """Treat all passes within the context as one part, and discard it if the context raises."""
        self.begin()
        trainer.computes_loss = True
        try:
            yield
            self.end()
        finally:
            trainer.computes_loss = False
            self.undo()
