"""Attached to TRL's trainers: the gradient does not depend on the cut, and nothing is counted twice."""

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import IntervalStrategy, PreTrainedTokenizerFast, TrainerCallback

from moestro import AuxLosses, Misuse
from test_aux_losses import assert_equal

trl = pytest.importorskip("trl")

LOSSES: dict[str, Any] = {
    "balance": 0.5,
    "orthogonality": 0.1,
    "orthogonality_form": "cosine",
    "variance": 0.5,
    "router_z": 0.1,
    "router_orthogonality": 0.3,
}
QUIET = {"report_to": [], "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True, "use_cpu": True}
ONE_STEP = {"max_steps": 1, "max_grad_norm": 0.0, "bf16": False, "gradient_checkpointing": False, "seed": 1}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{i}": i for i in range(60)} | {"<pad>": 60, "<eos>": 61, "<unk>": 62}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def sentences(count: int, shortest: int = 3) -> list[str]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(shortest, 14, (count,), generator=generator).tolist()
    return [" ".join(f"w{i}" for i in torch.randint(0, 60, (n,), generator=generator).tolist()) for n in lengths]


class Gradients(TrainerCallback):
    """What the optimiser sees at its first step."""

    def __init__(self) -> None:
        self.seen: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.seen = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def one_step(make_trainer: Any, aux: AuxLosses | None) -> dict[str, torch.Tensor]:
    gradients = Gradients()
    trainer = make_trainer(copy.deepcopy(tiny_models.build("qwen3_moe").model), gradients)
    if aux is None:
        trainer.train()
        return gradients.seen
    with aux.attach(trainer):
        trainer.train()
    assert aux.steps == 1
    return gradients.seen


def sft(folder: Path, tokenizer: Any, rows: int, accumulation: int, **options: Any) -> Any:
    arguments = trl.SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=accumulation,
        **(QUIET | ONE_STEP | options),
    )
    data = Dataset.from_dict({"text": sentences(8)})
    return lambda model, callback: trl.SFTTrainer(
        model=model, args=arguments, train_dataset=data, processing_class=tokenizer, callbacks=[callback]
    )


def test_sft_has_one_gradient_under_every_cut(tmp_path: Path, tokenizer: Any):
    whole = one_step(sft(tmp_path, tokenizer, 8, 1), AuxLosses(**LOSSES))
    plain = one_step(sft(tmp_path, tokenizer, 8, 1, router_aux_loss_coef=0.0), None)
    with pytest.raises(AssertionError):
        assert_equal(whole, plain, 1e-2)  # the losses do reach the gradient
    for rows, accumulation in ((4, 2), (2, 4), (1, 8)):
        assert_equal(one_step(sft(tmp_path, tokenizer, rows, accumulation), AuxLosses(**LOSSES)), whole)


def test_sft_checkpointed_and_padding_free_have_the_same_gradient(tmp_path: Path, tokenizer: Any):
    whole = one_step(sft(tmp_path, tokenizer, 8, 1), AuxLosses(**LOSSES))
    checkpointed = sft(tmp_path, tokenizer, 4, 2, gradient_checkpointing=True)
    assert_equal(one_step(checkpointed, AuxLosses(**LOSSES)), whole)


def test_trls_own_balance_loss_is_off_while_attached(tmp_path: Path, tokenizer: Any, caplog: Any):
    trainer = sft(tmp_path, tokenizer, 8, 1)(tiny_models.build("qwen3_moe").model, Gradients())
    assert trainer.aux_loss_enabled and trainer.model.config.output_router_logits
    with caplog.at_level(logging.WARNING, "moestro"), AuxLosses(balance=0.1).attach(trainer):
        assert not trainer.aux_loss_enabled and not trainer.model.config.output_router_logits
    assert trainer.aux_loss_enabled and trainer.model.config.output_router_logits
    assert "TRL's own balance loss (coefficient 0.001) is off while attached" in caplog.text
    with AuxLosses(orthogonality=0.1).attach(trainer):  # nothing of it would be counted twice
        assert trainer.aux_loss_enabled


