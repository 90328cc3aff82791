"""Watching a model's MoE layers: every forward pass becomes a `Batch`, and every MoE layer in it a `LayerRecord`.

One seam serves all models: a router's forward hook keeps what the router returned, and a tap (moestro.adapters.tap)
stands in for the `forward` of the experts. No configuration and none of transformers' registries is written to.
"""

import inspect
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss, ForQuestionAnsweringLoss
from transformers.loss.loss_utils import ForSequenceClassificationLoss as OfRowsLoss

from moestro.adapters.attachment import attachment
from moestro.adapters.batch import describe
from moestro.adapters.layers import moe_layers, moved
from moestro.adapters.tap import Pass, Tap, beside_checkpoints, reads_inputs
from moestro.adapters.wrappers import inner_model, outer_module_at, plain_name
from moestro.errors import Misuse
from moestro.routing import LayerRecord, MoELayer

WATCH = "_moestro_watch"

DATA_PARALLEL = (
    "nn.DataParallel (used by the Trainer with several GPUs in one process) copies the model for every pass, and "
    "copies are not watched: start one process per GPU (torchrun --nproc_per_node=N), or set CUDA_VISIBLE_DEVICES=0"
)


@dataclass(eq=False, kw_only=True)
class Listener:
    """Who listens to a model's passes."""

    on_layer: Callable[[MoELayer], Callable[[LayerRecord], None]]
    """Given a layer, what takes that layer's records; it is called inside the layer's forward."""
    on_begin: Callable[[Pass, dict[str, Any]], None] = lambda current, inputs: None
    """Gets the model's inputs by name before a pass."""
    on_end: Callable[[Pass, Any], Any] = lambda current, output: None
    """Gets the model's output after a pass; what it returns, unless None, replaces the output."""
    wants_outputs: Callable[[Pass], bool] = lambda current: False
    """Whether this pass's records must hold the experts' outputs."""
    adds_losses: bool = False
    """At most one listener of a model may: losses would be counted twice."""


