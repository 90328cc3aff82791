"""Selection biases that `bias_rate` moves: at the speed it says in any precision, and with every save of the model."""

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

from moestro import AuxLosses, Misuse, MoELayer, observe
from moestro.adapters import moe_layers
from moestro.adapters.selection_bias import SelectionBias
from test_aux_losses import ragged_batch, tiny_model

LOW = [torch.bfloat16, torch.float16, torch.float8_e4m3fn]


class Holder(nn.Module):
    def __init__(self, bias: torch.Tensor) -> None:
        super().__init__()
        self.bias = nn.Buffer(bias)


def layer_with(bias: torch.Tensor, num_experts: int = 4) -> MoELayer:
    holder = Holder(bias)
    return MoELayer(
        name="layer", block="block", router=holder, experts=holder, num_experts=num_experts, top_k=1,
        bias_at=(holder, "bias"),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *LOW])
def test_small_steps_add_up(dtype: torch.dtype):
    """100 steps of 0.001 on biases of real size (7 to 35 in published checkpoints): 0.1, whatever holds them."""
    layer = layer_with(torch.full((1, 5), 8.0, dtype=dtype))
    bias = SelectionBias(layer)
    for _ in range(100):
        bias.move(torch.tensor([0.0, 0.0, 4.0, 2.0]), 1e-3)
    assert bias.master is not None
    expected = torch.tensor([8.1, 8.1, 7.9, 7.9])
    torch.testing.assert_close(bias.master.float(), expected, rtol=0, atol=1e-4)
    assert layer.selection_bias is not None and layer.selection_bias.dtype == dtype
    assert torch.equal(layer.selection_bias[0, :4], bias.master.to(dtype))
    assert layer.selection_bias[0, 4].float() == 8.0  # Zaya's entry for skipping a layer


def loads(model: nn.Module, **inputs: torch.Tensor) -> dict[str, list[int]]:
    """Choices of each expert at every layer, counted one by one."""
    counts: dict[str, list[int]] = {}

    def count(record: Any) -> None:
        counts[record.layer.name] = own = [0] * record.layer.num_experts
        for experts in record.routing.expert.tolist():
            for expert in experts:
                own[expert] += 1

    with observe(model, count):
        model(**inputs)
    return counts


@pytest.mark.parametrize("package", ["minimax_m2", "afmoe", "kimi_linear", "laguna", "ernie4_5_moe"])
def test_biases_of_bf16_models_move(package: str):
    tiny = tiny_models.build(package)
    model = tiny.model.to(torch.bfloat16).train()
    layers = [layer for layer in moe_layers(model) if layer.selection_bias is not None]
    expected = {}
    for layer in layers:
        layer.selection_bias.data.fill_(8.0)  # type: ignore[union-attr]
        expected[layer.name] = torch.full((layer.num_experts,), 8.0)
    aux = AuxLosses(bias_rate=0.01)
    with aux.attach(model):
        for _ in range(8):
            for name, load in loads(model, **tiny.inputs).items():
                if name in expected:
                    mean = sum(load) / len(load)
                    expected[name] += torch.tensor([0.01 * ((mean > n) - (mean < n)) for n in load])
            aux.step()
    for layer in layers:
        master = torch.tensor(aux.state_dict()["layers"][layer.name]["bias"])
        torch.testing.assert_close(master, expected[layer.name])
        assert layer.selection_bias is not None and layer.selection_bias.dtype == torch.bfloat16
        assert torch.equal(layer.selection_bias.view(-1)[: len(master)], master.bfloat16())
        assert not layer.selection_bias.eq(8.0).all()


def steps(model: nn.Module, aux: AuxLosses, number: int) -> None:
    for _ in range(number):
        model(**ragged_batch())
        aux.step()


def biases(model: nn.Module) -> torch.Tensor:
    return torch.cat([layer.selection_bias.view(-1) for layer in moe_layers(model)])  # type: ignore[union-attr]


def bf16_model() -> nn.Module:
    model = tiny_model(scores="sigmoid")
    for layer in moe_layers(model):
        assert layer.selection_bias is not None
        layer.selection_bias.fill_(2.0)
    return model.to(torch.bfloat16)


