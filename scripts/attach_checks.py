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
from torch import Tensor, nn

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
    """A tiny model in train mode, with a batch whose second row ends in padding."""

    package: str
    model: Any
    inputs: dict[str, Tensor]
    layers: list[MoELayer]
    stock_keys: set[str]
    """Names of the weights in the checkpoint that the model made before anything was attached to it."""

    @property
    def interface(self) -> bool:
        """Whether the package is on the experts interface, whose implementations can be chosen."""
        return self.package not in tiny_models.OUTSIDE

    @property
    def valid(self) -> Tensor:
        """Which tokens of the batch are not padding."""
        return self.inputs["attention_mask"].bool().flatten()


def build(package: str) -> Subject:
    """The subject of a package."""
    tiny = tiny_models.build(package, padded=True)
    with tempfile.TemporaryDirectory() as folder:
        tiny.model.save_pretrained(folder)
        keys = checkpoint_keys(folder)
    subject = Subject(package=package, model=tiny.model, inputs=tiny.inputs, layers=[], stock_keys=keys)
    subject.layers = moe_layers(tiny.model)
    roughen(subject.layers)
    return subject


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


def backward(subject: Subject, loss: Tensor) -> Gradients:
    """The gradient of every parameter that has one."""
    subject.model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in subject.model.named_parameters() if p.grad is not None}


def step(subject: Subject) -> tuple[Any, Gradients]:
    """Forward and backward."""
    output = forward(subject)
    return output, backward(subject, objective(subject, output))


def attached_total(subject: Subject, passes: int = 1, **weights: float) -> tuple[dict[str, Tensor], Gradients]:
    """Each loss and the gradient of their total alone, in the last of so many optimiser steps that change nothing."""
    aux = AuxLosses(**weights)
    with aux.attach(subject.model, add_to_loss=False):
        for _ in range(passes):
            forward(subject)
            total = aux.total()
            aux.step()
    assert total is not None
    return aux.last, backward(subject, total)


def difference(ours: Gradients, right: Gradients, rounding: float = ROUNDING) -> str | None:
    """Where gradients differ: by more than rounding, relative to a parameter's or a thousandth of the whole norm."""
    whole = torch.stack([g.norm() for g in right.values()]).norm()
    for name in sorted(ours.keys() | right.keys()):
        zero = torch.zeros(())
        a, b = ours.get(name, zero), right.get(name, zero)
        error = float((a - b).norm() / torch.maximum(b.norm(), 1e-3 * whole))
        if error > rounding:
            return f"the gradient of {name} is off by {error:.0e}"
    return None


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
    """The model with an implementation of its experts."""
    if subject.interface:
        subject.model.set_experts_implementation(name)
    try:
        yield
    finally:
        if subject.interface:
            subject.model.set_experts_implementation("grouped_mm")


def learned(subject: Subject) -> list[MoELayer]:
    """The layers whose routers learn what they choose."""
    return [layer for layer in subject.layers if "Hash" not in type(layer.router).__name__]


# --- finding layers


def finds_the_layers(subject: Subject) -> str | None:
    """Every experts module that runs, and no other; its router; k and E; its block."""
    ran = Counter[str]()
    handles = [
        module.register_forward_hook(lambda _, args, out, name=name: ran.update([name]))
        for name, module in subject.model.named_modules()
        if type(module).__name__.endswith("Experts")
    ]
    stock = truth.run_stock(subject.model, subject.inputs, subject.layers)
    for handle in handles:
        handle.remove()
    names = {module: name for name, module in subject.model.named_modules()}
    found = Counter(names[layer.experts] for layer in subject.layers)
    routed = {name: times for name, times in ran.items() if "shared" not in name.lower()}
    if found != routed:
        return f"found {dict(found)}, but what runs is {routed}"
    return next((wrong for seen in stock.layers if (wrong := wrong_handle(subject, seen))), None)


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
    stock = truth.run_stock(subject.model, subject.inputs, subject.layers)
    scores: dict[str, Tensor | None] = {}
    with observe(subject.model, lambda record: scores.__setitem__(record.layer.name, record.routing.scores)):
        forward(subject)
    for seen in stock.layers:
        ours = scores[seen.layer.name]
        if (ours is None) != (seen.layer not in learned(subject)):
            return f"{seen.layer.name}: only routers that look their choice up have no scores"
        if ours is not None and (wrong := not_proportional(seen, ours.detach())):
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
    """With the experts' outputs asked for: logits bit-identical around grouped_mm; else to rounding."""
    for name in ("grouped_mm", "eager"):
        with implementation(subject, name):
            plain, right = step(subject)
            with observe(subject.model, lambda record: None, outputs=True):
                watched, ours = step(subject)
        exact = subject.interface and name == "grouped_mm"
        for field in ("loss", "logits") if "labels" in subject.inputs else ("logits",):
            one, other = getattr(watched, field), getattr(plain, field)
            if not torch.equal(one, other) if exact else far(one, other, 1e-6 if field == "loss" else ROUNDING):
                return f"{field} differ around {name} by {float((one - other).detach().abs().max()):.0e}"
        if wrong := difference(ours, right):
            return f"around {name} {wrong}"
    return None


