"""`AuxLosses`: auxiliary losses whose gradient does not depend on how the batch is cut.

Each sequence contributes the mean of a loss over its valid tokens, times (its label tokens / label tokens of the whole
batch). Summed over micro-batches, accumulation steps and ranks that is one fixed number, whatever the cut. The
batch-coupled balance and variance keep this with the statistic of the previous optimiser step (`lagged`).
transformers' own auxiliary loss has none of it: it is added whole to every micro-batch and multiplied by the number of
ranks.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import Trainer

from moestro.adapters.applicability import LOSSES, refuse_to_compete, refuse_what_cannot_work
from moestro.adapters.attachment import attachment
from moestro.adapters.attempt import Attempt
from moestro.adapters.batch import TrainerBatch, labels_of_rows, share_of_sequences
from moestro.adapters.compete import Competitor
from moestro.adapters.experts_dtype import warn_of_full_precision
from moestro.adapters.gradient_ratio import measure, unmeasured
from moestro.adapters.layer_losses import NOTHING_SEEN, LayerLosses
from moestro.adapters.layers import moe_layers
from moestro.adapters.native import native_balance_off
from moestro.adapters.selection_bias import keep_with_adapter, warn_if_not_kept
from moestro.adapters.silence import Silence
from moestro.adapters.tap import Pass
from moestro.adapters.trainers import to_trainer
from moestro.adapters.watch import Listener, Watch, watch
from moestro.adapters.wrappers import inner_model
from moestro.competition.settings import Compete, check_lessons
from moestro.errors import Misuse, TrainingFailed
from moestro.gate.ranges import Number, Positive, Weight, check_fields, shown
from moestro.losses import DistillationForm, DiversityForm, OrthogonalityForm, VarianceForm
from moestro.routing import MoELayer

logger = logging.getLogger(__name__)

Over = Literal["sequence", "batch", "lagged"]
"""Which tokens a statistic is taken over: each sequence's own; the micro-batch's over all ranks, in which every token
counts alike, whatever its row's labels (the papers' equations, value and gradient; with accumulation they depend on the
cut); or the previous optimiser step's, which is exact under any cut and uniform at first."""


