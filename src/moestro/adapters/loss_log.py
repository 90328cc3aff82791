"""Log the task loss and each weighted auxiliary loss separately while losses are attached to a trainer.

The trainer's own `loss` is their sum, which does not show whether an auxiliary loss is too large or the task fails.
"""

from collections.abc import Mapping
from math import isfinite

import torch
from torch import Tensor

from moestro.adapters.ranks import num_ranks, over_ranks

TASK = "loss_task"


class LossLog:
    """Sums of losses since the last log. They stay on the device and are read once per log."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.once: dict[str, float] = {}
        """Figures that appear in the next log only."""
        self.step = 0
        """The optimiser step of the last log."""

    def begin(self, step: int) -> None:
        """Clear everything; the next log takes means over the steps after `step`."""
        self.sums, self.once, self.step = {}, {}, step

    def note(self, ratios: Mapping[str, float]) -> None:
        """Add gradient ratios to the next log, except those that could not be measured."""
        self.once |= {f"aux/{name}/gradient_ratio": ratio for name, ratio in ratios.items() if isfinite(ratio)}

    def add(self, task: Tensor, terms: Mapping[str, Tensor], divisor: int) -> None:
        """Add the losses of one micro-batch, whose share in the step's gradient is 1 / `divisor`."""
        for name, value in {TASK: task, **{f"aux/{name}": term for name, term in terms.items()}}.items():
            part = value.detach().mean() / divisor
            self.sums[name] = part if name not in self.sums else self.sums[name] + part.to(self.sums[name].device)

    def figures(self, step: int) -> dict[str, float]:
        """Return means over ranks and the steps since the last log, like the Trainer's `loss`, and clear everything.

        The result is empty if no loss was added. All ranks must call this together.
        """
        sums, once, steps = self.sums, self.once, max(1, step - self.step)
        self.begin(step)
        if not sums:
            return {}
        device = sums[TASK].device
        values = over_ranks(torch.stack([value.to(device, torch.float32) for value in sums.values()]))
        return dict(zip(sums, (values / (steps * num_ranks())).tolist(), strict=True)) | once
