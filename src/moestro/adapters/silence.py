"""Warn once if auxiliary losses are attached but have no effect, or another one than was meant."""

import logging
from typing import Any

import torch
from torch import Tensor

from moestro.adapters.batch import labels_of_rows
from moestro.adapters.tap import Pass

logger = logging.getLogger(__name__)

EVALUATION = (
    "no auxiliary loss is added: the model is in evaluation mode (as from_pretrained leaves it) in a pass with labels "
    "and gradients; call model.train() to train it, or torch.no_grad() to evaluate it"
)
NO_GRADIENT = (
    "the auxiliary losses change nothing: they depend on no trainable parameter; set requires_grad, or attach to the "
    "model that is trained"
)
NO_STEP = (
    "the weights changed but aux.step() was not called: lagged statistics, selection biases, competition and warm-up "
    "stay as they were at the beginning; call it after each step of the optimiser"
)
UNCOUNTED = (
    "{} passes were added up before aux.step(), and each counted as a whole batch: if they are micro-batches of one "
    "batch, pass the model num_items_in_batch, the number of label tokens of all of them"
)


class Silence:
    """Warnings about losses without effect, each given once."""

    def __init__(self) -> None:
        self._said: set[str] = set()
        self._version = -1
        """How often the weight that is looked at had changed at the latest pass."""
        self._passes = 0
        """Training passes of a hand-written loop since the last step."""
        self._uncounted = False
        """Whether one of them was not told the label tokens of the whole batch."""

    def say(self, reason: str) -> None:
        """Warn for this reason unless it was given before."""
        if reason not in self._said:
            self._said.add(reason)
            logger.warning(reason)

    def look_at_pass(self, current: Pass, inputs: dict[str, Any]) -> None:
        """Warn if a pass that looks like training is in evaluation mode."""
        if torch.compiler.is_compiling() or current.training or not torch.is_grad_enabled():
            return
        if labels_of_rows(inputs, shifts_labels=False) is not None:
            self.say(EVALUATION)

    def look_at_total(self, total: Tensor) -> None:
        """Warn if the losses have no gradient."""
        if not torch.compiler.is_compiling() and torch.is_grad_enabled() and not total.requires_grad:
            self.say(NO_GRADIENT)

    def look_at_loop(self, weight: Tensor | None, *, needs_step: bool, counted: bool) -> None:
        """Warn if a hand-written loop changed its weights after a pass, but told `AuxLosses` of no step.

        `weight` is any trainable parameter; None if there is none.
        """
        if torch.compiler.is_compiling() or weight is None:
            return
        if needs_step and self._passes and weight._version != self._version:
            self.say(NO_STEP)
        self._version, self._passes = weight._version, self._passes + 1
        self._uncounted = self._uncounted or not counted

    def look_at_step(self) -> None:
        """Warn if several passes of one step did not know the size of their batch."""
        if self._passes > 1 and self._uncounted:
            self.say(UNCOUNTED.format(self._passes))
        self._passes, self._uncounted = 0, False
