"""The gradient of attached losses under everything that training does to a model: truth is the plain run."""

import copy
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from torch import nn
from transformers import BatchEncoding, Trainer, TrainerCallback, TrainingArguments, default_data_collator

from moestro import AuxLosses, Misuse, MoELayer, TrainingFailed, observe
from moestro.adapters import moe_layers
from test_aux_losses import assert_equal

LOSSES: dict[str, Any] = {
    "balance": 0.5,
    "orthogonality": 0.1,
    "orthogonality_form": "cosine",
    "variance": 0.5,
    "router_z": 0.1,
    "router_orthogonality": 0.3,
    "simbal": 0.01,
}
PACKAGES = ["mixtral", "deepseek_v3", "gpt_oss"]


def padded(package: str = "mixtral") -> tiny_models.TinyModel:
    return tiny_models.build(package, padded=True)


def gradients(model: nn.Module, backward: Callable[[], Any]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def attached(tiny: tiny_models.TinyModel, model: nn.Module | None = None, **options: Any) -> dict[str, torch.Tensor]:
    model = model or tiny.model

    def backward() -> None:
        with AuxLosses(**(LOSSES | options)).attach(model):
            model(**tiny.inputs).loss.backward()

    return gradients(model, backward)


def halves(tiny: tiny_models.TinyModel) -> tuple[list[dict[str, torch.Tensor]], int]:
    items = int((tiny.inputs["labels"][:, 1:] != -100).sum())
    return [{name: value[row : row + 1] for name, value in tiny.inputs.items()} for row in range(2)], items


@pytest.mark.parametrize("package", PACKAGES)
def test_checkpointing_changes_no_bit(package: str):
    tiny = padded(package)
    plain = attached(tiny)
    tiny.model.gradient_checkpointing_enable()
    assert_equal(attached(tiny), plain, 0.0)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_two_passes_before_one_backward(checkpointing: bool):
    """Each recomputed layer must find the batch of its own pass."""
    tiny = padded()
    whole = attached(tiny)
    if checkpointing:
        tiny.model.gradient_checkpointing_enable()
    parts, items = halves(tiny)

    def backward() -> None:
        with AuxLosses(**LOSSES).attach(tiny.model), torch.no_grad():
            with torch.enable_grad():
                loss = sum(tiny.model(**part, num_items_in_batch=items).loss for part in parts)
            tiny.model(**parts[0])  # a pass for metrics in between
            loss.backward()

    assert_equal(gradients(tiny.model, backward), whole)


def test_reentrant_checkpointing_is_refused():
    tiny = padded()
    tiny.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with AuxLosses(balance=1.0).attach(tiny.model), pytest.raises(Misuse, match=r'\{"use_reentrant": False\}'):
        tiny.model(**tiny.inputs)


def test_reentrant_checkpointing_by_hand_is_refused():
    tiny = padded()
    block = tiny.model.model.layers[1]
    plain = block.forward
    block.forward = lambda hidden, **rest: torch.utils.checkpoint.checkpoint(
        lambda h: plain(h, **rest), hidden, use_reentrant=True
    )
    with AuxLosses(balance=1.0).attach(tiny.model), pytest.raises(Misuse, match="reentrant"):
        tiny.model(**tiny.inputs)


def test_bf16_autocast_stays_near_fp32():
    tiny = padded()
    plain, values = {}, {}
    for dtype in (torch.float32, torch.bfloat16):
        aux = AuxLosses(**LOSSES)
        with aux.attach(tiny.model), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            tiny.model(**tiny.inputs).loss.backward()
        assert all(value.dtype == torch.float32 for value in aux.last.values())
        values[dtype] = aux.last
        plain = plain or aux.last
    for name, value in values[torch.bfloat16].items():
        assert value.item() == pytest.approx(plain[name].item(), rel=0.1), name


@pytest.mark.parametrize("over", ["sequence", "batch", "lagged"])
def test_a_default_dtype_of_float64(over: Any):
    """New tensors are float64 then, while counts of labels are float32."""
    torch.set_default_dtype(torch.float64)
    try:
        tiny = padded()
        state: dict[str, Any] = {"steps": 0, "layers": {}}
        for _ in range(2):  # the second goes on from the state of the first
            aux = AuxLosses(**LOSSES, balance_over=over, variance_over=over, scaling="relative")
            aux.load_state_dict(state)
            with aux.attach(tiny.model):
                assert attached_loss_is_finite(tiny)
                aux.step()
            state = aux.state_dict()
    finally:
        torch.set_default_dtype(torch.float32)


def attached_loss_is_finite(tiny: tiny_models.TinyModel) -> bool:
    loss = tiny.model(**tiny.inputs).loss
    loss.backward()
    return bool(loss.isfinite())


def lora(model: nn.Module, *, router: bool = True) -> nn.Module:
    peft = pytest.importorskip("peft")
    targets = ["experts.gate_up_proj", "experts.down_proj", *(["gate.weight"] if router else [])]
    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj"], target_parameters=targets, init_lora_weights=False, lora_dropout=0.0
    )
    return peft.get_peft_model(model, config)


