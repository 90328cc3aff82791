"""What attaching to a stock model must do, as checks on one tiny model of a package.

Each check takes a `Subject` and returns None where it holds, `Inapplicable` with the reason where there is nothing to
check, and otherwise what is wrong. `CHECKS` names them; `EXCEPTIONS` names the packages where one cannot hold, and why.
scripts/attach_every_family.py makes a table of all of them, tests/test_attach.py runs them one package at a time.
"""

import re
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import attach_reference as truth
import tiny_models
import torch
from safetensors import safe_open
from torch import Tensor

from moestro.adapters import AuxLosses, moe_layers, observe
from moestro.errors import Misuse
from moestro.routing import MoELayer

warnings.filterwarnings("ignore", module="torch")

ROUNDING = 1e-5
"""fp32, relative."""

Gradients = dict[str, Tensor]


class Inapplicable(str):
    """Why a check has nothing to look at."""


@dataclass
class Subject:
    """A tiny model in train mode, with a batch whose second row ends in padding, and what it does unwatched."""

    package: str
    model: Any
    inputs: dict[str, Tensor]
    layers: list[MoELayer]
    stock: list[truth.Seen]
    """What each layer is given."""
    right: dict[str, tuple[Tensor, Gradients]]
    """Each loss and its gradient, in loops; without those that do not apply."""
    plain: dict[str, tuple[Any, Gradients]]
    """One step with each implementation of the experts."""
    stock_keys: set[str]
    """Names of the weights in the checkpoint that the model made before anything was attached to it."""

    @property
    def interface(self) -> bool:
        """Whether the package is on the experts interface, whose implementations can be chosen."""
        return self.package not in tiny_models.OUTSIDE

    @property
    def several(self) -> bool:
        """Whether a token has several experts."""
        return self.stock[0].index.shape[1] > 1

    @property
    def learned(self) -> list[truth.Seen]:
        """The layers whose routers learn what they choose."""
        return [seen for seen in self.stock if "Hash" not in type(seen.layer.router).__name__]

    @property
    def unwatched(self) -> tuple[Any, Gradients]:
        """One step with the implementation that the model has by itself."""
        return self.plain[self.model.config._experts_implementation if self.interface else "eager"]


def build(package: str) -> Subject:
    """The subject of a package."""
    tiny = tiny_models.build(package, padded=True)
    with tempfile.TemporaryDirectory() as folder:
        tiny.model.save_pretrained(folder)
        keys = checkpoint_keys(folder)
    subject = Subject(package, tiny.model, tiny.inputs, moe_layers(tiny.model), [], {}, {}, keys)
    roughen(subject.layers)
    for name in ("grouped_mm", "eager"):
        with implementation(subject, name):
            subject.plain[name] = step(subject)
    stock = truth.run_stock(subject.model, subject.inputs, subject.layers)
    subject.stock = stock.layers
    for name, value in true_losses(subject, stock).items():
        subject.right[name] = value.detach(), backward(subject, value, retain_graph=True)
    return subject


def true_losses(subject: Subject, stock: truth.Stock) -> dict[str, Tensor]:
    """Each loss that applies, in loops."""
    losses = {"balance": truth.total(stock, truth.balance, subject.learned)}
    if any(seen.layer.scores != "probabilities" for seen in subject.stock):
        losses["router_z"] = truth.total(stock, truth.router_z, subject.learned)
    if subject.several:
        losses["orthogonality"] = truth.total(stock, truth.orthogonality, subject.stock)
        losses["variance"] = truth.total(stock, truth.variance, subject.learned)
    return losses


@torch.no_grad()
def roughen(layers: Sequence[MoELayer]) -> None:
    """Move what starts at 0 or 1 and would hide mistakes: scales, norms and biases; let some tokens skip experts."""
    generator = torch.Generator().manual_seed(2)
    for layer in layers:
        for parameter in [*layer.experts.parameters(), *layer.router.parameters()]:
            if parameter.ndim == 1 and parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
        if type(layer.router).__name__ == "ZayaRouter":
            # Not by its own bias, which transformers sets to -1 when it loads a checkpoint.
            layer.router.balancing_biases[-1] = -1.0
            layer.router.balancing_biases[:-1] -= 1.05


