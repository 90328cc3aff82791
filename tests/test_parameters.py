"""Freezing and learning rates of routers and experts, with and without LoRA, and in a Trainer."""

from pathlib import Path

import pytest
import tiny_models
import torch
from transformers import Trainer, TrainingArguments

from moestro import Misuse, freeze, parameter_groups
from moestro.adapters.parameters import parts


@pytest.mark.parametrize("package", ["mixtral", "deepseek_v3", "gpt_oss", "gemma4"])
def test_every_parameter_has_its_part(package: str):
    model = tiny_models.build(package).model
    part_of = parts(model)
    assert part_of.keys() == {name for name, _ in model.named_parameters()}
    routers = {name for name, part in part_of.items() if part == "router"}
    assert routers and all((".gate." in name or ".router." in name) and "shared" not in name for name in routers)
    experts = {name for name, part in part_of.items() if part == "experts"}
    assert experts == {name for name in part_of if ".experts." in name}


def test_frozen_parts_take_no_gradient():
    tiny = tiny_models.build("mixtral")
    freeze(tiny.model, "router", "rest")
    tiny.model(**tiny.inputs).loss.backward()
    part_of = parts(tiny.model)
    assert {part_of[name] for name, p in tiny.model.named_parameters() if p.grad is not None} == {"experts"}


def test_a_part_must_be_one_of_three(unchecked: None):
    with pytest.raises(Misuse, match="freeze knows router, experts and rest, got 'gate'"):
        freeze(tiny_models.build("mixtral").model, "gate")  # type: ignore[arg-type]


def test_groups_hold_every_trainable_parameter_once():
    model = tiny_models.build("deepseek_v3").model
    freeze(model, "rest")
    groups = parameter_groups(model, 1e-3, router=0.1, experts=2.0, weight_decay=0.5)
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    rates = {group["name"]: (group["lr"], group["weight_decay"]) for group in groups}
    assert rates == {"router, decayed": (1e-4, 0.5), "experts, decayed": (2e-3, 0.5)}
    with pytest.raises(Misuse, match="router must be at least 0, got -1"):
        parameter_groups(model, 1e-3, router=-1.0)


def test_a_trainer_steps_each_part_at_its_rate(tmp_path: Path):
    tiny = tiny_models.build("mixtral")
    before = {name: p.detach().clone() for name, p in tiny.model.named_parameters()}
    rows = [{name: value[i] for name, value in tiny.inputs.items()} for i in range(2)]
    optimizer = torch.optim.AdamW(parameter_groups(tiny.model, 1e-3, router=0.0, experts=0.1))
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        lr_scheduler_type="constant",
    )
    Trainer(model=tiny.model, args=arguments, train_dataset=rows, optimizers=(optimizer, None)).train()
    part_of = parts(tiny.model)
    moved = {"router": 0.0, "experts": 0.0, "rest": 0.0}
    for name, parameter in tiny.model.named_parameters():
        moved[part_of[name]] = max(moved[part_of[name]], float((parameter - before[name]).abs().max()))
    assert moved["router"] == 0.0
    assert moved["experts"] == pytest.approx(1e-4, rel=0.01) and moved["rest"] == pytest.approx(1e-3, rel=0.01)


def test_lora_counts_to_what_it_adapts():
    peft = pytest.importorskip("peft")
    targets = ["mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    adapted = peft.get_peft_model(
        tiny_models.build("mixtral").model,
        peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=targets),
    )
    rates = {group["name"]: group["lr"] for group in parameter_groups(adapted, 1.0, router=0.1, experts=0.2)}
    assert rates == {"router, decayed": 0.1, "experts, decayed": 0.2, "rest, decayed": 1.0}
