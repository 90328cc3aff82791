"""The tiny models: one of every package with routed experts builds, runs, and trains its routers."""

from typing import Any

import pytest
import tiny_models
import torch
from torch import nn

INSIDE = [package for package in tiny_models.packages() if package not in tiny_models.OUTSIDE]


def backward(tiny: tiny_models.TinyModel) -> torch.Tensor:
    output = tiny.model(**tiny.inputs)
    loss = output.loss if "labels" in tiny.inputs else output.logits.square().mean()
    loss.backward()
    return loss


def routing_of(model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[int, nn.Module]]:
    """Filled by the next forward: the indices each experts module is given, and who put out the tensor of an id."""
    given: dict[str, torch.Tensor] = {}
    sources: dict[int, nn.Module] = {}

    def note_experts(name: str) -> Any:
        return lambda module, arguments: given.__setitem__(name, arguments[1])

    def note_source(module: nn.Module, arguments: tuple, output: Any) -> None:
        if isinstance(output, tuple):
            sources.update({id(item): module for item in output if isinstance(item, torch.Tensor)})

    for name, module in model.named_modules():
        if hasattr(module, "_is_expert_parallel"):
            module.register_forward_pre_hook(note_experts(name))
        elif name:
            module.register_forward_hook(note_source)
    return given, sources


@pytest.mark.parametrize("package", INSIDE)
def test_a_package_on_the_experts_interface_runs_and_trains_its_routers(package: str) -> None:
    tiny = tiny_models.build(package)
    given, sources = routing_of(tiny.model)
    assert backward(tiny).isfinite()
    assert len(given) >= 2
    for name, indices in given.items():
        experts, router = tiny.model.get_submodule(name), sources[id(indices)]
        learnt = [p for m in (experts, router) for p in m.parameters() if p.requires_grad]
        assert all(p.grad is not None and p.grad.isfinite().all() for p in learnt), name
        assert any(p.grad.any() for p in router.parameters() if p.grad is not None), name
        assert any(p.grad.any() for p in experts.parameters() if p.grad is not None), name
        assert indices.shape[0] == tiny_models.ROWS * tiny_models.LENGTH
        assert indices.shape[1] >= 2 or tiny_models.SINGLE in tiny.note


@pytest.mark.parametrize("package", tiny_models.OUTSIDE)
def test_a_package_outside_the_interface_runs_and_trains_its_routers(package: str) -> None:
    tiny = tiny_models.build(package)
    assert backward(tiny).isfinite()
    routers = [p for n, p in tiny.model.named_parameters() if ".router" in n or ".gate.weight" in n]
    assert len(routers) >= 2 and all(p.grad is not None and p.grad.any() for p in routers)


def test_the_same_seed_gives_the_same_model_and_batch() -> None:
    first, again, other = (tiny_models.build("deepseek_v3", seed=seed) for seed in (3, 3, 4))
    assert all(p.equal(q) for p, q in zip(first.model.parameters(), again.model.parameters(), strict=True))
    assert all(first.inputs[name].equal(again.inputs[name]) for name in first.inputs)
    assert not first.inputs["input_ids"].equal(other.inputs["input_ids"])


@pytest.mark.parametrize("package", ["mixtral", "ernie4_5_moe", "gemma4", "kimi_linear"])
def test_top_k_is_the_number_of_experts_per_token(package: str) -> None:
    tiny = tiny_models.build(package, top_k=4)
    given, _ = routing_of(tiny.model)
    backward(tiny)
    assert {indices.shape[1] for indices in given.values()} == {4}


def test_the_experts_implementation_can_be_chosen() -> None:
    eager, grouped = (tiny_models.build("qwen3_moe", experts_implementation=name) for name in ("eager", "grouped_mm"))
    assert grouped.model.config._experts_implementation == "grouped_mm"
    torch.testing.assert_close(backward(grouped), backward(eager))


def test_a_padded_batch_has_its_mask() -> None:
    tiny = tiny_models.build("mixtral", padded=True)
    assert backward(tiny).isfinite()
    mask = tiny.inputs["attention_mask"].bool()
    assert not mask.all() and (tiny.inputs["labels"][~mask] == -100).all()