def test_a_resumed_run_goes_on_from_what_was_not_yet_seen_in_the_model():
    whole = AuxLosses(bias_rate=1e-3)
    unbroken = bf16_model()
    with whole.attach(unbroken):
        steps(unbroken, whole, 12)
    first, model = AuxLosses(bias_rate=1e-3), bf16_model()
    with first.attach(model):
        steps(model, first, 5)
        saved = json.loads(json.dumps(first.state_dict()))
    again, resumed = AuxLosses(bias_rate=1e-3), bf16_model()
    resumed.load_state_dict(model.state_dict())
    with again.attach(resumed):
        again.load_state_dict(saved)
        steps(resumed, again, 7)
    assert again.state_dict() == whole.state_dict()
    assert torch.equal(biases(resumed), biases(unbroken))
    assert any(value % 2**-6 for layer in saved["layers"].values() for value in layer["bias"])


@pytest.mark.parametrize("before", [True, False])
def test_loading_the_state_gives_a_model_its_biases(before: bool):
    """A base model under LoRA comes without them."""
    model, aux = tiny_model(scores="sigmoid"), AuxLosses(bias_rate=0.1)
    with aux.attach(model):
        steps(model, aux, 3)
    fresh, again = tiny_model(scores="sigmoid"), AuxLosses(bias_rate=0.1)
    if before:
        again.load_state_dict(aux.state_dict())
    with again.attach(fresh):
        if not before:
            again.load_state_dict(aux.state_dict())
        assert biases(fresh).any() and torch.equal(biases(fresh), biases(model))


def test_biases_changed_by_others_count():
    """A precision taken on after attaching loses nothing; a checkpoint loaded after attaching is not written over."""
    model, aux = tiny_model(scores="sigmoid"), AuxLosses(bias_rate=1e-3)
    with aux.attach(model):
        steps(model, aux, 1)
        model.to(torch.bfloat16)
        before = aux.state_dict()["layers"]
        steps(model, aux, 1)
        after = aux.state_dict()["layers"]
        for name, layer in before.items():
            for old, new in zip(layer["bias"], after[name]["bias"], strict=True):
                assert min(abs(new - old - step) for step in (-1e-3, 0.0, 1e-3)) < 1e-9
        for layer in moe_layers(model):
            layer.selection_bias[:2] = 5.0  # type: ignore[index]
        steps(model, aux, 1)
        assert all(
            abs(value - 5.0) < 2e-3 for layer in aux.state_dict()["layers"].values() for value in layer["bias"][:2]
        )
    for layer in moe_layers(model):
        layer.selection_bias.fill_(7.0)  # type: ignore[union-attr]
    with aux.attach(model):  # the state of these losses, not one that was loaded
        assert biases(model).eq(7.0).all()


def test_an_offloaded_bias_is_refused():
    layer = layer_with(torch.zeros(4))
    layer.router.to("meta")
    with pytest.raises(Misuse, match="of layer: it is offloaded"):
        SelectionBias(layer).move(torch.arange(4.0), 1e-3)


def base_and_rows(folder: Path) -> list[dict[str, Any]]:
    tiny_models.build("deepseek_v3").model.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(3, tiny_models.VOCABULARY, (32, 12), generator=generator).tolist()
    return [{"input_ids": row, "labels": row} for row in rows]


def adapted(folder: Path, **config: Any) -> PeftModel:
    torch.manual_seed(1)
    model = type(tiny_models.build("deepseek_v3").model).from_pretrained(folder)
    return get_peft_model(model, LoraConfig(**({"target_modules": ["q_a_proj"], "r": 4} | config)))


def trained(model: PeftModel, rows: list[dict[str, Any]], out: Path, **train: Any) -> PeftModel:
    arguments = TrainingArguments(
        str(out), max_steps=8, save_steps=4, report_to=[], use_cpu=True, disable_tqdm=True, logging_strategy="no"
    )
    trainer = Trainer(model, arguments, train_dataset=Dataset.from_list(rows))
    with AuxLosses(bias_rate=0.02, router_z=1e-9).attach(trainer):
        trainer.train(**train)
    return model.eval()


def reloaded(base: Path, adapter: Path) -> PeftModel:
    plain = type(tiny_models.build("deepseek_v3").model).from_pretrained(base)
    return PeftModel.from_pretrained(plain, adapter).eval()


def same(one: nn.Module, other: nn.Module, rows: list[dict[str, Any]]) -> bool:
    ids = torch.tensor([row["input_ids"] for row in rows[:4]])
    with torch.no_grad():
        return torch.equal(one(ids).logits, other(ids).logits)