def forward(subject: Subject, **more: Any) -> Any:
    """One pass; the seed is for the families that draw experts at random."""
    torch.manual_seed(1)
    return subject.model(**subject.inputs, **more)


def objective(subject: Subject, output: Any) -> Tensor:
    """The model's loss, or the size of its logits where it has none."""
    return output.loss if "labels" in subject.inputs else output.logits.square().sum()


def backward(subject: Subject, loss: Tensor, retain_graph: bool = False) -> Gradients:
    """The gradient of every parameter that has one."""
    subject.model.zero_grad()
    loss.backward(retain_graph=retain_graph)
    return {name: p.grad.clone() for name, p in subject.model.named_parameters() if p.grad is not None}


def step(subject: Subject) -> tuple[Any, Gradients]:
    """Forward and backward."""
    output = forward(subject)
    return output, backward(subject, objective(subject, output))


def attached(subject: Subject, *losses: str) -> tuple[dict[str, Tensor], Gradients]:
    """Each loss, and the gradient of their sum alone, in the second of two optimiser steps that change nothing."""
    aux = AuxLosses(**dict.fromkeys(losses, 1.0))
    with aux.attach(subject.model, add_to_loss=False):
        for _ in range(2 if "variance" in losses else 1):  # its mean is that of the step before
            forward(subject)
            total = aux.total()
            aux.step()
    assert total is not None
    return aux.last, backward(subject, total)


def distance(ours: Gradients, right: Gradients) -> tuple[float, str]:
    """How far a gradient is off, and which: relative to its own norm, or to a hundredth of that of all parameters.

    Some gradients are what is left of sums of large numbers, and know no more digits than these have.
    """
    whole, zero = torch.stack([gradient.norm() for gradient in right.values()]).norm(), torch.zeros(())
    both = {name: (ours.get(name, zero), right.get(name, zero)) for name in ours.keys() | right.keys()}
    return max((float((a - b).norm() / torch.maximum(b.norm(), whole / 100)), name) for name, (a, b) in both.items())


def difference(ours: Gradients, right: Gradients, rounding: float = ROUNDING) -> str | None:
    """Where gradients differ by more than rounding."""
    error, name = distance(ours, right)
    return None if error <= rounding else f"the gradient of {name} is off by {error:.0e}"


def unequal(ours: Gradients, right: Gradients) -> str | None:
    """The first gradient that is not bit-identical."""
    if ours.keys() != right.keys():
        return f"gradients of {sorted(ours.keys() ^ right.keys())[0]}"
    return next((f"the gradient of {name}" for name in right if not torch.equal(ours[name], right[name])), None)


def far(ours: Tensor, right: Tensor, rounding: float = ROUNDING) -> bool:
    """Whether numbers differ by more than rounding, relative to the largest of them."""
    return float((ours - right).detach().abs().max()) > rounding * float(right.detach().abs().max())


@contextmanager
def implementation(subject: Subject, name: str) -> Iterator[None]:
    """The model with an implementation of its experts, where the package lets one choose."""
    if not subject.interface:
        yield
        return
    before = subject.model.config._experts_implementation
    subject.model.set_experts_implementation(name)
    try:
        yield
    finally:
        subject.model.set_experts_implementation(before)


# --- finding layers


def finds_the_layers(subject: Subject) -> str | None:
    """Every experts module that runs, and no other; its router; k and E; its block."""
    ran = Counter[str]()
    handles = [
        module.register_forward_hook(lambda _, args, out, name=name: ran.update([name]))
        for name, module in subject.model.named_modules()
        if type(module).__name__.endswith("Experts") and "shared" not in name
    ]
    with torch.no_grad():
        forward(subject)
    for handle in handles:
        handle.remove()
    names = {module: name for name, module in subject.model.named_modules()}
    if (found := Counter(names[layer.experts] for layer in subject.layers)) != ran:
        return f"found {dict(found)}, but what runs is {dict(ran)}"
    return next((wrong for seen in subject.stock if (wrong := wrong_handle(subject, seen))), None)