class Watch:
    """The hooks on one model, shared by everybody who listens to it."""

    def __init__(self, model: nn.Module, layers: Sequence[MoELayer]) -> None:
        self.model = model
        self.taps = [Tap(layer, self, of_inputs=reads_inputs(layer, layers)) for layer in layers]
        self._layers = list(layers)
        self._plain_names = {module: plain_name(name) for name, module in model.named_modules()}
        self.listeners: list[Listener] = []
        self.current: Pass | None = None
        """The pass that the layer now running belongs to."""
        self._latest: Pass | None = None
        """The most recent pass."""
        self._passes: weakref.WeakSet[Pass] = weakref.WeakSet()
        """Passes whose graphs are still alive."""
        self.domain: Tensor | None = None
        """Domain of each token of the coming pass, [batch, sequence]; set by the caller that knows it."""
        self.withheld: dict[str, Any] = {}
        """Inputs that the model is not given but that describe its batch: labels, where a trainer keeps them back."""
        loss = LOSS_MAPPING.get(getattr(model, "loss_type", None) or "")
        self.shifts_labels = loss in (ForCausalLMLoss, None)
        self.labels_tokens = loss not in (OfRowsLoss, ForQuestionAnsweringLoss)
        self._names = [name for name in inspect.signature(type(model).forward).parameters if name != "self"]
        self._handles: list[Any] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> "Watch":
        return self  # a copy of a watched model is not watched: its hooks lead here, to another model's

    @property
    def adds_losses(self) -> bool:
        """Whether a listener adds losses to the gradient, and does not only count."""
        return any(listener.adds_losses for listener in self.listeners)

    def install(self) -> None:
        """Hook the model."""
        for tap in self.taps:
            tap.install(self._outer_router(tap.layer))
        self._handles.append(self.model.register_forward_pre_hook(self._begin, with_kwargs=True))
        self._handles.append(self.model.register_forward_hook(self._end))
        setattr(self.model, WATCH, self)

    def remove(self) -> None:
        """Leave the model as it was."""
        for handle in self._handles:
            handle.remove()
        for tap in self.taps:
            tap.remove()
        delattr(self.model, WATCH)

    def _follow(self) -> None:
        """Move the taps to the modules that run now: PEFT may have wrapped the model or switched adapters."""
        for tap, layer in zip(self.taps, self._layers, strict=True):
            now = moved(layer, self._plain_names, self.model)
            tap.move(now, self._outer_router(layer))

    def _outer_router(self, layer: MoELayer) -> nn.Module:
        """Return the router, or the outermost wrapper around it."""
        name = self._plain_names.get(layer.router)
        return layer.router if name is None else outer_module_at(self.model, name)

    def running(self) -> Pass | None:
        """Set `current` to the pass that the running layer belongs to, and return it; None outside of all passes.

        Every kind of checkpointing recomputes a layer while autograd executes a node of that layer's pass.
        """
        if not torch.compiler.is_compiling():
            latest = self._latest if self._latest is not None and self._latest.open else None
            self.current = self._recomputed() or latest
        return self.current

    def _recomputed(self) -> Pass | None:
        """Return the pass that autograd is recomputing; None outside of a recomputation."""
        node = torch._C._current_autograd_node()
        if node is None or not torch.is_grad_enabled():  # hooks of a backward pass may run a model without gradients
            return None
        number = node._sequence_nr()
        found = [past for past in self._passes if past.has_node(number)]
        if len(found) > 1:
            raise Misuse(
                "all passes that await their backward pass must run in one thread: a recomputed layer could belong "
                f"to {len(found)} of them"
            )
        return found[0] if found else None

    def _begin(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if getattr(model, "_is_replica", False):
            raise Misuse(DATA_PARALLEL)
        if model is not self.model or self._is_run_again():
            return
        inputs = dict(zip(self._names, args, strict=False)) | kwargs | self.withheld
        training = model.training and torch.is_grad_enabled()
        if self._latest is not None:
            self._latest.close()  # it may have broken off
        batch = describe(inputs, self.domain, shifts_labels=self.shifts_labels, labels_tokens=self.labels_tokens)
        current = Pass(batch, training=training)
        self.current = self._latest = current
        if not torch.compiler.is_compiling():
            self._passes.add(current)
            self._follow()
        for tap in self.taps:
            tap.firings = 0
        for listener in self.listeners:
            listener.on_begin(current, inputs)
            current.wants_outputs = current.wants_outputs or listener.wants_outputs(current)

    def _is_run_again(self) -> bool:
        """Return whether a checkpoint is recomputing the whole model. Raise Misuse if losses would be added to that."""
        if torch.compiler.is_compiling() or self._recomputed() is None:
            return False
        if self.adds_losses:
            raise Misuse("AuxLosses cannot be added in a checkpoint around the whole model: checkpoint its blocks")
        return True

    def _end(self, model: nn.Module, args: tuple, output: Any) -> Any:
        current = self._latest
        if model is not self.model or current is None or not current.open:
            return None
        current.open = False
        for tap in self.taps:
            if tap.firings == 0:
                raise Misuse(
                    f"{tap.layer.name} did not run its experts in this pass, so nothing can be known or said of it: "
                    "is the model compiled, or are its kernels replaced? Attach first, then compile"
                )
        replaced = None
        for listener in self.listeners:
            changed = listener.on_end(current, output)
            if changed is not None:
                output = replaced = changed
        current.close()
        return replaced


def consumer(listener: Listener, layer: MoELayer) -> Callable[[LayerRecord], None]:
    """Return the listener's consumer of the layer's records, hidden from checkpointing unless it adds losses."""
    consume = listener.on_layer(layer)
    if listener.adds_losses:
        return consume

    def consume_beside(record: LayerRecord) -> None:
        with beside_checkpoints():
            consume(record)

    return consume_beside


@contextmanager
def watch(model: nn.Module, listener: Listener, layers: Sequence[MoELayer] | None = None) -> Iterator[Watch]:
    """Call `listener` for every pass of `model` until the context ends. `layers` replaces `moe_layers(model)`."""
    outer, model = model, inner_model(model)
    if any(isinstance(module, nn.DataParallel) for module in outer.modules()):
        raise Misuse(DATA_PARALLEL)
    found: Watch | None = getattr(model, WATCH, None)
    watching = found or Watch(model, layers or moe_layers(model))
    if listener.adds_losses and watching.adds_losses:
        raise Misuse("AuxLosses are attached already to this model: detach them first")
    if found is None:
        watching.install()
    watching.listeners.append(listener)
    consumers = [(tap, consumer(listener, tap.layer)) for tap in watching.taps]
    for tap, consume in consumers:
        tap.consumers.append(consume)
    try:
        yield watching
    finally:
        watching.listeners.remove(listener)
        for tap, consume in consumers:
            tap.consumers.remove(consume)
        if not watching.listeners:
            watching.remove()


@attachment
def observe(
    model: nn.Module,
    on_layer: Callable[[LayerRecord], None],
    *,
    outputs: bool = False,
    layers: Sequence[MoELayer] | None = None,
) -> Iterator[Watch]:
    """Call `on_layer` with every MoE layer's record, inside that layer's forward, until the context ends.

    `model` is any MoE model of transformers, wrapped by PEFT or not. `outputs`: records hold each chosen expert's own
    output too. In the recomputation of a checkpointed layer records come again, marked `recomputed`.
    """
    listener = Listener(on_layer=lambda layer: on_layer, wants_outputs=lambda current: outputs)
    with watch(model, listener, layers) as watching:
        yield watching
