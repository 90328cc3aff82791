"""Warn once if auxiliary losses are attached but have no effect."""

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


class Silence:
    """Warnings about losses without effect, each given once."""

    def __init__(self) -> None:
        self._said: set[str] = set()

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