def wrong_handle(subject: Subject, seen: truth.Seen) -> str | None:
    """What a handle says wrongly."""
    layer = seen.layer
    returned = [item for item in seen.routed if item is seen.index] if isinstance(seen.routed, tuple) else []
    best = seen.logits.topk(layer.top_k).indices  # dbrx: the block chooses, from the logits that the router returns
    if not returned and not torch.equal(best, seen.index):
        return f"{layer.name}: the experts' indices do not come from {type(layer.router).__name__}"
    if seen.index.shape[1] != layer.top_k:
        return f"{layer.name}: top_k is {layer.top_k}, but tokens have {seen.index.shape[1]} experts"
    if layer.num_experts != tiny_models.GENERIC["num_experts"]:
        return f"{layer.name}: num_experts is {layer.num_experts}"
    block = subject.model.get_submodule(layer.block)
    beside = [other for other in subject.model.modules() if type(other) is type(block)]
    if not re.fullmatch(rf"{re.escape(layer.block)}(\..+)?", layer.name) or len(beside) < 2:
        return f"{layer.name}: block is {layer.block}"
    return None


def scores_are_the_routers(subject: Subject) -> str | None:
    """At the chosen experts the weights are the scores, up to one factor per token (where k is 1: for all tokens)."""
    scores: dict[str, Tensor | None] = {}
    keep = lambda record: scores.__setitem__(record.layer.name, record.routing.scores)
    with observe(subject.model, keep), torch.no_grad():
        forward(subject)
    for seen in subject.stock:
        ours = scores[seen.layer.name]
        if (ours is None) != (seen not in subject.learned):
            return f"{seen.layer.name}: only routers that look their choice up have no scores"
        if ours is not None and (wrong := not_proportional(seen, ours)):
            return f"{seen.layer.name}: {wrong}"
    return None


def not_proportional(seen: truth.Seen, scores: Tensor) -> str | None:
    """How the weights that a layer was given are not its scores."""
    weight, sent = seen.weight.detach().float(), [t for t in range(len(scores)) if truth.edges(seen, t)]
    if isinstance(scale := getattr(seen.layer.router, "per_expert_scale", None), Tensor):
        weight = weight / scale.detach()[seen.index]  # Gemma's is a factor on an expert's output, not a preference
    if seen.layer.top_k == 1:  # Zaya, whose ninth class has a share too
        weight = weight / seen.routed[0].detach().softmax(-1)[:, : seen.layer.num_experts].sum(-1, keepdim=True)
    ratio = (weight / scores.gather(-1, seen.index))[sent]
    ratio = ratio.T if seen.layer.top_k == 1 else ratio
    if far(scores.sum(-1), torch.ones(len(scores))):
        return "scores do not sum to 1"
    spread = float((ratio.amax(-1) / ratio.amin(-1)).max() - 1)
    return None if spread <= ROUNDING else f"weights are not {seen.layer.scores} scores, by {spread:.0e}"


# --- changing nothing


def watched_is_unchanged(subject: Subject) -> str | None:
    """With the experts' outputs asked for: bit-identical around grouped_mm, to rounding around eager.

    Rounding is 1e-5, or twice how far grouped_mm and eager are apart where a model makes more of small differences.
    """
    apart = distance(subject.plain["grouped_mm"][1], subject.plain["eager"][1])[0]
    for name, (plain, right) in subject.plain.items():
        with implementation(subject, name), observe(subject.model, lambda record: None, outputs=True):
            watched, ours = step(subject)
        exact = subject.interface and name == "grouped_mm"
        if not (torch.equal(watched.logits, plain.logits) if exact else not far(watched.logits, plain.logits)):
            return f"logits differ around {name}"
        loss, before = objective(subject, watched), objective(subject, plain)
        if not (torch.equal(loss, before) if exact else not far(loss, before, 1e-6)):
            return f"the loss differs around {name}"
        if wrong := difference(ours, right, max(ROUNDING, 2 * apart)):
            return f"around {name} {wrong}"
    return None


