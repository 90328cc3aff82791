"""A tap replaces the forward of one experts module: it runs the original and reports a LayerRecord.

Where a listener wants each expert's own output, the original is called with every token repeated k times, one expert
per row and weight 1: from the same matrix products, hence equal, for every experts backend, under LoRA, and under
expert parallelism, where the original is the sender's side of the exchange.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from moestro.adapters.layers import routing_of
from moestro.errors import Misuse
from moestro.models.autocast_mm import AUTOCAST_MM
from moestro.models.every_expert import every_expert
from moestro.models.grouped_padded import PADDED_MM, compute_dtype, unmixed
from moestro.routing import Batch, Competition, LayerRecord, MoELayer, Routing

if TYPE_CHECKING:
    from moestro.adapters.compete import Competitor
    from moestro.adapters.watch import Watch

TAP = "_moestro_tap"

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
        """False after the forward pass: a layer that runs then is being recomputed in the backward pass."""
        self.wants_outputs = False
        self.selective = False
        """True if a layer ran in selective checkpointing, whose graph allows one backward pass only."""
        self.share: Tensor | None = None
        """Set by `AuxLosses`: each sequence's share of the whole batch."""
        self.routed: dict[Tap, list[Any]] = {}
        """Detached router outputs for experts that are checkpointed without their router."""
        self._first_node: int = sequence_number()
        self._end_of_nodes: int | None = None

    def close(self) -> None:
        """End the pass: autograd nodes recorded from now on do not belong to it."""
        self.open = False
        if self._end_of_nodes is None:
            self._end_of_nodes = sequence_number()

    def has_node(self, number: int) -> bool:
        """Return whether the autograd node with this sequence number was recorded in this pass."""
        return self._first_node <= number and (self._end_of_nodes is None or number < self._end_of_nodes)

    def live_with(self, *results: Tensor | None) -> None:
        """Tie the lifetime of the pass to the graph of these results: their backward pass needs it."""
        for result in results:
            if result is not None and result.grad_fn is not None:
                result.grad_fn.metadata["moestro"] = self


def sequence_number() -> int:
    """Return the sequence number of autograd's next node in this thread.

    Return 0 while compiling: a compiled model does not run checkpointed layers again, it compiles them twice.
    """
    return 0 if torch.compiler.is_compiling() else torch._C._autograd._get_sequence_nr()


@dataclass(frozen=True, slots=True)
class Rerouted:
    """What competition makes of a layer's routing while it trains."""

    routing: Routing
    competition: Competition
    wants_outputs: bool = False
    """Whether the record must hold the experts' outputs."""
    weigh: Callable[[Float[Tensor, "tokens k dim"]], Float[Tensor, "tokens k"]] | None = None
    """The weights, of those outputs, where gradient shall go through them."""