def test_losses_reach_lora_on_router_and_experts():
    tiny = padded()
    adapted = lora(copy.deepcopy(tiny.model))

    def only(**weights: float) -> dict[str, float]:
        aux = AuxLosses(**weights)
        with aux.attach(adapted, add_to_loss=False):
            adapted(**tiny.inputs)
            seen = gradients(adapted, lambda: aux.total().backward())  # type: ignore[union-attr]
        return {name: float(g.norm()) for name, g in seen.items() if "layers.2.mlp" in name}

    # In the last layer, what a loss on outputs reaches is the experts, and what a loss on scores reaches the router.
    assert {name.split(".lora")[0].rpartition("mlp.")[2] for name, g in only(orthogonality=1.0).items() if g} == {
        "experts",
        "experts.base_layer",
    }
    assert {name.split(".lora")[0].rpartition("mlp.")[2] for name, g in only(variance=1.0).items() if g} == {"gate"}


def test_attaching_before_or_after_peft_is_the_same():
    tiny = padded()
    after = attached(tiny, lora(copy.deepcopy(tiny.model)))
    inner = copy.deepcopy(tiny.model)
    with AuxLosses(**LOSSES).attach(inner):
        adapted = lora(inner)
        before = gradients(adapted, lambda: adapted(**tiny.inputs).loss.backward())
    assert_equal(before, after, 0.0)


def test_a_frozen_router_under_variance_is_refused_with_the_target_to_add():
    adapted = lora(padded().model, router=False)
    expected = r'frozen: set requires_grad, or add target_parameters=\["mlp.gate.weight"\]'
    with pytest.raises(Misuse, match=expected), AuxLosses(variance=1.0).attach(adapted):
        pass


COMPILED = """
import sys
sys.path.insert(0, {scripts!r})
import tiny_models, torch
import torch._dynamo.utils
from moestro import AuxLosses

tiny = tiny_models.build({package!r}, padded=True)
aux = AuxLosses(**{losses!r})
def step(call):
    tiny.model.zero_grad()
    call(**tiny.inputs).loss.backward()
    aux.step()
    return [p.grad.clone() for p in tiny.model.parameters()]
with aux.attach(tiny.model):
    plain = [step(tiny.model) for _ in range(3)]
aux = AuxLosses(**{losses!r})
with aux.attach(tiny.model):
    compiled = torch.compile(tiny.model, backend="aot_eager", fullgraph=True)
    for expected in plain:
        for ours, theirs in zip(step(compiled), expected):
            assert (ours - theirs).norm() <= 1e-5 * theirs.norm().clamp_min(1e-6)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    step(compiled)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs, "compiles anew at every step"
    assert set(aux.firings.values()) == {{1}}
print("equal")
"""


@pytest.mark.slow
def test_a_compiled_model_has_the_same_gradient_and_one_graph(fresh_process: Callable[[str], str]):
    scripts = str(Path(__file__).parent.parent / "scripts")
    assert "equal" in fresh_process(COMPILED.format(scripts=scripts, package="mixtral", losses=LOSSES))


