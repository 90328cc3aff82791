"""transformers' Trainer with four additions: losses apart, a stop at the first NaN, trusted checkpoints, good manners.

Everything else (accumulation, data parallelism, mixed precision, optimiser, `report_to`) is the Trainer's own.
"""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from moestro.adapters import AuxLosses
from moestro.adapters.load_meter import LoadMeter
from moestro.adapters.loss_log import TASK
from moestro.errors import Diverged, TrainingFailed
from moestro.gate.writing import failures_as_os_errors
from moestro.training.checkpoints import last_complete, mark_complete, refuse_non_finite
from moestro.training.ranks import any_rank, on_first_rank, together


class PretrainingTrainer(Trainer):
    """The Trainer that `moestro train` uses.

    It logs the language-model loss without auxiliary losses (those apart), tokens per second over training steps alone,
    and the load violation of the layers; raises Diverged at the first loss that is not finite; and marks its
    checkpoints complete when everything is on disk.
    """

    def __init__(
        self,
        *args: Any,
        aux: AuxLosses,
        meter: LoadMeter | None,
        tokens_per_step: int,
        held_out: Callable[[int], dict[str, float]],
        held_out_every: int,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.aux, self.meter, self.tokens_per_step = aux, meter, tokens_per_step
        self.held_out, self.held_out_every = held_out, held_out_every
        self.step_seconds: list[float] = []
        self._task_loss: list[Tensor] = []
        self._logged_steps = 0
        self.add_callback(StepClock(self.step_seconds))

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Matrices alone: transformers leaves out norms and biases, but not embeddings."""
        embeddings = {f"{name}.weight" for name, part in model.named_modules() if isinstance(part, nn.Embedding)}
        return [name for name in super().get_decay_parameter_names(model) if name not in embeddings]

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The language-model loss, remembered for the log."""
        result = super().compute_loss(model, inputs, *args, **kwargs)
        self._task_loss.append((result[0] if isinstance(result, tuple) else result).detach())
        return result

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """One micro-batch, forward and backward; refuses to go on from a loss that is not finite."""
        try:
            loss = super().training_step(model, inputs, *args, **kwargs)
        except TrainingFailed as error:  # an auxiliary loss that is not finite
            raise self._diverged(model, inputs, float("nan"), str(error)) from None
        if any_rank(not bool(loss.isfinite())):
            together(lambda: self._refuse_non_finite(model, inputs, loss))
        self.state.num_input_tokens_seen += inputs["input_ids"].numel() * self.args.world_size
        return loss

    def _refuse_non_finite(self, model: nn.Module, inputs: Any, loss: Tensor) -> None:
        if not bool(loss.isfinite()):
            raise self._diverged(model, inputs, loss.item(), "the loss itself")

    def _diverged(self, model: nn.Module, inputs: Any, loss: float, otherwise: str) -> Diverged:
        # Unwrapped: all ranks would have to join a pass through the data-parallel wrapper.
        layer = first_non_finite(self.accelerator.unwrap_model(model), self._prepare_inputs(inputs)) or otherwise
        good, _ = last_complete(Path(self.args.output_dir))  # type: ignore[arg-type]
        where = f"the last good checkpoint is {good}" if good else "there is no checkpoint yet"
        step = self.state.global_step + 1
        said = f"the loss is {loss} at step {step}, first in {layer}; {where}; try a lower learning_rate"
        return Diverged(said, step=step)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what a mixture-of-experts run is watched by."""
        if "loss" in logs and self._task_loss:
            logs = self._with_routing(logs)
        super().log(logs, start_time)

    def _with_routing(self, logs: dict[str, float]) -> dict[str, float]:
        # Micro-batches and ranks each hold their share of a step's loss; ranks also multiply it by their number.
        total = torch.stack(self._task_loss).sum()
        if dist.is_initialized():
            dist.all_reduce(total, op=dist.ReduceOp.AVG if dist.get_backend() == "nccl" else dist.ReduceOp.SUM)
            total = total if dist.get_backend() == "nccl" else total / dist.get_world_size()
        steps = self.state.global_step - self._logged_steps
        logs.pop(TASK, None)  # the same as `loss` below
        added = {"objective": logs["loss"], "loss": float(total) / steps, "tokens": self.tokens_seen}
        added["tokens_per_second"] = self.tokens_per_second()
        if self.meter is not None:
            loads = self.meter.loads()
            # Over all batches together: the figure per batch grows as micro-batches, or the rows of a rank, shrink.
            added["max_vio"] = max((load.max_vio_data for load in loads.values()), default=0.0)
            added["dead_experts"] = sum(load.dead_experts for load in loads.values())
            added |= {f"competing/{layer}": load.competing for layer, load in loads.items() if load.competing}
            self.meter.reset()
        step = self.state.global_step
        self._task_loss, self._logged_steps = [], step
        if step % self.held_out_every == 0 or step == self.state.max_steps:
            added |= self.held_out(step)
        return logs | added

    @property
    def tokens_seen(self) -> int:
        """Training tokens seen so far. They are counted, because the last batch of an epoch may be smaller."""
        return self.state.num_input_tokens_seen

    def tokens_per_second(self) -> float:
        """By the median training step since the start (or resume), the first two left out."""
        seconds = sorted(self.step_seconds[2:] or self.step_seconds)
        return self.tokens_per_step / seconds[len(seconds) // 2] if seconds else 0.0

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        assert self.model is not None and self.args.output_dir is not None
        refuse_non_finite(self.model, self.state.global_step)
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"

        def save() -> None:
            with failures_as_os_errors(folder):
                super(PretrainingTrainer, self)._save_checkpoint(model, trial)

        together(save)  # every rank writes a file of its own
        on_first_rank(lambda: mark_complete(folder))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)
        self._logged_steps = int(Path(resume_from_checkpoint).name.rpartition("-")[2])

    def restore(self, checkpoint: Path) -> None:
        """Load the weights and trainer state of a checkpoint of the last step."""
        self._load_from_checkpoint(str(checkpoint))
        self.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))


class StepClock(TrainerCallback):
    """Times training steps alone (evaluation, checkpoints and logging in between do not count), and logs the last."""

    def __init__(self, seconds: list[float]) -> None:
        self.seconds = seconds
        self.start = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self.start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop the clock, and request a log after the last step."""
        self.seconds.append(time.perf_counter() - self.start)
        control.should_log |= state.global_step == state.max_steps


class Interruption(TrainerCallback):
    """Ctrl-C (or SIGTERM) ends the run after the current step, with a checkpoint; a second one ends it at once."""

    def __init__(self) -> None:
        self.requested = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take over both signals until the context ends."""
        before = {s: signal.signal(s, self._request) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _request(self, number: int, frame: Any) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop all ranks after the same step if any rank was asked to stop."""
        self.requested = any_rank(self.requested)
        if self.requested and state.global_step < state.max_steps:
            control.should_log = control.should_save = control.should_training_stop = True


@torch.no_grad()
def first_non_finite(model: nn.Module, inputs: Any) -> str | None:
    """Name of the first module whose output is not finite when the inputs are run again; None where all are."""
    found: list[str] = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            tensors = [output] if isinstance(output, Tensor) else list(output) if isinstance(output, tuple) else []
            floats = [t for t in tensors if isinstance(t, Tensor) and t.is_floating_point()]
            if not found and any(not bool(t.isfinite().all()) for t in floats):
                found.append(name)

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None