def weight_zero_is_unchanged(subject: Subject) -> str | None:
    """Losses of weight 0: loss, logits and every gradient are bit-identical, around grouped_mm and eager."""
    for name in ("grouped_mm", "eager"):
        with implementation(subject, name):
            plain, right = step(subject)
            with AuxLosses().attach(subject.model):
                attached, ours = step(subject)
        if not torch.equal(attached.logits, plain.logits):
            return f"logits differ around {name}"
        if "labels" in subject.inputs and not torch.equal(attached.loss, plain.loss):
            return f"the loss differs around {name}"
        if wrong := unequal(ours, right):
            return f"around {name}, not bit-identical: {wrong}"
    return None


# --- counting


def firings_are_right(subject: Subject) -> str | None:
    """Each layer fires once per pass and its choices are counted once, with activation checkpointing too."""
    first, right = fired(subject)
    subject.model.activation_checkpointing_enable()
    second, ours = fired(subject)
    subject.model.activation_checkpointing_disable()
    return first or second or difference(ours, right)


def fired(subject: Subject) -> tuple[str | None, Gradients]:
    """One step with a loss on outputs and one on the router: what was counted wrongly, and the gradient."""
    runs = Counter[str]()
    hook = lambda name: lambda module, args: runs.update([name])
    handles = [layer.experts.register_forward_pre_hook(hook(layer.name)) for layer in subject.layers]
    stock = truth.run_stock(subject.model, subject.inputs, subject.layers)
    runs.clear()
    aux = AuxLosses(router_orthogonality=0.1 * all(layer.weight_at for layer in subject.layers), **applicable(subject))
    with aux.attach(subject.model, add_to_loss=False):
        output = forward(subject)
        loss = objective(subject, output) + aux.total()
        firings = dict(aux.firings)
        gradients = backward(subject, loss)
        loads = {state.layer.name: state.load for state in aux._layers}
    for handle in handles:
        handle.remove()
    again = subject.model.is_activation_checkpointing
    if again and max(runs.values()) != 2:
        return "no layer ran again in the backward pass", gradients
    if firings != {layer.name: 1 for layer in subject.layers}:
        return f"firings are {firings}", gradients
    for seen in stock.layers:
        load, counted = loads[seen.layer.name], count(seen)
        if load is None or not torch.equal(load, counted):
            return f"{seen.layer.name}: counted {load}, right is {counted}", gradients
    return None, gradients


def applicable(subject: Subject) -> dict[str, float]:
    """Losses that apply to the subject."""
    return {"orthogonality": 0.3, "variance": 0.2} if subject.layers[0].top_k > 1 else {"balance": 0.3}


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
    stock = truth.run_stock(subject.model, subject.inputs, subject.layers)
    if all(seen.index.shape[1] == 1 for seen in stock.layers):
        return refused(subject, "orthogonality")
    right = truth.total(stock, truth.orthogonality, stock.layers)
    last, ours = attached_total(subject, orthogonality=1.0)
    if far(last["orthogonality"], right):
        return f"it is {last['orthogonality']:.6g} and should be {float(right.detach()):.6g}"
    return difference(ours, backward(subject, right))


