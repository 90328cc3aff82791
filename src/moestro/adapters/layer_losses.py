"""What `AuxLosses` computes and keeps of one layer."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from moestro.adapters.applicability import LOSSES, OF_COMPETITION, OF_WEIGHTS, obstacle
from moestro.adapters.compete import Competitor
from moestro.adapters.ranks import over_ranks
from moestro.adapters.selection_bias import SelectionBias
from moestro.adapters.tap import beside_checkpoints
from moestro.errors import Misuse
from moestro.losses import (
    PerSequence,
    balance_against,
    balance_per_sequence,
    distillation,
    diversity,
    mean_scores,
    orthogonality,
    router_orthogonality,
    router_z,
    simbal,
    variance,
    variance_per_sequence,
)
from moestro.routing import LayerRecord, MoELayer, choices

if TYPE_CHECKING:
    from moestro.adapters.aux_losses import AuxLosses
    from moestro.adapters.watch import Watch


Seen = tuple[Tensor | None, ...]
"""Statistics of a layer since the last optimiser step."""

NOTHING_SEEN: Seen = (None,) * 5


class LayerLosses:
    """One layer's losses in the current pass, and its statistics of the current and the previous optimiser step.

    Statistics are tensors that are replaced, never Python numbers that change: a compiled model would compile anew.
    """

    def __init__(self, aux: "AuxLosses", layer: MoELayer) -> None:
        self.aux, self.layer = aux, layer
        self.watch: Watch | None = None
        self.names = [name for name in LOSSES if getattr(aux, name) and obstacle(layer, name) is None]
        self.bias = SelectionBias(layer) if aux.bias_rate and layer.bias_at is not None else None
        self.terms: dict[str, Tensor] = {}
        """Losses of this pass, weighted over sequences and summed over the layer's runs, with their graph."""
        self.load: Tensor | None = None
        """Choices per expert since the last optimiser step."""
        self.proposed: Tensor | None = None
        """The same of the router alone, which is what a selection bias moves."""
        self.scores: Tensor | None = None
        """Sum of the slot scores per expert since the last optimiser step, and the number of tokens at the end."""
        self.sizes: Tensor | None = None
        """Sum of each loss since the last optimiser step, in the order of `scaled`, and of balance at the end."""
        self.competitor: Competitor | None = None
        """Set while experts compete."""
        self.lagged_load: Tensor | None = None
        self.lagged_mean: Tensor | None = None
        self.scaled = [name for name in self.names if name not in {"balance", *OF_COMPETITION}]
        """Losses that `scaling = "relative"` brings to the size of balance."""
        self.scales: Tensor | None = None
        """The factors that do so, in the order of `scaled`; 0 if not measured yet. None: none is measured."""
        self.to_measure = aux.scaling == "relative" and bool(self.scaled)
        """True while a factor is still to be measured."""

    def consume(self, record: LayerRecord) -> None:
        """Take a record of this layer, inside its forward."""
        assert self.watch is not None
        current = self.watch.current
        assert current is not None
        if not current.training or current.share is None:
            return
        self.follow(record.layer)
        if self.competitor is not None and record.competition is not None and not record.recomputed:
            with beside_checkpoints():
                self.competitor.count(record.competition)
        if self.aux.mask_prompt and record.batch.label is not None:
            record = with_labels_only(record)
        # In a recomputation the losses are computed again, because autograd looks for what the first run saved.
        terms = {name: self.weigh(name, record, current.share) for name in self.names}
        if record.recomputed:
            return
        # Summed, because a model may run a layer several times in a pass.
        self.terms = {name: added(self.terms.get(name), value) for name, value in terms.items()}
        with torch.no_grad(), beside_checkpoints():
            self.count(record, terms, current.share)

    def follow(self, layer: MoELayer) -> None:
        """Use the handle on the modules that run now: PEFT may have replaced the earlier ones."""
        self.layer = layer
        if self.bias is not None:
            self.bias.layer = layer

    def weigh(self, name: str, record: LayerRecord, share: Tensor) -> Tensor:
        """One loss as a scalar: over sequences by their share of the whole batch, over weights by this pass's share."""
        if name in OF_COMPETITION and record.competition is None:  # a graph, for a loop in which this is the only loss
            return share.new_zeros(()) + 0.0 * record.proposed.weight.sum()
        value = self.functions()[name](record)
        if name in OF_WEIGHTS:
            return value * share.sum()  # type: ignore[operator]
        if self.aux.over(name) == "batch":  # every token counts alike, as in the papers' equations
            count = over_ranks(value.count.sum()).clamp_min(1)  # type: ignore[union-attr]
            return value.sum.sum() / count * over_ranks(share.sum())  # type: ignore[union-attr]
        if share.shape != value.sum.shape:  # type: ignore[union-attr]
            share = share.sum()[None]  # the layer was given other tokens than the batch's: all of them as one sequence
        return (value.sum / value.count.clamp_min(1) * share).sum()  # type: ignore[union-attr]

    def functions(self) -> dict[str, Callable[[LayerRecord], PerSequence | Tensor]]:
        """The losses by name."""
        return {
            "balance": self.balance,
            "orthogonality": lambda record: orthogonality(record, self.aux.orthogonality_form),
            "variance": self.variance,
            "distillation": lambda record: distillation(
                record, self.aux.distillation_form, self.aux.distillation_winners
            ),
            "diversity": lambda record: diversity(record, self.aux.diversity_form),
            "router_z": router_z,
            "router_orthogonality": lambda record: router_orthogonality(self.router_weight()),
            "simbal": lambda record: simbal(self.router_weight()),
        }

    def router_weight(self) -> Tensor:
        """Return the router's rows for the routed experts. Raise Misuse if their values are elsewhere."""
        weight = self.layer.router_weight
        assert weight is not None
        if weight.is_meta or not weight.is_floating_point():
            raise Misuse(
                f"router_orthogonality and simbal need the router's weight, but that of {self.layer.name} is "
                f"{'offloaded' if weight.is_meta else 'quantised'}: load it without, or set them to 0"
            )
        return weight[: self.layer.num_experts]

    def balance(self, record: LayerRecord) -> PerSequence:
        """Load balance, over what `balance_over` says."""
        if self.aux.balance_over == "sequence":
            return balance_per_sequence(record)
        if self.aux.balance_over == "lagged":
            load = self.lagged_load if self.lagged_load is not None else self.uniform(record)
            return balance_against(record, load)
        edges = over_ranks(choices(record.routing, record.batch, self.layer.num_experts))
        return balance_against(record, edges / edges.sum().clamp_min(1))

    def variance(self, record: LayerRecord) -> PerSequence:
        """Routing variance, over what `variance_over` says."""
        form, cap = self.aux.variance_form, self.aux.variance_cap
        if self.aux.variance_over == "sequence":
            return variance_per_sequence(record, form, cap)
        if self.aux.variance_over == "lagged":
            mean = self.lagged_mean if self.lagged_mean is not None else self.uniform(record)
        else:
            total, count = mean_scores(record)
            mean = over_ranks(total) / over_ranks(count).clamp_min(1)
        return variance(record, mean, form, cap)

    def uniform(self, record: LayerRecord) -> Tensor:
        """The same share for every expert."""
        return torch.full((self.layer.num_experts,), 1 / self.layer.num_experts, device=record.hidden.device)

    def count(self, record: LayerRecord, terms: dict[str, Tensor], share: Tensor) -> None:
        """Add this pass to the statistics of the optimiser step."""
        load = choices(record.routing, record.batch, self.layer.num_experts).double()  # fp32 cannot count beyond 2^24
        self.load = added(self.load, load)
        if self.bias is not None:
            rerouted = record.proposed is not record.routing
            own = choices(record.proposed, record.batch, self.layer.num_experts).double() if rerouted else load
            self.proposed = added(self.proposed, own)
        if self.aux.variance and self.aux.variance_over == "lagged" and "variance" in self.names:
            total, count = mean_scores(record)
            self.scores = added(self.scores, torch.cat([total, count[None]]))
        if self.to_measure:
            sizes = torch.stack([terms[name].detach() for name in self.scaled])
            reference = terms["balance"] if "balance" in terms else self.weigh("balance", record, share)
            self.sizes = added(self.sizes, torch.cat([sizes, reference.detach()[None]]))

    def scale(self, name: str) -> Tensor | float:
        """Return the factor on this loss."""
        if self.aux.scaling == "weight" or name not in self.scaled:
            return 1.0
        return 0.0 if self.scales is None else self.scales[self.scaled.index(name)]

    def seen(self) -> Seen:
        """Return the statistics since the last optimiser step; not copied, as tensors are never changed in place."""
        responses = None if self.competitor is None else self.competitor.sums
        return self.load, self.proposed, self.scores, self.sizes, responses

    def go_back_to(self, seen: Seen) -> None:
        """Set the statistics back to `seen`."""
        self.load, self.proposed, self.scores, self.sizes, responses = seen
        if self.competitor is not None:
            self.competitor.sums = responses

    @torch.no_grad()
    def step(self) -> None:
        """The optimiser has stepped: this step's statistics become the previous one's, and the selection bias moves."""
        if self.competitor is not None:
            self.competitor.step(self.aux.steps + 1)
        if self.load is None:
            return
        load, self.load = over_ranks(self.load), None
        self.lagged_load = mean_or(load, load.sum(), self.lagged_load)
        if self.proposed is not None and self.bias is not None:
            proposed, self.proposed = over_ranks(self.proposed), None
            self.bias.move(proposed, self.aux.bias_rate)
        if self.scores is not None:
            scores, self.scores = over_ranks(self.scores), None
            self.lagged_mean = mean_or(scores[:-1], scores[-1], self.lagged_mean)
        if self.sizes is not None:
            sizes, self.sizes = over_ranks(self.sizes).abs(), None
            self.add_scales(torch.where(sizes[:-1] > 0, sizes[-1] / sizes[:-1].clamp_min(1e-30), 0.0))

    def add_scales(self, found: Tensor) -> None:
        """Use the factors in `found` for losses that have none yet; a loss of size 0 in this step waits for another."""
        scales = found if self.scales is None else torch.where(self.scales > 0, self.scales, found)
        known = (scales > 0).tolist()
        self.scales = scales if any(known) else None
        self.to_measure = not all(known)

    def state(self) -> dict[str, Any]:
        """Return what a resumed run needs, as plain numbers (floats survive JSON exactly)."""
        kept = {"load": self.lagged_load, "mean": self.lagged_mean}
        if self.bias is not None:
            kept["bias"] = self.bias.master
        if self.competitor is not None:
            kept |= self.competitor.state()
        plain = {name: value.tolist() for name, value in kept.items() if value is not None}
        scales = {} if self.scales is None else dict(zip(self.scaled, self.scales.tolist(), strict=True))
        return plain | ({"scales": scales} if scales else {})

    def load_state(self, state: Any, *, biases: bool) -> None:
        """Restore `state`; if `biases` is true, write the selection bias into the model too."""
        check_state(state, self.layer)
        device = next(self.layer.router.parameters()).device
        if self.bias is not None and "bias" in state:
            self.bias.restore(state["bias"], into_model=biases)
        if self.competitor is not None:
            self.competitor.resume(state, self.aux.steps, device)
        self.lagged_load, self.lagged_mean = (
            torch.tensor(state[name], device=device) if name in state else None for name in ("load", "mean")
        )
        if self.aux.scaling == "relative" and self.scaled:
            self.scales, saved = None, state.get("scales", {})
            self.add_scales(torch.tensor([saved.get(name, 0.0) for name in self.scaled], device=device))