def weight_zero_is_unchanged(subject: Subject) -> str | None:
    """Losses of weight 0: loss, logits and every gradient are bit-identical, around grouped_mm and eager."""
    for name, (plain, right) in subject.plain.items():
        with implementation(subject, name), AuxLosses().attach(subject.model):
            attached, ours = step(subject)
        if not torch.equal(attached.logits, plain.logits):
            return f"logits differ around {name}"
        if not torch.equal(objective(subject, attached), objective(subject, plain)):
            return f"the loss differs around {name}"
        if wrong := unequal(ours, right):
            return f"around {name}, not bit-identical: {wrong}"
    return None


# --- counting


def firings_are_right(subject: Subject) -> str | None:
    """Each layer fires once per pass and its choices are counted once, with activation checkpointing too."""
    _, own = subject.unwatched
    wrong, right = fired(subject)
    if wrong:
        return wrong
    with checkpointing(subject):
        wrong, ours = fired(subject)
    return wrong or difference(ours, right) or (None if difference(right, own) else "the losses have no gradient")


@contextmanager
def checkpointing(subject: Subject) -> Iterator[None]:
    """The model with activation checkpointing."""
    subject.model.activation_checkpointing_enable()
    try:
        yield
    finally:
        subject.model.activation_checkpointing_disable()


def fired(subject: Subject) -> tuple[str | None, Gradients]:
    """One step of the model's loss and ours: what was counted wrongly, and the gradient."""
    runs = Counter[str]()
    handles = [
        layer.experts.register_forward_pre_hook(lambda _, args, name=layer.name: runs.update([name]))
        for layer in subject.layers
    ]
    aux = AuxLosses(balance=0.3, **between(subject))
    with aux.attach(subject.model, add_to_loss=False):
        loss = objective(subject, forward(subject)) + aux.total()
        firings = dict(aux.firings)
        gradients = backward(subject, loss)
        loads = {state.layer.name: state.load for state in aux._layers}
    for handle in handles:
        handle.remove()
    if max(runs.values()) != 1 + subject.model.is_activation_checkpointing:
        return f"layers ran {dict(runs)} times", gradients
    if firings != {layer.name: 1 for layer in subject.layers}:
        return f"firings are {firings}", gradients
    return next((wrong for seen in subject.stock if (wrong := miscounted(seen, loads))), None), gradients


def miscounted(seen: truth.Seen, loads: dict[str, Tensor | None]) -> str | None:
    """How a layer's choices were counted wrongly."""
    load, right = loads[seen.layer.name], count(seen)
    wrong = load is None or not torch.equal(load, right)
    return f"{seen.layer.name}: counted {load}, right is {right}" if wrong else None


def count(seen: truth.Seen) -> Tensor:
    """Choices per expert, one by one."""
    total = torch.zeros(seen.layer.num_experts)
    for row in seen.rows:
        for token in row:
            for expert in truth.edges(seen, token):
                total[expert] += 1
    return total


# --- the losses


def orthogonality_is_right(subject: Subject) -> str | None:
    """Value and gradient of every parameter equal a loop over the eager weights of single experts."""
    if not subject.several:
        return refused(subject, "orthogonality")
    return wrong_losses(subject, *attached(subject, "orthogonality"))


def wrong_losses(subject: Subject, values: dict[str, Tensor], gradients: Gradients) -> str | None:
    """Which value, or which gradient of their sum, is not that of the loops."""
    right: Gradients = {}
    for loss, value in values.items():
        true_value, true_gradients = subject.right[loss]
        if far(value, true_value):
            return f"{loss} is {float(value):.6g} and should be {float(true_value):.6g}"
        right |= {name: right.get(name, 0) + gradient for name, gradient in true_gradients.items()}
    return difference(gradients, right)


def refused(subject: Subject, loss: str) -> str:
    """A loss between experts of a token, where there is one: it must be refused with the reason."""
    try:
        attached(subject, loss)
    except Misuse as error:
        if f"{loss} needs two experts per token" in str(error):
            return Inapplicable("one expert per token: refused, and said so")
    return f"{loss} is not refused where tokens have one expert"