@pytest.mark.parametrize("scaling", ["weight", "relative"])
def test_accumulation_changes_nothing_over_several_steps(scaling: str):
    tiny = padded()
    parts, items = halves(tiny)
    results = []
    for batches in ([tiny.inputs], parts):
        aux = AuxLosses(**LOSSES, scaling=scaling, warmup_steps=2, balance_over="lagged")
        with aux.attach(tiny.model):
            for _ in range(3):
                tiny.model.zero_grad()
                for batch in batches:
                    tiny.model(**batch, num_items_in_batch=items).loss.backward()
                aux.step()
        results.append(({n: p.grad.clone() for n, p in tiny.model.named_parameters()}, aux.state_dict()))
    assert_equal(results[1][0], results[0][0])
    for name, state in results[0][1]["layers"].items():
        assert state.keys() == {"load", "mean", *(["scales"] if scaling == "relative" else [])}
        for statistic, values in state.items():
            assert results[1][1]["layers"][name][statistic] == pytest.approx(values, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("loss", ["router_z", "orthogonality"])
def test_relative_scaling_waits_for_a_step_in_which_a_loss_has_a_size(loss: str):
    """Every loss is 0 in a step without labels, and orthogonality where experts put out nothing yet."""
    tiny = padded()
    experts = [layer.experts for layer in moe_layers(tiny.model)]
    trained = [module.down_proj.detach().clone() for module in experts]
    first = tiny.inputs
    if loss == "orthogonality":
        for module in experts:
            torch.nn.init.zeros_(module.down_proj)
    else:
        first = first | {"labels": torch.full_like(first["labels"], -100)}
    aux = AuxLosses(balance=1.0, scaling="relative", **{loss: 1.0})
    with aux.attach(tiny.model, add_to_loss=False):
        tiny.model(**first, num_items_in_batch=20)
        aux.total()
        aux.step()
        for module, weight in zip(experts, trained, strict=True):
            module.down_proj.data.copy_(weight)
        for _ in range(2):
            tiny.model(**tiny.inputs)
            total = aux.total()
            aux.step()
    assert total is not None and aux.last[loss] > 0
    assert total.item() == pytest.approx(2 * aux.last["balance"].item(), rel=1e-5)


def test_saved_scales_belong_to_losses():
    """A resumed run may have other losses: each finds its own scale, and a new one is measured."""
    tiny = padded()
    first = AuxLosses(balance=1.0, router_z=1.0, scaling="relative")
    with first.attach(tiny.model, add_to_loss=False):
        tiny.model(**tiny.inputs)
        first.total()
        first.step()
    aux = AuxLosses(balance=1.0, orthogonality=1.0, router_z=1.0, scaling="relative")
    aux.load_state_dict(first.state_dict())
    with aux.attach(tiny.model, add_to_loss=False):
        for expected in (2.0, 3.0):
            tiny.model(**tiny.inputs)
            total = aux.total()
            aux.step()
            assert total is not None
            assert total.item() == pytest.approx(expected * aux.last["balance"].item(), rel=1e-5)


def test_a_state_that_is_none_is_refused():
    tiny, aux = padded(), AuxLosses(balance=1.0)
    for state in ({}, {"steps": 1}):
        with pytest.raises(Misuse, match="state must be what state_dict returned"):
            aux.load_state_dict(state)
    with aux.attach(tiny.model):
        tiny.model(**tiny.inputs)
        aux.step()
        state = aux.state_dict()
    name = next(iter(state["layers"]))
    for changed, match in (({"load": [0.5, 0.5]}, "for 2 experts, but it has 8"), ([], "must be a mapping")):
        state["layers"][name] = changed
        other = AuxLosses(balance=1.0)
        other.load_state_dict(state)
        with pytest.raises(Misuse, match=match), other.attach(tiny.model):
            pass


def test_a_masked_prompt_does_not_bring_padding_back():
    """Left of a row's first token stands padding that predicts it."""
    tiny = tiny_models.build("mixtral")
    mask = torch.ones_like(tiny.inputs["input_ids"])
    mask[1, :5] = 0
    tiny.inputs.update(attention_mask=mask, labels=tiny.inputs["input_ids"].masked_fill(mask == 0, -100))
    aux = AuxLosses(balance=1.0, mask_prompt=True)
    with aux.attach(tiny.model):
        tiny.model(**tiny.inputs)
        counted = aux._layers[0].load
    assert counted is not None and counted.sum() == (11 + 6) * moe_layers(tiny.model)[0].top_k


def test_relative_scaling_brings_every_loss_to_the_size_of_balance():
    tiny = padded()
    aux = AuxLosses(balance=1.0, orthogonality=1.0, router_z=1.0, scaling="relative")
    with aux.attach(tiny.model, add_to_loss=False):
        tiny.model(**tiny.inputs)
        first = aux.total()
        assert first is not None and first.item() == pytest.approx(aux.last["balance"].item())  # the others wait
        aux.step()
        tiny.model(**tiny.inputs)
        second = aux.total()
    assert second is not None and second.item() == pytest.approx(3 * aux.last["balance"].item(), rel=1e-5)


def test_warm_up_raises_orthogonality_and_variance_alone():
    aux = AuxLosses(balance=1.0, orthogonality=1.0, variance=2.0, warmup_steps=4)
    assert aux.weights == {"balance": 1.0, "orthogonality": 0.25, "variance": 0.5}
    aux.steps = 3
    assert aux.weights == {"balance": 1.0, "orthogonality": 1.0, "variance": 2.0}


def test_a_cap_takes_the_gradient_of_decided_tokens():
    tiny = padded()
    aux = AuxLosses(variance=1.0, variance_cap=1e-6)
    with aux.attach(tiny.model, add_to_loss=False):
        tiny.model(**tiny.inputs)
        total = aux.total()
        assert total is not None
        assert all(not g.any() for g in gradients(tiny.model, total.backward).values())


def test_the_prompt_can_be_masked():
    """With labels on the last tokens only, a masked prompt must not matter, whatever it routes to."""
    tiny = tiny_models.build("mixtral")
    tiny.inputs["labels"] = tiny.inputs["labels"].clone()
    tiny.inputs["labels"][:, :8] = -100
    seen = {}
    for mask in (False, True):
        aux = AuxLosses(balance=1.0, orthogonality=1.0, variance=1.0, router_z=1.0, mask_prompt=mask)
        with aux.attach(tiny.model):
            tiny.model(**tiny.inputs)
            seen[mask] = {name: float(value) for name, value in aux.last.items()}
            counted = aux._layers[0].load
        assert counted is not None
        scored = 2 * 4 if mask else 2 * 12  # labels 8 to 11 are predicted by tokens 7 to 10
        assert counted.sum() == scored * moe_layers(tiny.model)[0].top_k
    assert all(seen[True][name] != pytest.approx(seen[False][name]) for name in seen[True])


class Gradients(TrainerCallback):
    def __init__(self) -> None:
        self.seen: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.seen = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def train(
    folder: Path,
    rows: int,
    *,
    losses: dict[str, Any] = LOSSES,
    loss_func: Any = None,
    package: str = "mixtral",
    resume: Path | None = None,
    collator: Any = None,
    callbacks: Sequence[TrainerCallback] = (),
    **options: Any,
) -> tuple[dict[str, torch.Tensor], AuxLosses]:
    tiny = padded(package)
    data = [{name: value[i] for name, value in tiny.inputs.items()} for i in (0, 1)]
    seen = Gradients()
    defaults = {"max_steps": 1, "save_strategy": "no", "max_grad_norm": 0.0, "logging_strategy": "no"}
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=2 // rows,
        report_to=[],
        use_cpu=True,
        **(defaults | options),
    )
    trainer = Trainer(
        model=tiny.model,
        args=arguments,
        train_dataset=data,
        data_collator=collator,
        callbacks=[seen, *callbacks],
        compute_loss_func=loss_func,
    )
    aux = AuxLosses(**losses)
    with aux.attach(trainer):
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return seen.seen, aux