def refused(subject: Subject, loss: str) -> str:
    """A loss between experts of a token, where there is one: it must be refused with the reason."""
    try:
        attached_total(subject, **{loss: 1.0})
    except Misuse as error:
        if f"{loss} needs two experts per token" in str(error):
            return Inapplicable("one expert per token: refused, and said so")
    return f"{loss} is not refused where tokens have one expert"


def order_does_not_matter(subject: Subject) -> str | None:
    """With rows, or experts, in another order the orthogonality and every expert's load are the same."""
    weights = applicable(subject)
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
    """Value and gradients equal loops; it moves every learned router, and not the experts of the last layer."""
    stock = truth.run_stock(subject.model, subject.inputs, subject.layers)
    if all(seen.index.shape[1] == 1 for seen in stock.layers):
        return refused(subject, "variance")
    layers = learned(subject)
    seen = [seen for seen in stock.layers if seen.layer in layers]
    right = truth.total(stock, truth.variance, seen)
    last, ours = attached_total(subject, passes=2, variance=1.0)
    if far(last["variance"], right):
        return f"it is {last['variance']:.6g} and should be {float(right.detach()):.6g}"
    if wrong := difference(ours, backward(subject, right)):
        return wrong
    names = {parameter: name for name, parameter in subject.model.named_parameters()}
    for layer in layers:
        if not any(ours[names[p]].any() for p in layer.router.parameters() if names[p] in ours):
            return f"{layer.name}: nothing reaches the router"
    reached = [names[p] for p in layers[-1].experts.parameters() if names[p] in ours and ours[names[p]].any()]
    return f"it reaches {reached[0]}, behind which no router is" if reached else None


def balance_and_z_are_right(subject: Subject) -> str | None:
    """Values, and the gradients of their sum, equal loops."""
    stock = truth.run_stock(subject.model, subject.inputs, subject.layers)
    layers = learned(subject)
    seen = [seen for seen in stock.layers if seen.layer in layers]
    losses = {"balance": truth.balance}
    if any(layer.scores != "probabilities" for layer in layers):
        losses["router_z"] = truth.router_z
    right = {name: truth.total(stock, loss, seen) for name, loss in losses.items()}
    last, ours = attached_total(subject, **dict.fromkeys(losses, 1.0))
    for name, value in right.items():
        if far(last[name], value):
            return f"{name} is {last[name]:.6g} and should be {float(value.detach()):.6g}"
    return difference(ours, backward(subject, torch.stack(list(right.values())).sum()))


# --- leaving no trace


def detach_leaves_nothing(subject: Subject) -> str | None:
    """After the context, and after an exception in it: logits, hooks, attributes and config are as before."""
    text = subject.model.config.get_text_config()
    own = getattr(text, "output_router_logits", None)
    if own is not None:
        text.output_router_logits = True  # the model's own balance loss: it must stay away for as long as ours is here
    with torch.no_grad():
        logits = forward(subject).logits  # before the look at attributes: models make some of them in their first pass
    before = trace(subject)
    aux = AuxLosses(balance=1.0, bias_rate=0.1 * any(layer.bias_at for layer in subject.layers), **between(subject))
    with aux.attach(subject.model, add_to_loss=False):
        forward(subject)
        inside = trace(subject)
        kept = getattr(text, "output_router_logits", None)
    wrong = differing(trace(subject), before)
    try:
        with AuxLosses(balance=1.0).attach(subject.model, add_to_loss=False):
            raise KeyError
    except KeyError:
        wrong = wrong or differing(trace(subject), before)
    with torch.no_grad():
        again = forward(subject).logits
    if own is not None:
        text.output_router_logits = own
    if wrong or not torch.equal(logits, again):
        return wrong or "logits differ"
    if kept or inside["attributes"] == before["attributes"]:
        return "nothing was attached" if not kept else "the model's own balance loss was on beside ours"
    return None


def between(subject: Subject) -> dict[str, float]:
    """Losses between the experts of a token, where it has several."""
    return {"orthogonality": 1.0, "variance": 1.0} if subject.layers[0].top_k > 1 else {}


