"""Replacing what routers choose, before the experts run, in any model whose MoE layers can be watched.

A reroute gets a `Proposal` and returns the `Routing` that shall run. To select by the family's own rule, whatever made
the choice in this pass is run once more under a `Selection`: the router, or the block around it where the router only
scores (dbrx).
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from moestro.adapters.attachment import attachment
from moestro.adapters.layers import routing_of
from moestro.adapters.selection import Selection
from moestro.adapters.tap import Pass, Tap
from moestro.adapters.watch import Listener, Watch, watch
from moestro.adapters.wrappers import held_by, inner_model
from moestro.errors import Misuse
from moestro.routing import Batch, MoELayer, Proposal, Reroute, Routing


@attachment
def reroute(
    model: nn.Module, rule: Reroute | Mapping[str, Reroute], layers: list[MoELayer] | None = None
) -> Iterator[Watch]:
    """Let `rule` decide where tokens go in every MoE layer, or in those that a mapping of rules by layer name names.

    For evaluation: every pass within the context must be without gradients and the model in evaluation mode, else
    Misuse. Records of the pass hold the router's choice as `proposed` and what ran as `routing`. `layers`: handles of
    your own making.
    """
    listener = Listener(on_layer=lambda layer: lambda record: None, on_begin=refuse_training(model))
    with watch(model, listener, layers) as watching, ExitStack() as stack:
        for tap, own in rules_of(watching, rule):
            stack.enter_context(rerouted(inner_model(model), tap, own))
        yield watching


def refuse_training(model: nn.Module) -> Callable[[Pass, dict[str, Any]], None]:
    """What raises Misuse at the beginning of a pass in training: routers then draw at random, and differently again."""

    def refuse(current: Pass, inputs: dict[str, Any]) -> None:
        if torch.is_grad_enabled() or model.training:
            raise Misuse("a rerouted model must be evaluated: call model.eval(), and run it under torch.no_grad()")

    return refuse


def rules_of(watching: Watch, rule: Reroute | Mapping[str, Reroute]) -> list[tuple[Tap, Reroute]]:
    """The tap and the rule of each rerouted layer; Misuse for a layer that is not there, or is rerouted already."""
    taps = {tap.layer.name: tap for tap in watching.taps}
    rules = rule if isinstance(rule, Mapping) else dict.fromkeys(taps, rule)
    for name in rules:
        if name not in taps:
            raise Misuse(f"layers must be among {', '.join(taps)}, got {name}")
        if taps[name].reroute is not None:
            raise Misuse(f"{name} is rerouted already")
    return [(taps[name], own) for name, own in rules.items()]


@contextmanager
def rerouted(model: nn.Module, tap: Tap, rule: Reroute) -> Iterator[None]:
    """One layer, rerouted until the context ends."""
    chooser = Chooser(model, tap.layer)

    def decide(batch: Batch, hidden: Tensor, routed: Any, proposed: Routing) -> Routing:
        selected: list[tuple[Routing, Any]] = []

        def select(banned: Tensor | None = None, noise: Tensor | None = None) -> Routing:
            selected.append(chooser.select(batch, proposed, routed, banned, noise))
            return selected[-1][0]

        proposal = Proposal(
            layer=tap.layer, batch=batch, hidden=hidden, routing=proposed, select=select, run=tap.answers
        )
        routing = rule(proposal)
        check_routing(tap.layer, routing, proposed)
        for own, again in selected:
            if own is routing:
                hand_over(routed, again, proposed)
        chooser.inputs.clear()
        return routing

    handles = chooser.install()
    tap.reroute = decide
    try:
        yield
    finally:
        tap.reroute = None
        for handle in handles:
            handle.remove()


class Chooser:
    """What chooses the experts of one layer, to be run once more on what it was given in this pass."""

    def __init__(self, model: nn.Module, layer: MoELayer) -> None:
        self.layer = layer
        self.router = outermost(model, layer.router)
        self.block = parent_of(model, outermost(model, layer.experts))
        self.inputs: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def install(self) -> list[Any]:
        """Keep what router and block are given. Returns the handles of the hooks."""
        return [m.register_forward_pre_hook(self._keep, with_kwargs=True) for m in (self.router, self.block)]

    def _keep(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.inputs[module] = args, kwargs

    def select(
        self,
        batch: Batch,
        proposed: Routing,
        routed: Any,
        banned: Bool[Tensor, "tokens experts"] | None,
        noise: Float[Tensor, "tokens experts"] | None,
    ) -> tuple[Routing, Any]:
        """The rule's choice under the ban and the noise, and all that the router then returns."""
        if self.layer.scores is None:
            raise Misuse(f"{self.layer.name} looks experts up by token: none can be disabled, no logit disturbed")
        tokens, experts = len(proposed.expert), self.layer.num_experts
        product = None
        if noise is not None:  # the logits are the last product; LoRA's part of it, as wide, comes after the product
            self._run(listening := Selection(tokens, experts), proposed, routed)
            product = listening.widths.index(listening.widths[-1]) if listening.widths else None
        selection = Selection(tokens, experts, banned, noise, product)
        again, expert, weight = self._run(selection, proposed, routed)
        # Padding without experts has weights 0 / 0 = NaN, which attention would spread to other tokens.
        weight = weight.masked_fill(selection.lacking.to(weight.device)[:, None] & ~weight.isfinite(), 0.0)
        routing = routing_of(self.layer, again, expert, weight)
        self._check(selection, batch, routing)
        return routing, again

    def _run(self, selection: Selection, proposed: Routing, routed: Any) -> tuple[Any, Tensor, Tensor]:
        """What the router returns under `selection`, and the experts and weights that follow."""
        found: dict[str, Any] = {}

        def keep(router: nn.Module, args: Any, output: Any) -> None:
            found["routed"] = output

        def stand_in(hidden: Tensor, expert: Tensor, weight: Tensor, *args: Any) -> Tensor:
            found["expert"], found["weight"] = expert, weight
            return torch.zeros_like(hidden)

        places = [place(routed, proposed.expert), place(routed, proposed.weight)]
        chooser = self.block if None in places else self.router
        args, kwargs = self.inputs[chooser]
        with unheard(chooser), hearing(self.layer.router, keep), replaced(self.layer.experts, stand_in), selection:
            chooser(*args, **kwargs)
        if chooser is self.router:
            found["expert"], found["weight"] = (found["routed"][at] for at in places)
        return found["routed"], found["expert"], found["weight"]

    def _check(self, selection: Selection, batch: Batch, routing: Routing) -> None:
        """Raise Misuse where the rule ran out of experts, or did something that `Selection` does not know."""
        valid = torch.ones_like(batch.sequence, dtype=torch.bool) if batch.valid is None else batch.valid
        if lacking := int((selection.lacking.to(valid.device) & valid).sum()):
            raise Misuse(
                f"in {self.layer.name} the rule leaves {lacking} of {int(valid.sum())} tokens fewer than top_k "
                f"({self.layer.top_k}) experts in their best groups: disable fewer"
            )
        if selection.banned is not None:
            used = valid[:, None] if routing.edge is None else valid[:, None] & routing.edge
            if bool((selection.banned.gather(-1, routing.expert.long()) & used).any()):
                raise Misuse(f"{self.says()}: it chose an expert that was disabled")
        if selection.noise is not None and not selection.disturbed:
            raise Misuse(f"{self.says()}: no logits were found to disturb")

    def says(self) -> str:
        """Who chooses in a way that is not known here."""
        return f"{self.layer.name} cannot be rerouted, {type(self.layer.router).__name__} selects in a way of its own"