def order_does_not_matter(subject: Subject) -> str | None:
    """With rows, or experts, in another order the orthogonality and every expert's load are the same."""
    weights = {"balance": 0.3, **between(subject)}
    with one_outcome(subject):
        value, load = value_and_load(subject, weights)
        inputs = subject.inputs
        subject.inputs = {name: tensor.flip(0) for name, tensor in inputs.items()}
        rows = value_and_load(subject, weights)
        subject.inputs = inputs
        with experts_reversed(subject):
            experts = value_and_load(subject, weights)
    if far(rows[0], value) or any(not torch.equal(a, b) for a, b in zip(rows[1], load, strict=True)):
        return f"with rows in another order {value.tolist()} becomes {rows[0].tolist()}"
    if far(experts[0], value) or any(not torch.equal(a.flip(0), b) for a, b in zip(experts[1], load, strict=True)):
        return f"with experts in another order {value.tolist()} becomes {experts[0].tolist()}"
    return None


def value_and_load(subject: Subject, weights: dict[str, float]) -> tuple[Tensor, list[Tensor]]:
    """The losses of one pass, and the load of every layer."""
    aux = AuxLosses(**weights)
    with aux.attach(subject.model, add_to_loss=False):
        forward(subject)
        aux.total()
        loads = [state.load for state in aux._layers]
    return torch.stack(list(aux.last.values())), loads


@contextmanager
def one_outcome(subject: Subject) -> Iterator[None]:
    """Phimoe draws from the experts within a jitter of the best: with a jitter of 0 there is one."""
    before = [getattr(layer.router, "router_jitter_noise", None) for layer in subject.layers]
    for layer in subject.layers:
        layer.router.router_jitter_noise = 0.0
    try:
        yield
    finally:
        for layer, value in zip(subject.layers, before, strict=True):
            if value is None:
                del layer.router.router_jitter_noise
            else:
                layer.router.router_jitter_noise = value


@contextmanager
def experts_reversed(subject: Subject) -> Iterator[None]:
    """The same model with its experts in reverse order, which keeps groups of them together."""
    reverse(subject.layers)
    try:
        yield
    finally:
        reverse(subject.layers)


@torch.no_grad()
def reverse(layers: Sequence[MoELayer]) -> None:
    """Reverse experts' weights, the router's rows, its selection bias, and tables of expert numbers."""
    tensors: dict[int, tuple[Tensor, int]] = {}
    for layer in layers:
        for tensor in [*layer.experts.parameters(), *layer.router.parameters(), *layer.router.buffers()]:
            tensors[id(tensor)] = tensor, layer.num_experts
        if layer.selection_bias is not None:
            tensors[id(layer.selection_bias)] = layer.selection_bias, layer.num_experts
    for tensor, size in tensors.values():
        if not tensor.is_floating_point():
            tensor.copy_(size - 1 - tensor)  # DeepSeek-V4's experts by token id
        elif tensor.shape[0] == size * 16 and tensor.ndim == 2:  # dbrx
            tensor.copy_(tensor.unflatten(0, (size, 16)).flip(0).flatten(0, 1))
        elif tensor.shape[0] in (size, size + 1):
            tensor[:size] = tensor[:size].flip(0)
        elif tensor.shape == (1, size):
            tensor.copy_(tensor.flip(1))


def variance_is_right(subject: Subject) -> str | None:
    """Beside L_o values and gradients equal loops; alone it moves all learned routers, not the last layer's experts."""
    if not subject.several:
        return refused(subject, "variance")
    if wrong := wrong_losses(subject, *attached(subject, "orthogonality", "variance")):
        return wrong
    _, ours = attached(subject, "variance")
    reached = {parameter for name, parameter in subject.model.named_parameters() if name in ours and ours[name].any()}
    for seen in subject.learned:
        if reached.isdisjoint(seen.layer.router.parameters()):
            return f"{seen.layer.name}: nothing reaches the router"
    behind = not reached.isdisjoint(subject.stock[-1].layer.experts.parameters())
    return "it reaches experts behind which no router is" if behind else None