def check_state(state: Any, layer: MoELayer) -> None:
    """Raise Misuse unless `state` can be a state of this layer."""
    if not isinstance(state, Mapping):
        raise Misuse(f"the saved state of {layer.name} must be a mapping, got {type(state).__name__}")
    if not isinstance(scales := state.get("scales", {}), Mapping):
        raise Misuse(f"the saved scales of {layer.name} must be a mapping of losses, got {type(scales).__name__}")
    for name in ("load", "mean", "bias"):
        if name in state and len(state[name]) != layer.num_experts:
            raise Misuse(
                f"the saved {name} of {layer.name} is for {len(state[name])} experts, but it has {layer.num_experts}: "
                "load the state of this model"
            )


def with_labels_only(record: LayerRecord) -> LayerRecord:
    """Return the record with every token treated as padding that predicts no label."""
    label, competition, valid = record.batch.label, record.competition, record.batch.valid
    assert label is not None
    if valid is not None:  # padding on the left predicts the first token of its row
        label = label & valid
    if competition is not None:
        competition = replace(competition, filled=competition.filled & label[competition.token])
    return replace(record, batch=replace(record.batch, valid=label), competition=competition)


def mean_or(total: Float[Tensor, " experts"], count: Float[Tensor, ""], before: Tensor | None) -> Tensor:
    """Return `total` / `count`; if nothing was counted, the mean `before`, or the same for every expert."""
    before = torch.full_like(total, 1 / len(total)) if before is None else before
    return torch.where(count > 0, total / count.clamp_min(1), before).float()


def added(total: Tensor | None, value: Tensor) -> Tensor:
    """A sum that begins with its first summand."""
    return value if total is None else total + value