class Tap:
    """The hooks on one experts module and its router while they are watched."""

    def __init__(self, layer: MoELayer, watch: "Watch | None", *, of_inputs: bool = True) -> None:
        self.layer, self.of_inputs = layer, of_inputs
        self.hears = layer.router
        self._handle: Any = None
        self.watch = watch
        self.original: Callable[..., Tensor] | None = None
        """The `forward` of the instance, where it had its own (expert parallelism); None means its class's."""
        self.routed: Any = None
        """What the router returned, until the experts have run."""
        self._hooks: Any = None
        """Autograd's saved-tensor hooks while the router ran; they identify the checkpoint that it ran in."""
        self.firings = 0
        """How often the layer ran in this pass."""
        self.consumers: list[Callable[[LayerRecord], None]] = []
        self.reroute: Callable[[Batch, Tensor, Any, Routing], Routing] | None = None
        """Gets batch, input of the experts, what the router returned and the routing in it; returns what is to run."""
        self.competitor: "Competitor | None" = None
        """What lets experts compete in training."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "Tap":
        # A copy of a watched model is not watched, but runs its own experts.
        experts = copy.deepcopy(self.layer.experts, memo)
        other = Tap(replace(self.layer, experts=experts), None)
        other.original = self.original
        return other

    def install(self, router: nn.Module | None = None) -> None:
        """Replace the experts' forward and hook the router; `router` is the outermost wrapper around it."""
        experts = self.layer.experts
        if isinstance(copied := experts.__dict__.get(TAP), Tap):
            copied.remove()  # PEFT copied a watched module together with its tap
        self.original = experts.__dict__.get("forward")
        setattr(experts, TAP, self)
        experts.forward = MethodType(tapped, experts)
        self.hears = router or self.layer.router
        self._handle = self.hears.register_forward_hook(RouterHook(self))

    def remove(self) -> None:
        """Restore the experts' forward and remove the router's hook."""
        experts = self.layer.experts
        if self.original is None:
            del experts.forward
        else:
            experts.forward = self.original
        delattr(experts, TAP)
        if self._handle is not None:
            self._handle.remove()

    def move(self, layer: MoELayer, router: nn.Module) -> None:
        """Move the tap to the modules of `layer` and `router` if they differ from the current ones."""
        if layer.experts is self.layer.experts and layer.router is self.layer.router and router is self.hears:
            return
        self.remove()
        self.layer = layer
        self.install(router)

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
        experts, backend = self.layer.experts, self.backend
        if backend is not None:
            return unmixed(experts, hidden, index, backend)
        rows, one_each = hidden.repeat_interleave(index.shape[1], dim=0), torch.ones_like(weight).view(-1, 1)
        return self.run(rows, index.reshape(-1, 1), one_each, *args).view(*index.shape, -1)

    @property
    def backend(self) -> str | None:
        """The experts backend in use, where it is one whose products can be had without its sum."""
        experts = self.layer.experts
        name = getattr(getattr(experts, "config", None), "_experts_implementation", None)
        known = (
            self.original is None
            and hasattr(experts, "is_transposed")
            and name in (PADDED_MM, AUTOCAST_MM, "grouped_mm")
        )
        return name if known else None

    def answers(
        self, hidden: Float[Tensor, "some dim"], expert: Int[Tensor, "some k"] | None = None, *args: Any
    ) -> Float[Tensor, "some k out"]:
        """The outputs of any experts, by default of all, on any tokens."""
        if expert is None and self.backend is not None:
            return every_expert(self.layer.experts, hidden, compute_dtype(self.layer.experts, self.backend))
        if expert is None:
            expert = torch.arange(self.layer.num_experts, device=hidden.device).expand(len(hidden), -1)
        return self.outputs(hidden, expert, torch.ones_like(expert, dtype=hidden.dtype), *args)

    def keep(self, routed: Any) -> None:
        """Keep what the router returned for the experts."""
        self.routed, self._hooks = routed, saved_tensor_hooks()

    def take(self, current: Pass) -> Any:
        """Return and clear the router's output; if only experts are recomputed, return the one kept in `current`."""
        routed, self.routed = self.routed, None
        if routed is None:  # the checkpoint recomputes the experts without their router
            kept = current.routed.get(self, [])
            if len(kept) > 1:
                raise Misuse(
                    f"{self.layer.name} runs several times in a pass, each time in a checkpoint that leaves its router "
                    "out: put the router into the checkpoint"
                )
            return kept[0] if kept else None
        if current.open and saved_tensor_hooks() != self._hooks:
            current.routed.setdefault(self, []).append(without_graph(routed))
        return routed

    def decide(
        self, current: Pass, batch: Batch, hidden: Float[Tensor, "tokens dim"], expert: Tensor, weight: Tensor
    ) -> tuple[Routing, Routing]:
        """Return the routing that the router proposed and the routing to run."""
        routed = self.take(current)
        proposed = routing_of(self.layer, routed, expert, weight)
        if self.reroute is None:
            return proposed, proposed
        routing = self.reroute(batch, hidden, routed, proposed)
        return proposed, replace(
            routing, expert=routing.expert.to(expert.dtype), weight=routing.weight.to(weight.dtype)
        )

    def compete(
        self, current: Pass, batch: Batch, hidden: Float[Tensor, "tokens dim"], proposed: Routing, *args: Any
    ) -> Rerouted | None:
        """What competition makes of the routing in training; None where nobody competes."""
        if self.competitor is None or not current.training:
            return None
        return self.competitor.decide(self, batch, hidden, proposed, *args)

    def report(self, current: Pass, record: LayerRecord) -> None:
        """Hand this layer's record to whoever listens."""
        assert self.watch is not None
        if current.open:
            self.firings += 1
            if current.training and not torch.is_grad_enabled() and self.watch.adds_losses:
                raise Misuse(REENTRANT)
        for consume in self.consumers:
            consume(record)


