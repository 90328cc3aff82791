"""Attaching to a trainer: the Trainer of transformers, and TRL's, which are ones."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from moestro.adapters.batch import TrainerBatch
from moestro.adapters.loss_log import LossLog
from moestro.adapters.watch import DATA_PARALLEL
from moestro.errors import Misuse
from moestro.routing import MoELayer

if TYPE_CHECKING:
    from moestro.adapters.aux_losses import AuxLosses

logger = logging.getLogger(__name__)


@contextmanager
def to_trainer(aux: "AuxLosses", trainer: Trainer, layers: Sequence[MoELayer] | None) -> Iterator[None]:
    """Wrap the trainer's `compute_loss`, which all trainers share, and its `log` until the context ends."""
    assert trainer.model is not None
    if trainer.args.n_gpu > 1:  # the Trainer then wraps the model when it begins to train
        raise Misuse(DATA_PARALLEL)
    if trainer.model_init is not None:
        raise Misuse("with model_init the Trainer makes another model when it begins to train: pass it model instead")
    batch, apart = TrainerBatch(), LossLog()
    log = trainer.log
    original: Any = trainer.compute_loss  # its inputs are any mapping, not only a dict
    own = {name: trainer.__dict__[name] for name in ("compute_loss", "log") if name in trainer.__dict__}

    def compute_loss(
        model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        # TRL keeps the item count from the model, label smoothing the labels: the description of the batch needs both.
        given: Mapping[str, Any] = inputs if isinstance(inputs, Mapping) else {}  # a BatchEncoding is no dict
        withheld = {name: given[name] for name in ("labels", "shift_labels") if name in given}
        scaled = is_scaled(trainer, num_items_in_batch)
        watching.withheld, batch.items = withheld, num_items_in_batch if scaled else None
        with aux.micro_batch(batch), ExitStack() as after:
            after.callback(withheld.clear)  # passes outside of this have labels of their own
            result = original(model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)
        task, *rest = result if isinstance(result, tuple) else (result,)
        known = set(aux.gradient_ratios)
        if (total := aux.total(task / as_added(torch.ones_like(task), trainer, batch, scaled=scaled))) is None:
            if aux.weights and model.training and torch.is_grad_enabled():
                raise Misuse("the model's passes go unseen: attach before torch.compile, not after it")
            return result
        apart.note({name: ratio for name, ratio in aux.gradient_ratios.items() if name not in known})
        terms = {name: as_added(value, trainer, batch, scaled=scaled) for name, value in aux.weighted.items()}
        apart.add(task, terms, 1 if scaled else trainer.current_gradient_accumulation_steps)
        task = task + as_added(total, trainer, batch, scaled=scaled)
        return (task, *rest) if rest else task

    def log_apart(logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs |= apart.figures(trainer.state.global_step)
        log(logs, *args, **kwargs)

    class AuxLossesState(State):
        # Class attributes, because the Trainer may create a new instance when it resumes.
        losses, accelerator, log = aux, trainer.accelerator, apart

    with ExitStack() as stack:
        if aux.balance:
            stack.enter_context(trl_balance_off(trainer))
        model = trainer.accelerator.unwrap_model(trainer.model)
        watching = stack.enter_context(aux.to_model(model, layers, trainer=batch))
        trainer.compute_loss, trainer.log = compute_loss, log_apart  # type: ignore[method-assign]
        trainer.add_callback(AuxLossesState)
        try:
            yield
        finally:
            trainer.remove_callback(AuxLossesState)
            del trainer.compute_loss, trainer.log
            trainer.__dict__.update(own)


def as_added(loss: Tensor, trainer: Trainer, batch: TrainerBatch, *, scaled: bool) -> Tensor:
    """Scale an auxiliary loss as the trainer scales its own, so that the two can be added."""
    if batch.items is None and scaled:  # the loss is divided already (GRPO), so ours is not divided after this
        return loss / trainer.current_gradient_accumulation_steps
    if batch.items is not None and trainer.args.average_tokens_across_devices:
        # The Trainer multiplies its loss by the number of ranks, because gradients are averaged over them.
        return loss * (trainer.accelerator.num_processes // trainer.get_tp_size())
    return loss


def is_scaled(trainer: Trainer, items: Any) -> bool:
    """Whether the trainer leaves what `compute_loss` returns undivided by the accumulation steps, as it decides it."""
    if trainer.loss_is_scaled_for_ga is not None:
        return trainer.loss_is_scaled_for_ga
    return (trainer.model_accepts_loss_kwargs and items is not None) or trainer.compute_loss_func is not None


@contextmanager
def trl_balance_off(trainer: Any) -> Iterator[None]:
    """Let TRL not add the model's own balance loss until the context ends; refuse where its user asked for it."""
    if not getattr(trainer, "aux_loss_enabled", False):
        yield
        return
    if asked := getattr(trainer.args, "router_aux_loss_coef", None):
        raise Misuse(f"router_aux_loss_coef={asked} and a balance would both balance the load: set one of them to 0")
    logger.warning("TRL's own balance loss (coefficient %s) is off while attached", trainer.router_aux_loss_coef)
    trainer.aux_loss_enabled = False
    try:
        yield
    finally:
        trainer.aux_loss_enabled = True


class State(TrainerCallback, ExportableState):
    """Steps the losses with the optimiser, and keeps their state in the trainer's checkpoints (trainer_state.json)."""

    losses: "AuxLosses"
    accelerator: Accelerator
    log: LossLog
    scale = 0.0
    """The gradient scaler's factor before the optimiser's step."""
    begun: dict[str, Any] | None = None
    """State of the losses when the current training began; None if no training is in progress."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record the gradient scaler's factor, which decreases if the step is skipped."""
        if (scaler := self.accelerator.scaler) is not None:
            self.scale = scaler.get_scale()

    def skipped(self) -> bool:
        """Return whether the optimiser's last step was skipped. accelerate does not notice it with a fused Adam."""
        scaler = self.accelerator.scaler
        return self.accelerator.optimizer_step_was_skipped or (scaler is not None and scaler.get_scale() < self.scale)

    def state(self) -> dict[str, Any]:
        """What transformers saves."""
        return {"args": {}, "attributes": self.losses.state_dict()}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Restore the state that was saved with the checkpoint if training resumes from one.

        If training starts again after a failed attempt (out of memory, with `auto_find_batch_size`), discard the steps
        of that attempt, as the Trainer does. Selection biases stay, like weights.
        """
        self.losses.discard()
        self.log.begin(state.global_step)
        saved = (state.stateful_callbacks or {}).get(type(self).__name__)
        resumed = state.global_step > 0 and isinstance(saved, dict) and "layers" in saved["attributes"]
        if resumed:
            self.losses.load_state_dict(saved["attributes"])
        elif type(self).begun is not None:
            self.losses.restart_from(type(self).begun)
        type(self).begun = self.losses.state_dict()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the current state as the start of any further training."""
        type(self).begun = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Discard passes that ran between steps."""
        self.losses.discard()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Step the losses; discard the passes if a gradient scaler skipped the step (infinite gradients)."""
        if self.skipped():
            self.losses.discard()
        else:
            self.losses.step()
