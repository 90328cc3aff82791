"""Watching a model's MoE layers: every forward pass becomes a `Batch`, and every MoE layer in it a `LayerRecord`.

One seam serves all models. A router's forward hook keeps what the router returned; the experts module's `forward` is
replaced by `tapped`, which runs the original and reports. Where a listener wants each expert's own output, the
original is called with every token repeated k times, one expert per row and weight 1: from the same matrix products,
hence equal, for every experts backend, under LoRA, and under expert parallelism, where the original is the sender's
side of the exchange. No configuration and none of transformers' registries is written to.
"""

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.modeling_layers import GradientCheckpointingLayer

from moestro.adapters.batch import describe
from moestro.adapters.layers import inner_model, moe_layers, routing_of
from moestro.errors import Misuse
from moestro.models.grouped_padded import PADDED_MM, unmixed
from moestro.routing import Batch, LayerRecord, MoELayer

TAP, WATCH = "_moestro_tap", "_moestro_watch"

REENTRANT = (
    "reentrant checkpointing drops the gradient of auxiliary losses without a word: write "
    'gradient_checkpointing_kwargs={"use_reentrant": False}'
)


class Pass:
    """One forward pass of the model. It outlives the forward, for the recomputation of checkpointed layers."""

    def __init__(self, batch: Batch, *, training: bool) -> None:
        self.batch = batch
        self.training = training
        """In training mode and with gradients."""
        self.open = True
        """False from the end of the forward on: a layer that runs then is run again, in the backward pass."""
        self.wants_outputs = False
        self.share: Tensor | None = None
        """Set by `AuxLosses`: each sequence's share of the whole batch."""


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


class Tap:
    """What stands beside one experts module while it is watched."""

    def __init__(self, layer: MoELayer, watch: "Watch | None", *, of_inputs: bool = True) -> None:
        self.layer, self.of_inputs = layer, of_inputs
        self.watch = watch
        self.original: Callable[..., Tensor] | None = None
        """The `forward` of the instance, where it had its own (expert parallelism); None means its class's."""
        self.routed: Any = None
        """What the router returned, until the experts have run."""
        self.firings = 0
        """How often the layer ran in this pass."""
        self.consumers: list[Callable[[LayerRecord], None]] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> "Tap":
        # A copy of a watched model is not watched, but runs its own experts.
        experts = copy.deepcopy(self.layer.experts, memo)
        other = Tap(replace(self.layer, experts=experts), None)
        other.original = self.original
        return other

    def install(self) -> Any:
        """Stand in for the experts' forward. Returns the handle of the router's hook."""
        experts = self.layer.experts
        self.original = experts.__dict__.get("forward")
        setattr(experts, TAP, self)
        experts.forward = MethodType(tapped, experts)
        return self.layer.router.register_forward_hook(self.keep)

    def remove(self) -> None:
        """Leave the experts as they were."""
        experts = self.layer.experts
        if self.original is None:
            del experts.forward
        else:
            experts.forward = self.original
        delattr(experts, TAP)

    def run(self, *args: Any) -> Tensor:
        """What the experts would do unwatched."""
        return (self.original or type(self.layer.experts).forward.__get__(self.layer.experts))(*args)

    def outputs(
        self,
        hidden: Float[Tensor, "tokens dim"],
        index: Int[Tensor, "tokens k"],
        weight: Float[Tensor, "tokens k"],
        *args: Any,
    ) -> Float[Tensor, "tokens k out"]:
        """Each chosen expert's own output, by the backend in use."""
        experts = self.layer.experts
        backend = getattr(getattr(experts, "config", None), "_experts_implementation", None)
        if self.original is None and hasattr(experts, "is_transposed") and backend in (PADDED_MM, "grouped_mm"):
            return unmixed(experts, hidden, index, backend)
        rows, one_each = hidden.repeat_interleave(index.shape[1], dim=0), torch.ones_like(weight).view(-1, 1)
        return self.run(rows, index.reshape(-1, 1), one_each, *args).view(*index.shape, -1)

    def keep(self, router: nn.Module, args: Any, output: Any) -> None:
        """A forward hook on the router."""
        self.routed = output

    def report(
        self,
        hidden: Float[Tensor, "tokens dim"],
        expert: Int[Tensor, "tokens k"],
        weight: Float[Tensor, "tokens k"],
        outputs: Float[Tensor, "tokens k dim"] | None,
    ) -> None:
        """Hand this layer's record to whoever listens."""
        if self.watch is None:
            return
        current = self.watch.current
        routed, self.routed = self.routed, None
        if current is None:
            return  # the layer was called by itself, before any pass of the model
        if current.open:
            self.firings += 1
            if current.training and not torch.is_grad_enabled() and self.watch.adds_losses:
                raise Misuse(REENTRANT)
        routing = routing_of(self.layer, routed, expert, weight)
        record = LayerRecord(
            layer=self.layer,
            batch=fitting(current.batch, hidden, of_inputs=self.of_inputs),
            hidden=hidden,
            proposed=routing,
            routing=routing,
            outputs=outputs,
            recomputed=not current.open,
        )
        for consume in self.consumers:
            consume(record)


def tapped(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, *args: Any) -> Tensor:
    """The `forward` of a watched experts module."""
    tap: Tap = getattr(self, TAP)
    current = tap.watch.current if tap.watch else None
    hidden = hidden_states.reshape(-1, hidden_states.shape[-1])
    if current is None or not current.wants_outputs:
        mixed, outputs = tap.run(hidden_states, top_k_index, top_k_weights, *args), None
    else:
        outputs = tap.outputs(hidden, top_k_index, top_k_weights, *args)
        mixed = (outputs * top_k_weights.unsqueeze(-1)).sum(dim=1).to(hidden_states.dtype).view_as(hidden_states)
    tap.report(hidden, top_k_index, top_k_weights, outputs)
    return mixed


def fitting(batch: Batch, hidden: Float[Tensor, "tokens dim"], *, of_inputs: bool) -> Batch:
    """The batch, where the layer was given the tokens that it describes; else as many rows of tokens unknown."""
    tokens, rows = hidden.shape[0], batch.num_sequences
    if of_inputs and batch.sequence.shape[0] == tokens:
        return batch
    rows = rows if tokens % rows == 0 else 1
    row = torch.arange(rows, device=hidden.device)
    return Batch(sequence=row.repeat_interleave(tokens // rows), num_sequences=rows)


def reads_inputs(layer: MoELayer, layers: Sequence[MoELayer]) -> bool:
    """Whether the model's input_ids are the layer's tokens; a decoder beside an encoder has tokens of its own."""
    return ".decoder." not in layer.name or not any(".encoder." in other.name for other in layers)


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