def check_routing(layer: MoELayer, routing: Any, proposed: Routing) -> None:
    """Raise Misuse unless a rule's routing has integer indices of existing experts, with a finite weight each."""
    if not isinstance(routing, Routing):
        raise Misuse(f"the rule of {layer.name} must return a Routing, got {type(routing).__name__}")
    expert, weight = routing.expert, routing.weight
    if expert.is_floating_point() or expert.is_complex() or expert.dtype == torch.bool:
        raise Misuse(f"experts chosen in {layer.name} must be whole numbers, got {expert.dtype}")
    if expert.shape != proposed.expert.shape or weight.shape != expert.shape:
        raise Misuse(
            f"experts and weights chosen in {layer.name} must be of shape {tuple(proposed.expert.shape)}, got "
            f"{tuple(expert.shape)} and {tuple(weight.shape)}"
        )
    used = torch.ones_like(expert, dtype=torch.bool) if routing.edge is None else routing.edge
    absent = used & ((expert < 0) | (expert >= layer.num_experts))
    if bool(absent.any()):
        got = int(expert[absent][0])
        raise Misuse(f"experts chosen in {layer.name} must lie between 0 and {layer.num_experts - 1}, got {got}")
    if not bool(weight[used].isfinite().all()):
        raise Misuse(f"weights of the experts chosen in {layer.name} must be finite")


def place(routed: Any, given: Tensor) -> int | None:
    """Where in what a router returned stands what the experts were given; None where the block made it."""
    items = routed if isinstance(routed, tuple) else ()
    return next((index for index, item in enumerate(items) if item is given), None)


def hand_over(routed: Any, again: Any, proposed: Routing) -> None:
    """Give the block what else follows from the choice: Inkling's routers weigh the shared experts too."""
    if not isinstance(routed, tuple):
        return
    for old, new in zip(routed[1:], again[1:], strict=True):
        if isinstance(old, Tensor) and old is not proposed.expert and old is not proposed.weight:
            old.copy_(new)


def outermost(model: nn.Module, module: nn.Module) -> nn.Module:
    """Return the module, or the outermost wrapper around it."""
    wrappers = {inner: outer for outer in model.modules() if (inner := held_by(outer)) is not None}
    while module in wrappers:
        module = wrappers[module]
    return module


def parent_of(model: nn.Module, module: nn.Module) -> nn.Module:
    """The module that holds another."""
    return next(parent for parent in model.modules() if any(child is module for child in parent.children()))


@contextmanager
def unheard(module: nn.Module) -> Iterator[None]:
    """Whoever hooked the module or what is in it hears nothing: the pass has run already, as far as they know."""
    kept = [(m, m._forward_pre_hooks, m._forward_hooks) for m in module.modules()]
    for inner, _, _ in kept:
        inner._forward_pre_hooks, inner._forward_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        for inner, before, after in kept:
            inner._forward_pre_hooks, inner._forward_hooks = before, after


@contextmanager
def hearing(module: nn.Module, hook: Callable[..., None]) -> Iterator[None]:
    """A forward hook until the context ends."""
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def replaced(module: nn.Module, forward: Callable[..., Tensor]) -> Iterator[None]:
    """Another `forward` of an instance that has one of its own, until the context ends."""
    own = module.__dict__["forward"]
    module.forward = forward
    try:
        yield
    finally:
        module.forward = own