def balance_and_z_are_right(subject: Subject) -> str | None:
    """Values, and the gradients of their sum, equal loops."""
    losses = [name for name in ("balance", "router_z") if name in subject.right]
    return wrong_losses(subject, *attached(subject, *losses))


# --- leaving no trace


def detach_leaves_nothing(subject: Subject) -> str | None:
    """After the context, and after an exception in it: logits, hooks, attributes and config are as before."""
    with own_balance_loss(subject), checkpointing(subject):
        with torch.no_grad():
            logits = forward(subject).logits  # first of all: models make some attributes in their first pass
        before = trace(subject)
        aux = AuxLosses(balance=1.0, **between(subject))
        with aux.attach(subject.model, add_to_loss=False):
            forward(subject)
            inside = trace(subject)
        wrong = differing(trace(subject), before)
        try:
            with aux.attach(subject.model, add_to_loss=False):
                raise KeyError
        except KeyError:
            wrong = wrong or differing(trace(subject), before)
        with torch.no_grad():
            again = forward(subject).logits
    if inside["attributes"] == before["attributes"]:
        return "nothing was attached"
    return wrong or (None if torch.equal(logits, again) else "logits differ")


@contextmanager
def own_balance_loss(subject: Subject) -> Iterator[None]:
    """The model with its own balance loss on, if it has one: ours switch it off for as long as they are there."""
    config = subject.model.config.get_text_config()
    before = getattr(config, "output_router_logits", None)
    if before is not None:
        config.output_router_logits = True
    try:
        yield
    finally:
        if before is not None:
            config.output_router_logits = before


def between(subject: Subject) -> dict[str, float]:
    """Weights of the losses between the experts of a token, where it has several."""
    return {"orthogonality": 0.3, "variance": 0.2} if subject.several else {}


def trace(subject: Subject) -> dict[str, Any]:
    """All that attaching might leave on a model."""
    modules = dict(subject.model.named_modules())
    return {
        "attributes": {f"{name}.{key}" for name, module in modules.items() for key in vars(module)},
        "functions": {
            (f"{name}.{key}", id(value))
            for name, module in modules.items()
            for key, value in vars(module).items()
            if callable(value)
        },
        "hooks": Counter(
            (name, kind, hook)
            for name, module in modules.items()
            for kind, hooks in vars(module).items()
            if kind.endswith("hooks") and isinstance(hooks, dict)
            for hook in hooks.values()
        ),
        "config": subject.model.config.to_dict(),
        "names of weights": list(subject.model.state_dict()),
    }


def differing(after: dict[str, Any], before: dict[str, Any]) -> str | None:
    """What is not as it was."""
    for name in before:
        if after[name] != before[name]:
            return f"other {name} than before: {set(after[name]) ^ set(before[name])}"
    return None


def saves_and_reloads_stock(subject: Subject) -> str | None:
    """A checkpoint written while attached, after a step, has stock names and loads into the stock class, exactly."""
    before = {name: p.detach().clone() for name, p in subject.model.named_parameters()}
    with tempfile.TemporaryDirectory() as folder:
        with AuxLosses(balance=0.1, **between(subject)).attach(subject.model, add_to_loss=False):
            forward(subject)
            optimise(subject)
            subject.model.save_pretrained(folder)
        keys = checkpoint_keys(folder)
        reloaded = type(subject.model).from_pretrained(folder, dtype=torch.float32).eval()
    subject.model.eval()
    with torch.no_grad():
        ours, theirs = forward(subject).logits, reloaded(**subject.inputs).logits
        for name, parameter in subject.model.named_parameters():
            parameter.copy_(before[name])
    subject.model.train()
    if keys != subject.stock_keys:
        return f"the checkpoint has other weights: {sorted(keys ^ subject.stock_keys)[0]}"
    return None if torch.equal(ours, theirs) else f"logits differ by {float((ours - theirs).abs().max()):.0e}"