def shifted_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    logits, targets = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum") / num_items_in_batch


@pytest.mark.parametrize(
    "how", [{}, {"label_smoothing_factor": 0.1}, {"loss_func": shifted_loss}], ids=["plain", "smoothed", "own loss"]
)
def test_a_trainer_has_one_gradient_under_every_cut(tmp_path: Path, how: dict[str, Any]):
    whole, _ = train(tmp_path, 2, **how)
    parts, _ = train(tmp_path, 1, **how)
    assert_equal(parts, whole)
    without, _ = train(tmp_path, 2, losses={}, **how)
    with pytest.raises(AssertionError):
        assert_equal(without, whole, 1e-2)


@pytest.mark.parametrize("how", [{"label_smoothing_factor": 0.1}, {"loss_func": shifted_loss}])
def test_batches_may_be_any_mapping(tmp_path: Path, how: dict[str, Any]):
    """Tokenizers and collators return a BatchEncoding, which is no dict."""
    plain, _ = train(tmp_path, 2, **how)
    found, _ = train(tmp_path, 2, collator=lambda rows: BatchEncoding(default_data_collator(rows)), **how)
    assert_equal(found, plain, 0.0)


def test_labels_of_a_micro_batch_are_of_no_other_pass(tmp_path: Path):
    """A callback may run the model on tokens without labels."""
    seen = []

    class Probe(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            with torch.no_grad(), observe(model, lambda record: seen.append(record.batch.label)):
                model(input_ids=padded().inputs["input_ids"])

    train(tmp_path, 2, callbacks=[Probe()])
    assert seen and all(label is None for label in seen)


def test_model_init_is_refused(tmp_path: Path):
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    trainer = Trainer(model_init=lambda: padded().model, args=arguments)
    with pytest.raises(Misuse, match="model_init"), AuxLosses(balance=1.0).attach(trainer):
        pass


def test_a_resumed_trainer_goes_on_with_the_saved_state(tmp_path: Path):
    # Mixtral will not do: the Trainer of transformers 5.23 does not find its experts in a checkpoint, and only warns.
    options: dict[str, Any] = {"package": "gpt_oss", "lr_scheduler_type": "constant", "max_steps": 4}
    options |= {"save_strategy": "steps", "save_steps": 2}
    losses = LOSSES | {"balance_over": "lagged", "scaling": "relative", "warmup_steps": 10}
    through, aux = train(tmp_path / "through", 1, losses=losses, **options)
    expected = aux.state_dict()
    assert expected["steps"] == 4
    checkpoint = tmp_path / "through" / "checkpoint-2"
    resumed, again = train(tmp_path / "resumed", 1, losses=losses, resume=checkpoint, **options)
    assert again.state_dict() == expected
    assert_equal(resumed, through, 0.0)


def test_the_models_own_balance_loss_is_off_while_attached(caplog: Any):
    tiny = padded()
    tiny.model.config.output_router_logits = True
    with_own = tiny.model(**tiny.inputs).loss
    with caplog.at_level(logging.WARNING, "moestro"), AuxLosses(balance=1e-9).attach(tiny.model):
        without = tiny.model(**tiny.inputs).loss
        assert without < with_own
    assert "the model's own balance loss is off" in caplog.text
    torch.testing.assert_close(tiny.model(**tiny.inputs).loss, with_own)
    with AuxLosses(balance=1.0).attach(tiny.model), pytest.raises(Misuse, match="output_router_logits=True"):
        tiny.model(**tiny.inputs, output_router_logits=True)


def test_a_copy_of_an_attached_model_is_not_attached():
    tiny = padded()
    plain = tiny.model(**tiny.inputs).loss
    aux = AuxLosses(**LOSSES)
    with aux.attach(tiny.model):
        other = copy.deepcopy(tiny.model)
        assert other(**tiny.inputs).loss == plain
        assert aux.firings == {}
        assert tiny.model(**tiny.inputs).loss > plain
        for block in tiny.model.model.layers:
            torch.nn.init.zeros_(block.mlp.experts.down_proj)
        assert other(**tiny.inputs).loss == plain  # its own experts
    assert other(**tiny.inputs).loss == plain


class TinyOwn(nn.Module):
    """A model that transformers knows nothing of; its router is a plain matrix."""

    class Router(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 8))

        def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            logits = hidden @ self.weight.T
            weight, index = logits.softmax(-1).topk(2)
            return logits, weight, index

    class Chosen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = nn.Parameter(torch.randn(4, 8, 8))

        def forward(self, x: torch.Tensor, index: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return (torch.einsum("tkij,tj->tki", self.matrix[index], x) * weight[..., None]).sum(1)

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.router, self.chosen = nn.Embedding(16, 8), self.Router(), self.Chosen()

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(input_ids).flatten(0, 1)
        _, weight, index = self.router(hidden)
        return self.chosen(hidden, index, weight)


def test_layers_of_ones_own_making():
    model = TinyOwn()
    layer = MoELayer(
        name="it", block="it", router=model.router, experts=model.chosen, num_experts=4, top_k=2, scores="softmax"
    )
    aux = AuxLosses(orthogonality=1.0, variance=1.0, balance=1.0)
    records = []
    with observe(model, records.append, outputs=True, layers=[layer]):
        expected = model(torch.arange(6)[None])
    with aux.attach(model, layers=[layer], add_to_loss=False):
        torch.testing.assert_close(model(torch.arange(6)[None]), expected)
        aux.total().backward()  # type: ignore[union-attr]
    assert model.router.weight.grad is not None and model.router.weight.grad.any()
    assert model.chosen.matrix.grad is not None and model.chosen.matrix.grad.any()
    mixed = (records[0].outputs * records[0].routing.weight[..., None]).sum(1)
    torch.testing.assert_close(mixed, expected)


@pytest.mark.parametrize(
    ("losses", "package", "options", "message"),
    [
        ({"orthogonality": 1.0}, "mixtral", {"top_k": 1}, "orthogonality needs two experts per token at least"),
        ({"variance": 1.0}, "zaya", {}, "variance needs two experts per token at least, and top_k is 1"),
        ({"bias_rate": 1.0}, "mixtral", {}, "bias_rate needs a router with a selection bias: set bias_rate to 0"),
        ({"router_z": 1.0}, "gemma4", {}, "router_z needs logits, and this router returns probabilities"),
        ({"balance": 1.0}, "llama4", {}, "the experts of llama4 stand outside"),
    ],
)
def test_what_cannot_work_is_refused(losses: dict[str, float], package: str, options: dict[str, Any], message: str):
    model = tiny_models.build(package, **options).model
    with pytest.raises(Misuse, match=message), AuxLosses(**losses).attach(model):
        pass


def test_a_hash_layer_is_left_out_and_said(caplog: Any):
    tiny = tiny_models.build("deepseek_v4")
    aux = AuxLosses(balance=1.0, orthogonality=1.0)
    with caplog.at_level(logging.WARNING, "moestro"), aux.attach(tiny.model):
        tiny.model(**tiny.inputs)
    assert "balance is without effect at 1 of 3 layers: model.layers.0.mlp" in caplog.text
    assert "orthogonality" not in caplog.text


def test_a_layer_that_does_not_run_is_named():
    tiny = padded()
    block = tiny.model.model.layers[1].mlp
    block.forward = lambda hidden: hidden
    with AuxLosses(balance=1.0).attach(tiny.model), pytest.raises(Misuse, match=r"model\.layers\.1\.mlp did not run"):
        tiny.model(**tiny.inputs)


def test_nan_names_layer_and_loss():
    tiny = padded()
    with torch.no_grad():
        tiny.model.model.layers[1].mlp.experts.down_proj.fill_(float("nan"))
    aux = AuxLosses(orthogonality=1.0)
    with aux.attach(tiny.model), pytest.raises(TrainingFailed, match=r"orthogonality is nan at model\.layers\.1\.mlp"):
        tiny.model(**tiny.inputs)


def test_a_total_that_nobody_adds_and_a_step_without_a_pass_are_errors():
    tiny = padded()
    aux = AuxLosses(balance=1.0)
    with aux.attach(tiny.model, add_to_loss=False):
        with pytest.raises(Misuse, match="no training pass was seen since the last step"):
            aux.step()
        tiny.model(**tiny.inputs)
        with pytest.raises(Misuse, match=r"add aux\.total\(\) to the loss"):
            aux.step()
