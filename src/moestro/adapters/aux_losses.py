"""`AuxLosses`: auxiliary losses whose gradient does not depend on how the batch is cut.

Each sequence contributes the mean of a loss over its valid tokens, times (its label tokens / label tokens of the whole
batch). Summed over micro-batches, accumulation steps and ranks that is one fixed number, whatever the cut. The
batch-coupled balance keeps this with the load of the previous optimiser step (`lagged`). transformers' own auxiliary
loss has none of it: it is added whole to every micro-batch and multiplied by the number of ranks.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from moestro.adapters.layers import moe_layers
from moestro.adapters.observe import observe
from moestro.balance import next_bias
from moestro.errors import Misuse
from moestro.losses import PerSequence, balance_against, balance_per_sequence, load_share, router_z
from moestro.routing import LayerRecord, MoELayer, choices


@dataclass(kw_only=True)
class AuxLosses:
    """Auxiliary losses to attach to a model or a trainer.

    The total added to the loss is sum over losses of weight * (mean over MoE blocks of the sum over their sub-layers).
    For a hand-written loop `with aux.attach(model):` adds it to the loss that the model returns; pass the model
    `num_items_in_batch` (label tokens of the whole batch) when accumulating, and call `aux.step()` after each
    optimiser step. `with aux.attach(trainer):` does both by itself.
    """

    balance: float = 0.0
    balance_over: Literal["sequence", "batch", "lagged"] = "sequence"
    """Which tokens' load is balanced: each sequence's own; the micro-batch's (over all ranks; with accumulation its
    gradient depends on the cut); or the previous optimiser step's, which is exact under any cut and uniform at first.
    """
    router_z: float = 0.0
    bias_rate: float = 0.0
    """Loss-free balance: how far selection biases move per optimiser step; 0 leaves them."""

    _layers: list[MoELayer] = field(default_factory=list, init=False, repr=False)
    _blocks: int = field(default=1, init=False, repr=False)
    _share: Tensor | None = field(default=None, init=False, repr=False)
    _items: Any = field(default=None, init=False, repr=False)
    _terms: list[dict[str, Tensor]] = field(default_factory=list, init=False, repr=False)
    _load: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    _lagged: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    last: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    """Unweighted value of each loss in the latest micro-batch, detached (as much of it as that micro-batch is)."""

    def __post_init__(self) -> None:
        for name in ("balance", "router_z", "bias_rate"):
            if not getattr(self, name) >= 0:
                raise Misuse(f"{name} must be 0 or more, got {getattr(self, name)}")
        if self.balance_over not in ("sequence", "batch", "lagged"):
            raise Misuse(f"balance_over must be sequence, batch or lagged, got {self.balance_over!r}")

    @contextmanager
    def attach(self, target: nn.Module | Trainer) -> Iterator["AuxLosses"]:
        """Add the losses to what `target` (a model, or the trainer of one) minimises, until the context ends."""
        if self._layers:
            raise Misuse("these AuxLosses are attached already: detach them first, or make a second AuxLosses")
        attached = self._to_trainer(target) if isinstance(target, Trainer) else self._to_model(target)
        with attached:
            try:
                yield self
            finally:
                self._layers = []

    def total(self) -> Tensor | None:
        """The weighted sum of the latest pass, with its graph; None where no layer reported."""
        if not self._terms:
            return None
        weights = {"balance": self.balance, "router_z": self.router_z}
        sums = {name: sum(term[name] for term in self._terms) / self._blocks for name in self._terms[0]}
        self._terms = []
        self.last = {name: value.detach() for name, value in sums.items()}  # type: ignore[union-attr]
        return sum(weights[name] * value for name, value in sums.items())  # type: ignore[return-value]

    @torch.no_grad()
    def step(self) -> None:
        """Call after each optimiser step: the step's load becomes the lagged one, and selection biases move."""
        for layer in self._layers:
            if (load := self._load.pop(layer.name, None)) is None:
                continue
            if dist.is_initialized():
                dist.all_reduce(load)
            self._lagged[layer.name] = load / load.sum().clamp_min(1)
            if self.bias_rate and layer.selection_bias is not None:
                layer.selection_bias.copy_(next_bias(layer.selection_bias, load, self.bias_rate))

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: the lagged loads (selection biases are buffers of the model)."""
        return {"lagged": {name: load.cpu() for name, load in self._lagged.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`."""
        self._lagged = dict(state["lagged"])

    @contextmanager
    def _to_model(self, model: nn.Module, *, into_loss: bool = True) -> Iterator[None]:
        self._layers = moe_layers(model)
        self._blocks = len({layer.block for layer in self._layers})
        if self.bias_rate and not any(layer.selection_bias is not None for layer in self._layers):
            raise Misuse("bias_rate needs routers with a selection bias, and this model has none: set bias_rate to 0")

        def begin(inputs: dict[str, Any]) -> None:
            self._terms = []
            active = model.training and torch.is_grad_enabled()
            items = inputs.get("num_items_in_batch") if self._items is None else self._items
            self._share = share_of_sequences(inputs, items) if active else None

        def end(output: Any) -> Any:
            if self._share is None or not into_loss or (total := self.total()) is None:
                return None
            if not hasattr(output, "loss") or output.loss is None:
                raise Misuse("AuxLosses need a loss to add to: pass labels, and do not pass return_dict=False")
            output.loss = output.loss + total
            return output

        with observe(model, self._consume, on_begin=begin, on_end=end):
            yield

    @contextmanager
    def _to_trainer(self, trainer: Trainer) -> Iterator[None]:
        assert trainer.model is not None
        original = trainer.compute_loss

        def compute_loss(
            model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            self._items = num_items_in_batch  # TRL does not hand it on to the model
            result = original(model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)
            if (total := self.total()) is None:
                return result
            if num_items_in_batch is not None and trainer.args.average_tokens_across_devices:
                # The Trainer multiplies its loss by the number of ranks, because gradients are averaged over them.
                total = total * (trainer.accelerator.num_processes // trainer.get_tp_size())
            if isinstance(result, tuple):
                return result[0] + total, result[1]
            return result + total

        step = StepCallback(self)
        with self._to_model(trainer.accelerator.unwrap_model(trainer.model), into_loss=False):
            trainer.compute_loss = compute_loss  # type: ignore[method-assign]
            trainer.add_callback(step)
            try:
                yield
            finally:
                del trainer.compute_loss
                trainer.remove_callback(step)

    def _consume(self, record: LayerRecord) -> None:
        if self._share is None:
            return
        if not record.recomputed:
            load = choices(record.routing, record.batch, record.layer.num_experts).detach()
            name = record.layer.name
            self._load[name] = self._load[name] + load if name in self._load else load
        terms: dict[str, Tensor] = {}
        if self.balance:
            terms["balance"] = self._weigh(self._balance(record))
        if self.router_z:
            terms["router_z"] = self._weigh(router_z(record))
        if terms and not record.recomputed:
            self._terms.append(terms)

    def _balance(self, record: LayerRecord) -> PerSequence:
        if self.balance_over == "sequence":
            return balance_per_sequence(record)
        if self.balance_over == "lagged":
            uniform = torch.full((record.layer.num_experts,), 1 / record.layer.num_experts)
            load = self._lagged.get(record.layer.name, uniform)
            return balance_against(record, load.to(record.hidden.device))
        load = load_share(record).detach()
        if dist.is_initialized():
            dist.all_reduce(load)
        return balance_against(record, load / load.sum())

    def _weigh(self, loss: PerSequence) -> Tensor:
        assert self._share is not None
        return (loss.sum / loss.count.clamp_min(1) * self._share.to(loss.sum)).sum()


def share_of_sequences(inputs: dict[str, Any], items: Tensor | int | None) -> Tensor:
    """Each sequence's share of the whole batch: its label tokens / `items`, the whole batch's (None: this one's).

    Without labels every sequence counts the same.
    """
    labels = inputs.get("labels")
    if labels is None:
        tokens = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
        return torch.full((len(tokens),), 1 / len(tokens), device=tokens.device)
    own = (labels[:, 1:] != -100).sum(-1)
    everything = own.sum() if items is None else torch.as_tensor(items, device=own.device)
    return own / everything.clamp_min(1)


class StepCallback(TrainerCallback):
    """Calls `AuxLosses.step` after each optimiser step."""

    def __init__(self, aux: AuxLosses) -> None:
        self.aux = aux

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """An event of the Trainer."""
        self.aux.step()
