"""Watching a model's MoE layers: every forward pass becomes a `Batch`, and every MoE layer in it a `LayerRecord`.

One seam serves all models: a router's forward hook keeps what the router returned, and a tap (moestro.adapters.tap)
stands in for the `forward` of the experts. No configuration and none of transformers' registries is written to.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.modeling_layers import GradientCheckpointingLayer

from moestro.adapters.batch import describe
from moestro.adapters.layers import inner_model, moe_layers
from moestro.adapters.tap import REENTRANT, Pass, Tap, reads_inputs
from moestro.errors import Misuse
from moestro.routing import LayerRecord, MoELayer

WATCH = "_moestro_watch"


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
        self.listeners: list[Listener] = []
        self.current: Pass | None = None
        """The pass that the layer now running belongs to."""
        self.domain: Tensor | None = None
        """Domain of each token of the coming pass, [batch, sequence]; set by whoever knows it."""
        self.withheld: dict[str, Any] = {}
        """Inputs that the model is not given but that describe its batch: labels, where a trainer keeps them back."""
        self._shifts_labels = LOSS_MAPPING.get(getattr(model, "loss_type", None) or "") in (ForCausalLMLoss, None)
        self._names = [name for name in inspect.signature(type(model).forward).parameters if name != "self"]
        self._blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        self._handles: list[Any] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> "Watch":
        return self  # a copy of a watched model is not watched: its hooks lead here, to another model's

    @property
    def adds_losses(self) -> bool:
        """Whether a listener adds losses to the gradient, and does not only count."""
        return any(listener.adds_losses for listener in self.listeners)

    def install(self) -> None:
        """Hook the model."""
        self._handles = [tap.install() for tap in self.taps]
        self._handles.append(self.model.register_forward_pre_hook(self._begin, with_kwargs=True))
        self._handles.append(self.model.register_forward_hook(self._end))
        setattr(self.model, WATCH, self)

    def remove(self) -> None:
        """Leave the model as it was."""
        for handle in self._handles:
            handle.remove()
        for tap in self.taps:
            tap.remove()
        for block in self._blocks:
            if isinstance(run := block.__dict__.get("_gradient_checkpointing_func"), Checkpointing):
                block.__dict__["_gradient_checkpointing_func"] = run.original
        delattr(self.model, WATCH)

    def _begin(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if model is not self.model:
            return  # a copy of the model, made while it was watched
        inputs = dict(zip(self._names, args, strict=False)) | kwargs | self.withheld
        training = model.training and torch.is_grad_enabled()
        self.current = current = Pass(
            describe(inputs, self.domain, shifts_labels=self._shifts_labels), training=training
        )
        self._follow_checkpointing()
        for tap in self.taps:
            tap.firings = 0
        for listener in self.listeners:
            listener.on_begin(current, inputs)
            current.wants_outputs = current.wants_outputs or listener.wants_outputs(current)

    def _end(self, model: nn.Module, args: tuple, output: Any) -> Any:
        if model is not self.model or self.current is None:
            return None
        self.current.open = False
        for tap in self.taps:
            if tap.firings == 0:
                raise Misuse(
                    f"{tap.layer.name} did not run its experts in this pass, so nothing can be known or said of it: "
                    "is the model compiled, or are its kernels replaced? Attach first, then compile"
                )
        replaced = None
        for listener in self.listeners:
            changed = listener.on_end(self.current, output)
            if changed is not None:
                output = replaced = changed
        return replaced

    def _follow_checkpointing(self) -> None:
        """At every pass, because a Trainer switches checkpointing on when it begins to train."""
        for block in self._blocks:
            run = block.__dict__.get("_gradient_checkpointing_func")
            if not block.gradient_checkpointing or run is None or isinstance(run, Checkpointing):
                continue
            if getattr(run, "keywords", {}).get("use_reentrant") and self.adds_losses:
                raise Misuse(REENTRANT)
            block.__dict__["_gradient_checkpointing_func"] = Checkpointing(self, run)


class Checkpointing:
    """A block's checkpointing function that knows, when the block is run again, which pass it belongs to."""

    def __init__(self, watch: Watch, original: Callable[..., Any]) -> None:
        self.watch, self.original = watch, original

    def __call__(self, run: Callable[..., Any], *args: Any) -> Any:
        """What the block calls in its forward."""
        current = self.watch.current

        def run_in_its_pass(*args: Any) -> Any:
            self.watch.current = current
            return run(*args)

        return self.original(run_in_its_pass, *args)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., Any]:
        return self.original  # a copy of a watched model is not watched


@contextmanager
def watch(model: nn.Module, listener: Listener, layers: Sequence[MoELayer] | None = None) -> Iterator[Watch]:
    """Let `listener` hear of every pass of `model` until the context ends. `layers`: handles of your own making."""
    model = inner_model(model)
    found: Watch | None = getattr(model, WATCH, None)
    watching = found or Watch(model, layers or moe_layers(model))
    if listener.adds_losses and watching.adds_losses:
        raise Misuse("AuxLosses are attached already to this model: detach them first")
    if found is None:
        watching.install()
    watching.listeners.append(listener)
    consumers = [(tap, listener.on_layer(tap.layer)) for tap in watching.taps]
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


@contextmanager
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