def test_a_balance_asked_of_both_is_refused(tmp_path: Path, tokenizer: Any):
    asked = sft(tmp_path, tokenizer, 8, 1, router_aux_loss_coef=0.01)
    trainer = asked(tiny_models.build("qwen3_moe").model, Gradients())
    with pytest.raises(Misuse, match=r"router_aux_loss_coef=0\.01"), AuxLosses(balance=0.1).attach(trainer):
        pass


def test_attaching_the_model_alone_is_refused(tmp_path: Path, tokenizer: Any):
    trainer = sft(tmp_path, tokenizer, 8, 1)(tiny_models.build("qwen3_moe").model, Gradients())
    with AuxLosses(variance=0.1).attach(trainer.model), pytest.raises(Misuse, match="attach to the trainer"):
        trainer.train()


def dpo(folder: Path, tokenizer: Any, rows: int, accumulation: int) -> Any:
    arguments = trl.DPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=accumulation,
        **(QUIET | ONE_STEP),
    )
    good, bad, prompts = sentences(4), sentences(8)[4:], sentences(4, shortest=10)
    good, bad = ([" " + text for text in texts] for texts in (good, bad))
    data = Dataset.from_dict({"prompt": prompts, "chosen": good, "rejected": bad})
    return lambda model, callback: trl.DPOTrainer(
        model=model,
        ref_model=copy.deepcopy(model),
        args=arguments,
        train_dataset=data,
        processing_class=tokenizer,
        callbacks=[callback],
    )


def test_dpo_has_one_gradient_under_equal_cuts(tmp_path: Path, tokenizer: Any):
    whole = one_step(dpo(tmp_path, tokenizer, 4, 1), AuxLosses(**LOSSES))
    assert_equal(one_step(dpo(tmp_path, tokenizer, 2, 2), AuxLosses(**LOSSES)), whole)
    assert_equal(one_step(dpo(tmp_path, tokenizer, 1, 4), AuxLosses(**LOSSES)), whole)


def grpo(folder: Path, tokenizer: Any, rows: int, accumulation: int) -> Any:
    arguments = trl.GRPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=accumulation,
        num_generations=2,
        max_completion_length=5,
        **(QUIET | ONE_STEP),
    )
    data = Dataset.from_dict({"prompt": sentences(4)})
    return lambda model, callback: trl.GRPOTrainer(
        model=model,
        args=arguments,
        train_dataset=data,
        processing_class=tokenizer,
        reward_funcs=lambda completions, **kwargs: [float(len(text)) for text in completions],
        callbacks=[callback],
    )


def test_grpo_has_one_gradient_under_equal_cuts(tmp_path: Path, tokenizer: Any):
    whole = one_step(grpo(tmp_path, tokenizer, 4, 1), AuxLosses(**LOSSES))
    plain = one_step(grpo(tmp_path, tokenizer, 4, 1), None)
    with pytest.raises(AssertionError):
        assert_equal(whole, plain, 1e-2)
    assert_equal(one_step(grpo(tmp_path, tokenizer, 2, 2), AuxLosses(**LOSSES)), whole)


@pytest.mark.parametrize("kind", [sft, dpo, grpo])
def test_what_is_task_and_what_is_auxiliary_is_logged_apart(kind: Any, tmp_path: Path, tokenizer: Any):
    trainer = kind(tmp_path, tokenizer, 2, 2)(copy.deepcopy(tiny_models.build("qwen3_moe").model), Gradients())
    trainer.args.logging_strategy, trainer.args.logging_steps = IntervalStrategy.STEPS, 1
    with AuxLosses(**LOSSES).attach(trainer):
        trainer.train()
    (entry,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert 0 < entry.get("aux/router_z/gradient_ratio", 1.0) < 100  # GRPO's first task has no gradient
    found = [entry[name] for name in ("loss_task", *(f"aux/{n}" for n in LOSSES if n != "orthogonality_form"))]
    assert sum(found) == pytest.approx(entry["loss"], rel=1e-4, abs=1e-6)