class RouterHook:
    """The forward hook on a router. A copy of the hook does nothing: PEFT copies routers together with their hooks."""

    def __init__(self, tap: Tap | None) -> None:
        self.tap = tap

    def __call__(self, router: nn.Module, args: Any, output: Any) -> None:
        """Keep what the router returned."""
        if self.tap is not None:
            self.tap.keep(output)

    def __deepcopy__(self, memo: dict[int, Any]) -> "RouterHook":
        return RouterHook(None)


def saved_tensor_hooks() -> Any:
    """Return autograd's current saved-tensor hooks, which differ between checkpoints."""
    return None if torch.compiler.is_compiling() else torch._C._autograd._top_saved_tensors_default_hooks(True)


@contextmanager
def beside_checkpoints() -> Iterator[None]:
    """Hide operations from selective checkpointing, which counts them: the recomputation does not repeat these."""
    if torch.compiler.is_compiling() or not torch._C._len_torch_dispatch_stack():
        yield
    else:
        with _disable_current_modes():
            yield


def without_graph(routed: Any) -> Any:
    """Return a detached router output, so that keeping it does not keep the graph."""
    if isinstance(routed, Tensor):
        return routed.detach().requires_grad_(routed.requires_grad)
    return tuple(map(without_graph, routed)) if isinstance(routed, tuple) else routed


def tapped(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, *args: Any) -> Tensor:
    """The `forward` of a watched experts module."""
    tap: Tap = getattr(self, TAP)
    current = tap.watch.running() if tap.watch else None
    if current is None:  # a copy of a watched model, or a layer called by itself outside of any pass of the model
        tap.routed = None
        return tap.run(hidden_states, top_k_index, top_k_weights, *args)
    hidden = hidden_states.reshape(-1, hidden_states.shape[-1])
    batch = fitting(current.batch, hidden, of_inputs=tap.of_inputs)
    proposed, routing = tap.decide(current, batch, hidden, top_k_index, top_k_weights)
    competed = tap.compete(current, batch, hidden, proposed, *args)
    if competed is not None:
        routing = competed.routing
    if current.wants_outputs or (competed is not None and competed.wants_outputs):
        outputs = tap.outputs(hidden, routing.expert, routing.weight, *args)
        if competed is not None and competed.weigh is not None:
            routing = replace(routing, weight=competed.weigh(outputs))
        mixed = (outputs * routing.weight.unsqueeze(-1)).sum(dim=1).to(hidden_states.dtype).view_as(hidden_states)
    else:
        mixed, outputs = tap.run(hidden_states, routing.expert, routing.weight, *args), None
    record = LayerRecord(
        layer=tap.layer,
        batch=batch,
        hidden=hidden,
        proposed=proposed,
        routing=routing,
        outputs=outputs,
        competition=None if competed is None else competed.competition,
        recomputed=not current.open,
    )
    tap.report(current, record)
    if current.open and not torch.compiler.is_compiling():
        current.selective = current.selective or torch._C._len_torch_dispatch_stack() > 0
        current.live_with(mixed, proposed.weight, proposed.logits)
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
