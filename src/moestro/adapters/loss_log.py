"""What a trainer logs while losses are attached: the task's loss and each weighted auxiliary loss apart.

The trainer's own `loss` is their sum, in which a loss that outweighs the task cannot be told from a task that fails.
"""

from collections.abc import Mapping
from math import isfinite

import torch
from torch import Tensor

from moestro.adapters.ranks import num_ranks, over_ranks

TASK = "loss_task"


class LossLog:
    """Sums since the last log. They stay on the device, and are read once per log."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.once: dict[str, float] = {}
        """What the next log says and no other."""
        self.step = 0
        """The optimiser step that the last log followed."""

    def begin(self, step: int) -> None:
        """Forget what was seen: training starts, or starts again, after this step."""
        self.sums, self.once, self.step = {}, {}, step

    def note(self, ratios: Mapping[str, float]) -> None:
        """Say in the next log how large the gradient of some losses is beside the task's, if that is known."""
        self.once |= {f"aux/{name}/gradient_ratio": ratio for name, ratio in ratios.items() if isfinite(ratio)}

    def add(self, task: Tensor, terms: Mapping[str, Tensor], divisor: int) -> None:
        """Add one micro-batch, of which the gradient holds 1 / `divisor`."""
        for name, value in {TASK: task, **{f"aux/{name}": term for name, term in terms.items()}}.items():
            part = value.detach().mean() / divisor
            self.sums[name] = part if name not in self.sums else self.sums[name] + part.to(self.sums[name].device)

    def figures(self, step: int) -> dict[str, float]:
        """Mean over the optimiser steps up to `step` and over ranks, as the Trainer has it of `loss`; start anew."""
        sums, once, steps = self.sums, self.once, max(1, step - self.step)
        self.begin(step)
        if not sums:
            return {}
        device = sums[TASK].device
        values = over_ranks(torch.stack([value.to(device, torch.float32) for value in sums.values()]))
        return dict(zip(sums, (values / (steps * num_ranks())).tolist(), strict=True)) | once