def test_an_adapter_holds_the_biases(tmp_path: Path):
    """Reloaded, resumed, copied and merged it gives the logits of the trained model, to the bit."""
    rows = base_and_rows(tmp_path / "base")
    model = trained(adapted(tmp_path / "base"), rows, tmp_path / "out")
    assert biases(model).any() and not same(model, adapted(tmp_path / "base").eval(), rows)
    model.save_pretrained(tmp_path / "adapter")
    assert same(reloaded(tmp_path / "base", tmp_path / "adapter"), model, rows)
    assert same(reloaded(tmp_path / "base", tmp_path / "out" / "checkpoint-8"), model, rows)
    out = tmp_path / "out"
    resumed = trained(adapted(tmp_path / "base"), rows, out, resume_from_checkpoint=str(out / "checkpoint-4"))
    assert torch.equal(biases(resumed), biases(model)) and same(resumed, model, rows)
    twin = copy.deepcopy(model)
    for layer in moe_layers(twin):
        layer.selection_bias.fill_(0.5)  # type: ignore[union-attr]
    twin.save_pretrained(tmp_path / "twin")
    assert biases(reloaded(tmp_path / "base", tmp_path / "twin")).eq(0.5).all()
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    whole = type(merged).from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(biases(whole), biases(merged))
    assert not list(tmp_path.rglob("*.unfinished"))


def test_a_named_adapter_and_one_on_the_router_hold_them_too(tmp_path: Path):
    rows = base_and_rows(tmp_path / "base")
    model = type(tiny_models.build("deepseek_v3").model).from_pretrained(tmp_path / "base")
    config = LoraConfig(target_modules=["q_a_proj"], target_parameters=["gate.weight"], r=4)
    model = trained(get_peft_model(model, config, adapter_name="mine"), rows, tmp_path / "out")
    model.save_pretrained(tmp_path / "adapter")
    assert same(reloaded(tmp_path / "base", tmp_path / "adapter" / "mine"), model, rows)


def test_an_adapter_that_cannot_hold_them_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    base_and_rows(tmp_path / "base")
    model, aux = adapted(tmp_path / "base").train(), AuxLosses(bias_rate=0.02)
    ids = torch.randint(3, tiny_models.VOCABULARY, (2, 12))
    with caplog.at_level(logging.WARNING, logger="moestro"):
        with aux.attach(model.get_base_model()):
            model(input_ids=ids, labels=ids)
            aux.step()
        assert "attach to the PEFT model itself" in caplog.text
        caplog.clear()
        with aux.attach(model):
            model(input_ids=ids, labels=ids)
            aux.step()
        assert caplog.text == ""


def test_a_whole_model_is_saved_as_ever(tmp_path: Path):
    model: PreTrainedModel = tiny_models.build("deepseek_v3").model.train()
    with AuxLosses(bias_rate=0.02).attach(model):
        pass
    assert "save_pretrained" not in vars(model)


@pytest.mark.parametrize("own_router_first", [False, True])
def test_adapters_of_which_one_has_its_own_router(tmp_path: Path, own_router_first: bool):
    """An adapter without a copy of the router is saved with the base model's biases, the other with its copy's."""
    rows = base_and_rows(tmp_path / "base")
    ids = torch.tensor(rows[0]["input_ids"])[None]
    model = adapted(tmp_path / "base", init_lora_weights=False)
    aux = AuxLosses(bias_rate=0.02)
    if not own_router_first:
        with aux.attach(model.train()):
            model(input_ids=ids, labels=ids)
            aux.step()
    other = LoraConfig(target_modules=["q_a_proj"], r=4, modules_to_save=["gate"], init_lora_weights=False)
    model.add_adapter("other", other)  # wraps the routers
    for name in ("other", "default"):
        model.set_adapter(name)
        with aux.attach(model.train()):
            model(input_ids=ids, labels=ids)
            aux.step()
    model.eval().save_pretrained(tmp_path / "adapters")
    for name, folder in (("default", "."), ("other", "other")):
        model.set_adapter(name)
        again = reloaded(tmp_path / "base", tmp_path / "adapters" / folder)
        assert biases(again).any() and torch.equal(biases(again), biases(model))
        assert same(again, model, rows)