@dataclass(kw_only=True)
class AuxLosses:
    """Auxiliary losses to attach to any MoE model of transformers, or to the trainer of one.

    The total added to the loss is sum over losses of weight * (mean over MoE blocks of the sum over their sub-layers).
    For a hand-written loop `with aux.attach(model):` adds it to the loss that the model returns; pass the model
    `num_items_in_batch` (label tokens of the whole batch) when accumulating, and call `aux.step()` after each
    optimiser step. `with aux.attach(trainer):` does both by itself, and saves and resumes the state with the run.
    A loss of weight 0 is not computed.
    """

    balance: Weight = 0.0
    balance_over: Over = "sequence"
    orthogonality: Weight = 0.0
    orthogonality_form: OrthogonalityForm = "cosine"
    """cosine and weighted are blind to the length of outputs. projection (the paper's) and span are in squared units of
    it: use them with scaling = relative, as the paper does."""
    variance: Weight = 0.0
    variance_over: Over = "lagged"
    variance_form: VarianceForm = "column"
    variance_cap: Positive | None = None
    """Tokens whose scores are at least this squared distance from the mean are decided enough (at most 1)."""
    router_z: Weight = 0.0
    router_orthogonality: Weight = 0.0
    simbal: Weight = 0.0
    distillation: Weight = 0.0
    """Weight of the loss that teaches the router the outcome of competition."""
    distillation_form: DistillationForm = "kl"
    distillation_winners: Weight = 0.0
    """mse and relative-mse: extra weight on the winners."""
    diversity: Weight = 0.0
    """Weight of the loss that makes the outputs of a token's winners differ."""
    diversity_form: DiversityForm = "pairs"
    compete: Compete | None = None
    """When, where and how experts compete while the model trains; None: never."""
    bias_rate: Weight = 0.0
    """Loss-free balance: how far selection biases move per optimiser step; 0 leaves them."""
    scaling: Literal["weight", "relative"] = "weight"
    """relative: every loss is brought to the size that balance has in the first optimiser step, per layer, and then
    weighted. In that step itself only balance acts: its sizes are known at its end, whatever the cut of the batch.
    A loss whose size is 0 there waits for the first step in which it is not."""
    warmup_steps: Number = 0
    """Optimiser steps over which orthogonality and variance rise linearly to their weight."""
    mask_prompt: bool = False
    """Look only at tokens that predict a label; otherwise at all that are not padding."""

    steps: int = field(default=0, init=False)
    """Optimiser steps so far."""
    last: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    """Unweighted value of each loss in the latest micro-batch, detached (as much of it as that micro-batch is)."""
    weighted: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    """Weighted value of each loss in the latest total, detached."""
    gradient_ratios: dict[str, float] = field(default_factory=dict, init=False, repr=False)
    """Gradient norm of each loss that has units, over the task's; measured once (NaN: could not be measured)."""
    firings: dict[str, int] = field(default_factory=dict, init=False, repr=False)
    """How often each layer ran in the latest pass with gradients."""
    _layers: list[LayerLosses] = field(default_factory=list, init=False, repr=False)
    _blocks: int = field(default=1, init=False, repr=False)
    _passes: list[list[dict[str, Tensor]]] = field(default_factory=list, init=False, repr=False)
    _tasks: list[Tensor] = field(default_factory=list, init=False, repr=False)
    """Task losses that the model returned in these passes; kept only while a gradient ratio is still to be measured."""
    _once: str = field(default="", init=False, repr=False)
    """Why the latest pass's graph allows one backward pass only; empty if it allows more."""
    _watch: Watch | None = field(default=None, init=False, repr=False)
    _silence: Silence = field(default_factory=Silence, init=False, repr=False)
    _trainer: TrainerBatch | None = field(default=None, init=False, repr=False)
    _restored: dict[str, Any] = field(default_factory=dict, init=False, repr=False)
    _biases_due: bool = field(default=False, init=False, repr=False)
    """True if `_restored` holds selection biases that were not written into the model yet."""
    _saved_by: tuple[nn.Module, nn.Module] | None = field(default=None, init=False, repr=False)
    """The inner model and the model as it was given (perhaps a PEFT model); None after the first step."""
    _attempt: Attempt = field(default_factory=lambda: Attempt([]), init=False, repr=False)

    def __post_init__(self) -> None:
        check_fields(self)
        check_lessons(self.compete, distillation=self.distillation, diversity=self.diversity)

    def over(self, name: str) -> Over | None:
        """Return over which tokens a loss takes its statistic; None if it has no statistic."""
        return {"balance": self.balance_over, "variance": self.variance_over}.get(name)

    @property
    def scales_known(self) -> bool:
        """True once `scaling = "relative"` has measured a scale at every layer."""
        return all(state.scales is not None for state in self._layers if state.scaled)

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each loss that is in use, at this step."""
        ramp = min(1.0, (self.steps + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        late = ("orthogonality", "variance")
        return {name: getattr(self, name) * (ramp if name in late else 1.0) for name in LOSSES if getattr(self, name)}

    @property
    def _needs_step(self) -> bool:
        """Whether something changes between steps, so that a hand-written loop must call `step`."""
        lagged = any(getattr(self, name) and self.over(name) == "lagged" for name in ("balance", "variance"))
        return bool(lagged or self.compete or self.bias_rate or self.warmup_steps or self.scaling == "relative")

    @attachment
    def attach(
        self, target: nn.Module | Trainer, *, layers: Sequence[MoELayer] | None = None, add_to_loss: bool = True
    ) -> Iterator["AuxLosses"]:
        """Add the losses to what `target` (a model, or the trainer of one) minimises, until the context ends.

        `layers` describes a model that `moestro.adapters.moe_layers` does not know. A loop that computes its own loss
        sets `add_to_loss` to False and adds `aux.total()` after each forward pass. The model, its configuration and its
        checkpoints are afterwards as they were, but for what training changed.
        """
        if isinstance(target, Trainer):
            with to_trainer(self, target, layers):
                yield self
        else:
            with self.to_model(target, layers, add_to_loss=add_to_loss):
                yield self

    @contextmanager
    def to_model(
        self,
        model: nn.Module,
        layers: Sequence[MoELayer] | None = None,
        *,
        trainer: TrainerBatch | None = None,
        add_to_loss: bool = True,
    ) -> Iterator[Watch]:
        """Watch the model, and add the total to the loss that it returns unless a `trainer` does that."""
        if self._layers:
            raise Misuse("these AuxLosses are attached already: detach them first, or make a second AuxLosses")
        outer, model = model, inner_model(model)
        handles = list(layers) if layers is not None else moe_layers(model)
        refuse_what_cannot_work(self, model, handles)
        self._blocks = len({layer.block for layer in handles})
        self._layers = [LayerLosses(self, layer) for layer in handles]
        self._attempt = Attempt(self._layers)
        if self.compete is not None:
            for index, state in enumerate(self._layers):
                state.competitor = Competitor(
                    self.compete, state.layer, index, len(handles), diverse=self.diversity > 0
                )
        if self._restored:
            self._load(self._restored, biases=self._biases_due)
        if self.bias_rate:
            keep_with_adapter(outer, handles)
            self._saved_by = model, outer
        by_name = {state.layer.name: state for state in self._layers}
        listener = Listener(
            on_layer=lambda layer: by_name[layer.name].consume,
            on_begin=self._begin,
            on_end=self._end_with_loss if add_to_loss and trainer is None else self._end,
            wants_outputs=lambda current: current.training and self.orthogonality > 0,
            adds_losses=True,
        )
        with ExitStack() as stack:
            stack.callback(self._forget)
            if self.balance:
                stack.enter_context(native_balance_off(model))
            watching = stack.enter_context(watch(model, listener, handles))
            for tap in watching.taps:
                refuse_to_compete(self.compete, tap)
                tap.competitor = by_name[tap.layer.name].competitor
                stack.callback(setattr, tap, "competitor", None)
            for state in self._layers:
                state.watch = watching
            self._watch, self._trainer = watching, trainer
            yield watching

    def _begin(self, current: Pass, inputs: dict[str, Any]) -> None:
        if self._trainer is None:
            self._attempt.begin()
        elif not self._trainer.computes_loss:
            return  # a pass outside compute_loss, such as a callback's: the trainer does not use its loss
        if not current.training:
            if self.weights:
                self._silence.look_at_pass(current, inputs)
            return
        if self.balance and inputs.get("output_router_logits"):
            raise Misuse(
                "with output_router_logits=True the model adds a balance loss of its own to ours: leave it out, or set "
                "balance to 0"
            )
        items = inputs.get("num_items_in_batch")
        assert self._watch is not None
        if self._trainer is not None:
            items = self._trainer.items
        else:
            weight = next((p for p in self._watch.model.parameters() if p.requires_grad), None)
            self._silence.look_at_loop(weight, needs_step=self._needs_step, counted=items is not None)
        if self._trainer is None and inputs.get("fused_lm_head"):  # only TRL's trainers ask for it
            raise Misuse("attach to the trainer and not to its model: TRL ignores the loss that a model returns")
        by_label = self._trainer is None or items is not None
        rows = labels_of_rows(inputs, shifts_labels=self._watch.shifts_labels)
        current.share = share_of_sequences(current.batch, items, by_label=by_label, rows=rows)
        for state in self._layers:
            state.terms = {}
        if not self.firings:  # the first pass
            warn_of_full_precision(state.layer for state in self._layers)

    def _end(self, current: Pass, output: Any) -> None:
        if self._trainer is None:
            self._attempt.end()
        if current.share is not None:
            assert self._watch is not None
            self.firings = {tap.layer.name: tap.firings for tap in self._watch.taps}
            self._passes.append([state.terms for state in self._layers])
            self._once = "the model is compiled" if torch.compiler.is_compiling() else ""
            if current.selective:
                self._once = "it is checkpointed selectively"
            if isinstance(task := getattr(output, "loss", None), Tensor) and unmeasured(self):
                self._tasks.append(task)

    def _end_with_loss(self, current: Pass, output: Any) -> Any:
        self._end(current, output)
        if (total := self.total()) is None:
            return None
        if getattr(output, "loss", None) is None:
            raise Misuse(
                "AuxLosses need a loss to add to: pass labels, and do not pass return_dict=False; in a loop that "
                "computes its own loss, attach with add_to_loss=False and add aux.total() to it"
            )
        output.loss = output.loss + total
        return output

    def total(self, task: Tensor | None = None) -> Tensor | None:
        """Return the weighted sum of the losses of all passes since the last call, with its graph; None without a pass.

        `task` is the loss that the sum will be added to. Pass it if the model does not return that loss itself.
        """
        passes, self._passes = self._passes, []
        if not passes or not self.weights:
            return None
        weighted = [self._weighted(terms) for terms in passes]
        # If sequences count alike, each of several passes is an equal part of one batch.
        divisor = len(passes) if self._trainer is not None and self._trainer.items is None else 1
        parts = [torch.stack([*values.values()]) for values in weighted]
        self.weighted = dict(zip(weighted[0], (torch.stack(parts).detach().sum(0) / divisor).unbind(), strict=True))
        total = torch.stack([part.sum() for part in parts]).sum()
        self._silence.look_at_total(total)
        self._check_finite(total, passes)
        self._measure({name: sum(w[name] for w in weighted) / divisor for name in unmeasured(self)}, task)
        return total / divisor if divisor > 1 else total

    def _measure(self, terms: dict[str, Any], task: Tensor | None) -> None:
        """Measure, once, the gradient norms of losses that have units relative to the task's."""
        tasks, self._tasks = self._tasks, []
        if not terms or torch.compiler.is_compiling():
            return
        assert self._watch is not None
        task = sum(tasks[1:], tasks[0]) if task is None and tasks else task
        self.gradient_ratios |= measure(self, self._watch.model, terms, task, once=self._once)

    def _weighted(self, terms: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return each weighted loss of one pass, summed over layers and divided by the number of blocks."""
        weights, self.last, parts = self.weights, {}, {}
        for name, weight in weights.items():
            mine = [(state, term[name]) for state, term in zip(self._layers, terms, strict=True) if name in term]
            values = torch.stack([value.to(mine[0][1].device) for _, value in mine])
            scales = [state.scale(name) for state, _ in mine]
            self.last[name] = values.detach().sum() / self._blocks
            scaled = [value * scale for value, scale in zip(values.unbind(), scales, strict=True)]
            parts[name] = weight * sum(scaled[1:], scaled[0]) / self._blocks
        return parts

    def _check_finite(self, total: Tensor, passes: list[list[dict[str, Tensor]]]) -> None:
        """Raise TrainingFailed if the total is not finite. All layers share one check: reads wait for the device."""
        if torch.compiler.is_compiling() or bool(total.detach().isfinite()):
            return
        for terms in passes:
            for state, term in zip(self._layers, terms, strict=True):
                for name, value in term.items():
                    if not bool(value.isfinite()):
                        raise TrainingFailed(f"{name} is {value.item()} at {state.layer.name}")
        raise TrainingFailed("the sum of the auxiliary losses is not finite")

    @contextmanager
    def micro_batch(self, trainer: TrainerBatch) -> Iterator[None]:
        """Count the passes within the context as one micro-batch of `trainer`; ignore all other passes."""
        self._passes = []  # left by a pass whose loss was never computed
        with self._attempt.of_trainer(trainer):
            yield

    def discard(self) -> None:
        """Forget all passes since the last step: call it instead of `step` if the optimiser's step was skipped.

        A gradient scaler skips a step if a gradient is infinite, and a training loop skips one if it ran out of memory
        and repeats the batch. The discarded passes must not count in lagged statistics, biases or competition.
        """
        for state in self._layers:
            state.go_back_to(NOTHING_SEEN)
        self._passes, self._tasks = [], []
        self._attempt.end()

    def step(self) -> None:
        """Call after each optimiser step: its statistics become the lagged ones, and selection biases move."""
        if self._passes and self.weights:
            raise Misuse("with add_to_loss=False add aux.total() to the loss after each forward pass")
        if self._layers and all(state.load is None for state in self._layers):
            raise Misuse("no training pass was seen since the last step: call the model that AuxLosses are attached to")
        if self._saved_by is not None:
            warn_if_not_kept(*self._saved_by)
            self._saved_by = None
        self._silence.look_at_step()
        for state in self._layers:
            state.step()
        self.steps += 1

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed run needs, as plain numbers; selection biases always in fp32."""
        layers = {state.layer.name: state.state() for state in self._layers} or self._restored.get("layers", {})
        measured = {name: ratio for name, ratio in self.gradient_ratios.items() if math.isfinite(ratio)}
        return {"steps": self.steps, "layers": layers} | ({"gradient_ratios": measured} if measured else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`, before or after attaching, and write its selection biases into the model."""
        self._load(state, biases=True)

    def restart_from(self, state: dict[str, Any]) -> None:
        """Restore `state_dict` but leave the model's selection biases as they are, like its weights."""
        self._load(state, biases=False)

    def _load(self, state: dict[str, Any], *, biases: bool) -> None:
        """Restore `state_dict`; write its selection biases into the model only if `biases` is true."""
        if not isinstance(state, dict) or not {"steps", "layers"} <= state.keys():
            raise Misuse(f"state must be what state_dict returned, with steps and layers, got {shown(state)}")
        self._restored, self.steps = state, state["steps"]
        self.gradient_ratios = dict(state.get("gradient_ratios", {}))
        self._biases_due = biases and not self._layers
        for layer in self._layers:
            layer.load_state(state["layers"].get(layer.layer.name, {}), biases=biases)

    def _forget(self) -> None:
        self._restored, self._biases_due = self.state_dict(), False
        self._layers, self._passes, self._watch, self._trainer, self._attempt = [], [], None, None, Attempt([])