def trace(subject: Subject) -> dict[str, Any]:
    """All that attaching might leave on a model."""
    modules = dict(subject.model.named_modules())
    return {
        "attributes": {f"{name}.{key}" for name, module in modules.items() for key in vars(module)},
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
    """A checkpoint written while attached, after a step, has stock names and loads into the stock class, bit-identical."""
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
    """`bias_at` is what sways the choice and not the scores, and `bias_rate` moves it against the load, and it alone."""
    if wrong := wrong_bias(subject):
        return wrong
    biased = [layer for layer in subject.layers if layer.bias_at]
    if not biased:
        return Inapplicable("no selection bias")
    before = {name: tensor.clone() for name, tensor in tensors(subject).items()}
    stock = truth.run_stock(subject.model, subject.inputs, biased)
    aux = AuxLosses(bias_rate=0.1)
    with aux.attach(subject.model, add_to_loss=False):
        step(subject)
        aux.step()
    expected = dict(before)
    names = {id(tensor): name for name, tensor in tensors(subject).items()}
    for seen in stock.layers:
        load, bias = count(seen), before[names[id(seen.layer.selection_bias)]].clone()
        bias.view(-1)[: len(load)] += 0.1 * (load.mean() - load).sign()
        expected[names[id(seen.layer.selection_bias)]] = bias
    after = {name: tensor.clone() for name, tensor in tensors(subject).items()}
    with torch.no_grad():
        for name, tensor in tensors(subject).items():
            tensor.copy_(before[name])
    moved = [name for name in after if not torch.allclose(after[name].float(), expected[name].float(), atol=1e-6)]
    return f"{moved[0]} is not what it should be" if moved else None


def tensors(subject: Subject) -> dict[str, Tensor]:
    """All parameters and buffers."""
    both = [*subject.model.named_parameters(), *subject.model.named_buffers()]
    return {name: tensor.detach() if isinstance(tensor, nn.Parameter) else tensor for name, tensor in both}


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
    modules = {module: name for name, module in subject.model.named_modules()}
    ours = {f"{modules[layer.bias_at[0]]}.{layer.bias_at[1]}" for layer in subject.layers if layer.bias_at}
    if ours != theirs:
        return f"selection biases are {sorted(theirs)}, found {sorted(ours)}"
    return next((wrong for layer in subject.layers if layer.bias_at and (wrong := no_sway(subject, layer))), None)


def no_sway(subject: Subject, layer: MoELayer) -> str | None:
    """With a large bias on the last expert every token must choose it, from the same scores."""
    chosen: list[Tensor] = []
    scores: list[Tensor] = []

    def look(record: Any) -> None:
        if record.layer.name == layer.name:
            chosen.append(record.routing.expert)
            scores.append(record.routing.scores)

    bias = layer.selection_bias.detach().view(-1)
    last = layer.num_experts - 1
    with observe(subject.model, look), torch.no_grad():
        forward(subject)
        before = bias[last].clone()
        bias[last] = 1e3
        forward(subject)
        bias[last] = before
    if not (chosen[1] == last).any(-1).all() or (chosen[0] == last).any(-1).all():
        return f"{layer.name}: the bias does not sway the choice"
    return None if torch.equal(*scores) else f"{layer.name}: the bias is in the scores"


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
        "With every expert's own output recorded: loss and logits bit-identical around `grouped_mm`, to rounding around "
        "`eager`; every gradient to rounding (they are summed in another order).",
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
        "Variance, against the mean of the step before: value and gradients equal loops; it reaches every learned "
        "router, and no expert of the last layer.",
        variance_is_right,
    ),
    Check(
        "balance, z",
        "Values and gradients equal loops (the z-loss where routers return logits).",
        balance_and_z_are_right,
    ),
    Check(
        "detach",
        "After the context, and after an exception in it, logits are bit-identical, and hooks, attributes, config and "
        "names of weights as before.",
        detach_leaves_nothing,
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
    unneeded = {column: "holds, though it is named as an exception" for column in named - failed.keys()}
    return {column: why for column, why in failed.items() if column not in named} | unneeded
