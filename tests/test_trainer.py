"""Training through transformers' Trainer: one batch, however cut, has one gradient."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from agreement import SHAPES, small_config
from moestro import MoestroForCausalLM
from moestro.adapters import AuxLosses
from moestro.training.trainer import PretrainingTrainer, first_non_finite
from test_aux_losses import assert_equal, ragged_batch, tiny_model


class Rows(Dataset):
    def __init__(self, batch: dict[str, torch.Tensor], times: int) -> None:
        self.batch, self.times = batch, times

    def __len__(self) -> int:
        return len(self.batch["input_ids"]) * self.times

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: value[index % len(value)] for name, value in self.batch.items()}


class KeepGradients(TrainerCallback):
    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.steps.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


def arguments(folder: Path, rows: int, accumulation: int, **kwargs: Any) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=accumulation,
        max_steps=2,
        learning_rate=1e-3,
        max_grad_norm=0.0,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        train_sampling_strategy="sequential",
        **kwargs,
    )


def gradients_of_steps(folder: Path, rows: int, accumulation: int, aux: AuxLosses) -> list[dict[str, torch.Tensor]]:
    keep = KeepGradients()
    trainer = Trainer(
        model=tiny_model(),
        args=arguments(folder, rows, accumulation),
        train_dataset=Rows(ragged_batch(), times=2),
        callbacks=[keep],
    )
    with aux.attach(trainer):
        trainer.train()
    return keep.steps


@pytest.mark.parametrize("form", ["sequence", "lagged"])
def test_accumulation_does_not_change_the_gradient(tmp_path: Path, form: str):
    """8 rows at once, 2 x 4 and 8 x 1 (micro-batch x accumulation), two steps: the second is where a lag shows."""
    results = [
        gradients_of_steps(tmp_path, rows, 8 // rows, AuxLosses(balance=0.5, router_z=0.1, balance_over=form))
        for rows in (8, 4, 2, 1)
    ]
    for other in results[1:]:
        for step in range(2):
            # The second step starts from weights that Adam made of the first gradient's sign: rounding grows a little.
            assert_equal(other[step], results[0][step], 1e-5 if step == 0 else 1e-3)


def test_the_losses_are_really_in_that_gradient(tmp_path: Path):
    plain = gradients_of_steps(tmp_path, 8, 1, AuxLosses())
    with_aux = gradients_of_steps(tmp_path, 8, 1, AuxLosses(balance=0.5, router_z=0.1))
    name = next(n for n in plain[0] if n.endswith("router.weight"))
    assert (with_aux[0][name] - plain[0][name]).norm() > 0.1 * plain[0][name].norm()


def test_detached_trainer_is_as_before(tmp_path: Path):
    trainer = Trainer(model=tiny_model(), args=arguments(tmp_path, 8, 1), train_dataset=Rows(ragged_batch(), times=2))
    callbacks = len(trainer.callback_handler.callbacks)
    with AuxLosses(balance=0.5).attach(trainer):
        assert "compute_loss" in vars(trainer)
    assert "compute_loss" not in vars(trainer)
    assert len(trainer.callback_handler.callbacks) == callbacks


@pytest.mark.parametrize("name", ["two sub-layers, convex", "tied, untied embeddings", "biases"])
def test_matrices_alone_are_decayed(tmp_path: Path, name: str):
    """Not norms, biases (that of the convex mix among them) nor embeddings, also where these are the head's matrix."""
    model = MoestroForCausalLM(small_config(**SHAPES[name]))
    trainer = PretrainingTrainer(
        model=model,
        args=arguments(tmp_path, 8, 1, weight_decay=0.1),
        aux=AuxLosses(),
        meter=None,
        tokens_per_step=1,
        held_out=lambda step: {},
        held_out_every=1,
    )
    groups = trainer.create_optimizer().param_groups
    decay = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    assert len(decay) == sum(len(group["params"]) for group in groups)
    for path, parameter in model.named_parameters():
        is_matrix = parameter.ndim > 1 and "embed_tokens" not in path
        assert decay[id(parameter)] == (0.1 if is_matrix else 0.0), path
    assert not name.startswith("two") or any(path.endswith("mix.proj.bias") for path, _ in model.named_parameters())


def test_first_module_that_breaks_is_named():
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].feed_forward[0].experts.down_proj.fill_(float("nan"))
    assert first_non_finite(model, ragged_batch()) == "model.layers.1.feed_forward.0.experts"
