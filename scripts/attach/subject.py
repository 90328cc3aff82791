"""The tiny model that is checked, and what it does while nothing watches it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tiny_models
import torch
from safetensors import safe_open
from torch import Tensor

from attach.comparing import Gradients
from attach.stock import Seen, run
from moestro.adapters import observe
from moestro.routing import MoELayer, Routing


class Inapplicable(str):
    """Why a check has nothing to look at."""


@dataclass
class Subject:
    """A tiny model in train mode, with a batch whose second row ends in padding, and what it does unwatched."""

    package: str
    model: Any
    inputs: dict[str, Tensor]
    layers: list[MoELayer]
    stock_keys: set[str] = field(default_factory=set)
    """Names of the weights in the checkpoint that the model made before anything was attached to it."""
    seen: list[Seen] = field(default_factory=list)
    """What each layer is given."""
    right: dict[str, tuple[Tensor, Gradients]] = field(default_factory=dict)
    """Each loss and its gradient, in loops; without those that do not apply."""
    plain: dict[str, tuple[Any, Gradients]] = field(default_factory=dict)
    """One step with each implementation of the experts."""

    @property
    def interface(self) -> bool:
        """Whether the package is on the experts interface, whose implementations can be chosen."""
        return self.package not in tiny_models.OUTSIDE

    @property
    def several(self) -> bool:
        """Whether a token has several experts."""
        return self.seen[0].index.shape[1] > 1

    @property
    def between(self) -> dict[str, float]:
        """Weights of the losses between the experts of a token, where it has several."""
        return {"orthogonality": 0.3, "variance": 0.2} if self.several else {}

    @property
    def learned(self) -> list[Seen]:
        """The layers whose routers learn what they choose."""
        return [seen for seen in self.seen if "Hash" not in type(seen.layer.router).__name__]

    @property
    def unwatched(self) -> tuple[Any, Gradients]:
        """One step with the implementation that the model has by itself."""
        return self.plain[self.model.config._experts_implementation if self.interface else "eager"]

    def forward(self) -> Any:
        """One pass, always with the same seed."""
        return run(self.model, self.inputs)

    def objective(self, output: Any) -> Tensor:
        """The model's loss, or the size of its logits where it has none."""
        return output.loss if "labels" in self.inputs else output.logits.square().sum()

    def gradient(self, loss: Tensor, retain_graph: bool = False) -> Gradients:
        """The gradient of every parameter that has one."""
        self.model.zero_grad()
        loss.backward(retain_graph=retain_graph)
        return {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}

    def step(self) -> tuple[Any, Gradients]:
        """Forward and backward."""
        output = self.forward()
        return output, self.gradient(self.objective(output))

    def routings(self) -> dict[str, Routing]:
        """What our records of one pass say of each layer."""
        routings: dict[str, Routing] = {}
        keep = lambda record: routings.__setitem__(record.layer.name, record.routing)
        with observe(self.model, keep), torch.no_grad():
            self.forward()
        return routings

    def tensors(self) -> dict[str, Tensor]:
        """All parameters and buffers."""
        both = [*self.model.named_parameters(), *self.model.named_buffers()]
        return {name: tensor.detach() for name, tensor in both}

    def save(self, folder: str) -> set[str]:
        """Write a checkpoint, and name the weights in it."""
        self.model.save_pretrained(folder)
        keys: set[str] = set()
        for file in Path(folder).glob("*.safetensors"):
            with safe_open(file, "pt") as content:
                keys |= set(content.keys())
        return keys
