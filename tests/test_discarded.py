"""Steps that are thrown away leave nothing in what the losses know: statistics, biases, competition, the next loss."""

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from moestro import AuxLosses, Compete
from test_aux_losses import assert_equal, gradients, ragged_batch, tiny_model

KNOWING: dict[str, dict[str, Any]] = {
    "lagged balance": {"balance": 0.5, "balance_over": "lagged"},
    "lagged variance": {"variance": 0.5},
    "relative": {"balance": 0.5, "router_z": 0.1, "scaling": "relative"},
    "bias": {"bias_rate": 0.01},
    "competition": {"compete": Compete(rate=0.5), "distillation": 0.5},
}
"""Losses that know something of earlier steps."""


class OutOfMemory(nn.Linear):
    """A head for few rows; with `fails`, its number of calls that fail whatever the rows."""

    rows, fails = 4, ()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        if len(hidden) > self.rows or self.calls in self.fails:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB (as if)")
        return super().forward(hidden)


def rows() -> Dataset:
    return Dataset.from_list([{name: value.tolist() for name, value in zip(b, r, strict=True)}
                              for b in [ragged_batch(64)] for r in zip(*b.values(), strict=True)])  # fmt: skip


def model_for(losses: dict[str, Any], head: dict[str, Any] | None = None) -> nn.Module:
    model = tiny_model(scores="sigmoid" if "bias_rate" in losses else "softmax")
    if head is not None:
        model.lm_head.__class__ = type("Head", (OutOfMemory,), head)
    return model


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    quiet = {"report_to": [], "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "logging_strategy": "no"}
    return TrainingArguments(str(folder), max_steps=4, learning_rate=1e-3, **(quiet | options))


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def train(folder: Path, losses: dict[str, Any], head: dict[str, Any] | None = None, **options: Any) -> Any:
    kind, callbacks = options.pop("kind", Trainer), options.pop("callbacks", [])
    model, aux = model_for(losses, head), AuxLosses(**losses)
    trainer = kind(model, arguments(folder, **options), train_dataset=rows(), callbacks=callbacks)
    with aux.attach(trainer):
        trainer.train()
    return weights(model), aux, trainer


@pytest.mark.parametrize("name", KNOWING)
def test_attempts_that_ran_out_of_memory_do_not_count(name: str, tmp_path: Path):
    """16 rows fail, then 8 (see `auto_find_batch_size`); 4 train as if they had been asked for."""
    found, aux, trainer = train(tmp_path, KNOWING[name], {}, per_device_train_batch_size=16, auto_find_batch_size=True)
    assert trainer._train_batch_size == 4
    plain, expected, _ = train(tmp_path, KNOWING[name], per_device_train_batch_size=4)
    assert aux.state_dict() == expected.state_dict()
    assert_equal(found, plain, 0.0)


def test_an_attempt_that_fails_later_begins_anew(tmp_path: Path):
    """Its third step fails: the Trainer counts from 0 again, and so do the losses, whose statistics are of no step."""
    seen: list[dict[str, Any]] = []

    class Begin(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(aux.state_dict() | {"step": state.global_step})

    losses = KNOWING["lagged balance"]
    model, aux = model_for(losses, {"fails": (3,)}), AuxLosses(**losses)
    trainer = Trainer(
        model,
        arguments(tmp_path, per_device_train_batch_size=4, auto_find_batch_size=True),
        train_dataset=rows(),
        callbacks=[Begin()],
    )
    with aux.attach(trainer):
        trainer.train()
    assert [state["step"] for state in seen] == [0, 1, 2, 0, 1, 2, 3]
    assert [state["steps"] for state in seen] == [0, 1, 2, 0, 1, 2, 3]
    assert ["load" in next(iter(state["layers"].values())) for state in seen] == [False, True, True] + [False] + [
        True
    ] * 3


class SkipsTheSecond(TrainerCallback):
    """Makes the second step's gradient infinite, so that the gradient scaler skips it."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == 1:
            next(p for p in model.parameters() if p.grad is not None).grad.fill_(float("inf"))


class Scaling(Trainer):
    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
@pytest.mark.parametrize("name", KNOWING)
def test_a_step_that_the_gradient_scaler_skips_does_not_count(name: str, optim: str, tmp_path: Path):
    states: list[dict[str, Any]] = []

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            # A ratio of gradients is measured once and knows of no step.
            states.append({key: value for key, value in aux.state_dict().items() if key != "gradient_ratios"})

    losses = KNOWING[name]
    model, aux = model_for(losses), AuxLosses(**losses)
    options = arguments(tmp_path, per_device_train_batch_size=4, max_grad_norm=0.0, optim=optim)
    trainer = Scaling(model, options, train_dataset=rows(), callbacks=[SkipsTheSecond(), Watch()])
    with aux.attach(trainer):
        trainer.train()
    assert states[0] == states[1] and states[1] != states[2]
    assert aux.steps == 3


@pytest.mark.parametrize("name", KNOWING)
def test_a_pass_that_broke_off_in_a_loop_of_ones_own_does_not_count(name: str):
    losses = KNOWING[name]

    def two_steps(head: dict[str, Any] | None) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        torch.manual_seed(0)
        model, aux = model_for(losses, head), AuxLosses(**losses)
        with aux.attach(model):
            for _ in range(2):
                if head is not None:
                    with contextlib.suppress(torch.cuda.OutOfMemoryError):
                        model(**ragged_batch(16))
                result = gradients(model, **ragged_batch(4))
                aux.step()
        return result, aux.state_dict()

    (found, state), (plain, expected) = two_steps({}), two_steps(None)
    assert state == expected
    assert_equal(found, plain, 0.0)


def test_discard_forgets_the_whole_batch():
    """An error in the backward pass is nothing that the losses can see."""
    model, aux = tiny_model(), AuxLosses(balance=0.5, balance_over="lagged", variance=0.5)
    with aux.attach(model):
        model(**ragged_batch(8))
        aux.discard()
        model(**ragged_batch(4))
        aux.step()
        state = aux.state_dict()
    fresh, other = tiny_model(), AuxLosses(balance=0.5, balance_over="lagged", variance=0.5)
    with other.attach(fresh):
        fresh(**ragged_batch(4))
        other.step()
    assert state == other.state_dict()


def test_a_step_without_a_token_that_counts_leaves_statistics_as_they_were():
    """Every prompt is masked, and the step has nothing but prompts."""
    for seen in (True, False):
        aux, model = AuxLosses(balance=0.5, balance_over="lagged", variance=0.5, mask_prompt=True), tiny_model()
        with aux.attach(model):
            if seen:
                model(**ragged_batch(4))
                aux.step()
            before = aux.state_dict()["layers"]
            batch = ragged_batch(4)
            model(**batch | {"labels": torch.full_like(batch["labels"], -100)}, num_items_in_batch=8)
            aux.step()
            for name, state in aux.state_dict()["layers"].items():
                uniform = [1 / len(state["load"])] * len(state["load"])
                expected = before[name] if seen else {"load": uniform, "mean": uniform}
                assert state == {key: pytest.approx(value) for key, value in expected.items()}


class GoesOn(Trainer):
    """A trainer of somebody's own: a micro-batch that runs out of memory is left out."""

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        try:
            return super().training_step(*args, **kwargs)
        except torch.cuda.OutOfMemoryError:
            return torch.zeros(())


class LeavesOut(Trainer):
    """Leaves the same micro-batch out before it runs."""

    calls = 0

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.calls += 1
        return torch.zeros(()) if self.calls == 2 else super().training_step(*args, **kwargs)


@pytest.mark.parametrize("name", KNOWING)
def test_a_micro_batch_that_is_left_out_does_not_count(name: str, tmp_path: Path):
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    found, aux, _ = train(tmp_path, KNOWING[name], {"fails": (2,)}, kind=GoesOn, **options)
    plain, expected, _ = train(tmp_path, KNOWING[name], kind=LeavesOut, **options)
    assert aux.state_dict() == expected.state_dict()
    assert_equal(found, plain, 0.0)


class Probes(TrainerCallback):
    """Runs the model in training mode and with gradients at every event, for something of its own."""

    def probe(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        model(**ragged_batch(3)).loss.backward()
        model.zero_grad()

    on_step_begin = on_step_end = on_optimizer_step = probe


@pytest.mark.parametrize("name", KNOWING)
def test_passes_outside_the_trainers_loss_do_not_count(name: str, tmp_path: Path):
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    found, aux, _ = train(tmp_path, KNOWING[name], callbacks=[Probes()], **options)
    plain, expected, _ = train(tmp_path, KNOWING[name], **options)
    assert aux.state_dict() == expected.state_dict()
    assert_equal(found, plain, 0.0)


def test_training_twice_goes_on(tmp_path: Path):
    """Training that ended is not thrown away: a second call goes on from its statistics."""
    losses = KNOWING["lagged balance"]
    model, aux = model_for(losses), AuxLosses(**losses)
    trainer = Trainer(model, arguments(tmp_path, per_device_train_batch_size=4), train_dataset=rows())
    with aux.attach(trainer):
        trainer.train()
        assert aux.steps == 4
        trainer.train()
    assert aux.steps == 8