def optimise(subject: Subject) -> None:
    """One step of gradient descent."""
    step(subject)
    torch.optim.SGD(subject.model.parameters(), lr=0.01).step()


def checkpoint_keys(folder: str) -> set[str]:
    """Names of the weights in a checkpoint."""
    keys: set[str] = set()
    for file in Path(folder).glob("*.safetensors"):
        with safe_open(file, "pt") as content:
            keys |= set(content.keys())
    return keys


# --- selection biases


def bias_is_the_routers_and_moves(subject: Subject) -> str | None:
    """`bias_at` sways the choice and not the scores; `bias_rate` moves it against the load, and nothing else."""
    if wrong := wrong_bias(subject):
        return wrong
    biased = [seen for seen in subject.stock if seen.layer.bias_at]
    if not biased:
        return Inapplicable("no selection bias")
    before = {name: tensor.clone() for name, tensor in tensors(subject).items()}
    aux = AuxLosses(bias_rate=0.1)
    with aux.attach(subject.model, add_to_loss=False):
        step(subject)
        aux.step()
    expected = dict(before)
    for seen in biased:
        name, load = bias_name(subject, seen.layer), count(seen)
        expected[name] = before[name].clone()
        expected[name].view(-1)[: len(load)] += 0.1 * (load.mean() - load).sign()
    after = {name: tensor.clone() for name, tensor in tensors(subject).items()}
    for name, tensor in tensors(subject).items():
        tensor.copy_(before[name])
    moved = [name for name in after if not torch.allclose(after[name].float(), expected[name].float(), atol=1e-6)]
    return f"{moved[0]} is not what it should be" if moved else None


def bias_name(subject: Subject, layer: MoELayer) -> str:
    """The full name of a layer's selection bias."""
    assert layer.bias_at is not None
    holder, attribute = layer.bias_at
    return next(f"{name}.{attribute}" for name, module in subject.model.named_modules() if module is holder)


def tensors(subject: Subject) -> dict[str, Tensor]:
    """All parameters and buffers."""
    both = [*subject.model.named_parameters(), *subject.model.named_buffers()]
    return {name: tensor.detach() for name, tensor in both}


def wrong_bias(subject: Subject) -> str | None:
    """Whether a selection bias was overlooked, or one found that does not sway the choice."""
    ran = {id(module) for layer in subject.layers for module in subject.model.get_submodule(layer.name).modules()}
    theirs = {
        f"{name}.{own}"
        for name, module in subject.model.named_modules()
        if id(module) in ran
        for own, _ in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        if re.search(tiny_models.SELECTION_BIAS, f"{name}.{own}")
    }
    ours = {bias_name(subject, layer) for layer in subject.layers if layer.bias_at}
    if ours != theirs:
        return f"selection biases are {sorted(theirs)}, found {sorted(ours)}"
    return no_sway(subject, [seen for seen in subject.stock if seen.layer.bias_at])


def no_sway(subject: Subject, biased: Sequence[truth.Seen]) -> str | None:
    """With a large bias on the last expert every token must choose it; the first of the layers from the same scores."""
    routings: list[dict[str, Any]] = [{}, {}]
    before = {name: tensor.clone() for name, tensor in tensors(subject).items()}
    for routing in routings:
        keep = lambda record, routing=routing: routing.__setitem__(record.layer.name, record.routing)
        with observe(subject.model, keep), torch.no_grad():
            forward(subject)
        for seen in biased:
            tensors(subject)[bias_name(subject, seen.layer)].view(-1)[seen.layer.num_experts - 1] = 1e3
    for name, tensor in tensors(subject).items():
        tensor.copy_(before[name])
    for name, last in ((seen.layer.name, seen.layer.num_experts - 1) for seen in biased):
        stock, swayed = ((routing[name].expert == last).any(-1).all() for routing in routings)
        if stock or not swayed:
            return f"{name}: the bias does not sway the choice"
    first = [routing[biased[0].layer.name].scores for routing in routings] if biased else []
    return "the bias is in the scores" if first and not torch.equal(*first) else None


# --- the packages outside


def is_refused(package: str) -> str | None:
    """A package whose experts cannot be watched is refused by its name, in one line."""
    try:
        moe_layers(tiny_models.build(package).model)
    except Misuse as error:
        return None if package in str(error) and "\n" not in str(error) else f"refused with {error}"
    return "not refused"


@dataclass(frozen=True)
class Check:
    """A column of the table."""

    column: str
    explanation: str
    run: Callable[[Subject], str | None]


CHECKS = (
    # First, before any other check could leave something behind.
    Check(
        "detach",
        "After the context, and after an exception in it, logits are bit-identical, and hooks, attributes, config and "
        "names of weights as before.",
        detach_leaves_nothing,
    ),
    Check(
        "layers",
        "`moe_layers` finds the experts modules that run and no others; the indices that they are given come from the "
        "router that it names; k, E and the decoder block are right.",
        finds_the_layers,
    ),
    Check(
        "scores",
        "The weights of a token's experts are the scores of its record, up to one factor per token.",
        scores_are_the_routers,
    ),
    Check(
        "watched",
        "With every expert's own output recorded: loss and logits bit-identical around `grouped_mm`, to rounding "
        "around `eager`; every gradient to rounding (it is summed in another order).",
        watched_is_unchanged,
    ),
    Check(
        "weight 0",
        "`AuxLosses` of weight 0: loss, logits and every gradient bit-identical around `grouped_mm` and `eager`.",
        weight_zero_is_unchanged,
    ),
    Check(
        "firings",
        "Each layer fires once per pass and its choices are counted once, padding excluded, under activation "
        "checkpointing too, where gradients are the same.",
        firings_are_right,
    ),
    Check(
        "L_o",
        "Orthogonality: the value and the gradient of every parameter equal a loop over single tokens and the eager "
        "weights of single experts, with padding.",
        orthogonality_is_right,
    ),
    Check(
        "order",
        "The losses are the same with the rows of the batch, or the experts, in another order.",
        order_does_not_matter,
    ),
    Check(
        "L_v",
        "Variance, against the mean of the step before and beside orthogonality: values and gradients equal loops. By "
        "itself it reaches every learned router, and no expert of the last layer.",
        variance_is_right,
    ),
    Check(
        "balance, z",
        "Values and gradients equal loops (the z-loss where routers return logits).",
        balance_and_z_are_right,
    ),
    Check(
        "reload",
        "A checkpoint saved while attached, after an optimiser step, has the weights of a stock one and loads into the "
        "stock class with bit-identical logits.",
        saves_and_reloads_stock,
    ),
    Check(
        "bias",
        "The selection bias sways the choice and not the scores; `bias_rate` moves it against the load, and nothing "
        "else.",
        bias_is_the_routers_and_moves,
    ),
)

EXCEPTIONS = {
    ("phimoe", "scores"): "its weights are those of a sparse mixer, a softmax over the experts near the best one; its "
    "scores here are the plain softmax of its logits",
}
"""Where a check cannot hold, and why."""

ATTACHED = [p for p in tiny_models.packages() if p not in tiny_models.OUTSIDE] + ["dbrx", "step3p7"]
REFUSED = [p for p in tiny_models.OUTSIDE if p in tiny_models.packages() and p not in ATTACHED]


def outcomes(subject: Subject) -> dict[str, str | None]:
    """What each check says; an error counts as a failure."""
    results: dict[str, str | None] = {}
    for check in CHECKS:
        try:
            results[check.column] = check.run(subject)
        except Exception as error:
            results[check.column] = f"{type(error).__name__}: {error}"
    return results


def failures(package: str, results: dict[str, str | None]) -> dict[str, str]:
    """The checks that fail, and the exceptions that are none."""
    failed = {column: why for column, why in results.items() if why is not None and not isinstance(why, Inapplicable)}
    named = {column for name, column in EXCEPTIONS if name == package}
    unneeded = dict.fromkeys(named - failed.keys(), "holds, though it is named as an exception")
    return {column: why for column, why in failed.items() if column not in named} | unneeded
