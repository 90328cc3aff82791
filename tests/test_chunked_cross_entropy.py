"""The chunked cross-entropy against F.cross_entropy over all logits: value, gradients, and what it must not do."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from moestro.models import chunked_cross_entropy as module
from moestro.models.chunked_cross_entropy import chunked_cross_entropy


@dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes, and the share of labels that are ignored."""

    tokens: int = 20
    dim: int = 6
    vocabulary: int = 11
    chunk: int = 8
    ignored: float = 0.3
    scale: float = 1.0
    seed: int = 0

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """hidden, weight, labels."""
        torch.manual_seed(self.seed)
        labels = torch.randint(self.vocabulary, (self.tokens,))
        labels = labels.where(torch.rand(self.tokens) >= self.ignored, -100)
        return self.scale * torch.randn(self.tokens, self.dim), torch.randn(self.vocabulary, self.dim), labels


@st.composite
def cases(draw: st.DrawFn) -> Case:
    return Case(
        tokens=draw(st.integers(1, 40)),
        dim=draw(st.integers(1, 9)),
        vocabulary=draw(st.integers(1, 30)),
        chunk=draw(st.integers(1, 50)),
        ignored=draw(st.sampled_from([0.0, 0.3, 1.0])),
        scale=draw(st.sampled_from([0.0, 1.0, 100.0])),
        seed=draw(st.integers(0, 2**32)),
    )


def whole(hidden: Tensor, weight: Tensor, labels: Tensor, *, num_items: Tensor | int, **_: int) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="sum") / num_items


def run(loss_function, case: Case, *, num_items: Tensor | int = 7, autocast: bool = False) -> dict[str, Tensor]:
    hidden, weight, labels = case.inputs()
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = loss_function(hidden, weight, labels, num_items=num_items, chunk=case.chunk)
    loss.backward()
    assert hidden.grad is not None and weight.grad is not None
    return {"loss": loss.detach(), "hidden": hidden.grad, "weight": weight.grad}


def error(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Relative, in norm; 0 where both are 0."""
    distance = {name: float((actual[name] - expected[name]).norm()) for name in expected}
    return {name: distance[name] and distance[name] / float(expected[name].norm()) for name in expected}


@example(Case(tokens=1, vocabulary=1))
@example(Case(ignored=1.0))
@example(Case(tokens=17, chunk=8))
@example(Case(scale=1000.0))
@given(cases())
@pytest.mark.parametrize("cached", [1, 25, 2**18])
def test_equals_the_whole(cached: int, case: Case) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CACHED_ELEMENTS", cached)
        assert max(error(run(chunked_cross_entropy, case), run(whole, case)).values()) < 1e-6


def test_equals_the_whole_at_the_size_of_a_language_model() -> None:
    case = Case(tokens=700, dim=32, vocabulary=1000, chunk=512)
    assert max(error(run(chunked_cross_entropy, case), run(whole, case)).values()) < 1e-6


@pytest.mark.parametrize("num_items", [3, torch.tensor(3), torch.tensor(3.0)])
def test_number_of_items_is_a_number_or_a_tensor(num_items: Tensor | int) -> None:
    actual = run(chunked_cross_entropy, Case(), num_items=num_items)
    assert max(error(actual, run(whole, Case(), num_items=3)).values()) < 1e-6


def test_another_ignored_label() -> None:
    hidden, weight, labels = Case(ignored=0.0).inputs()
    loss = chunked_cross_entropy(hidden, weight, labels, num_items=1, ignore_index=4)
    torch.testing.assert_close(loss, F.cross_entropy(hidden @ weight.T, labels, reduction="sum", ignore_index=4))


def test_backward_only_scales() -> None:
    """Twice through the same graph, with another factor each time."""
    hidden, weight, labels = Case().inputs()
    loss = chunked_cross_entropy(hidden.requires_grad_(), weight.requires_grad_(), labels, num_items=5)
    once = torch.autograd.grad(loss, [hidden, weight], retain_graph=True)
    with FlopCounterMode(display=False) as counter:
        thrice = torch.autograd.grad(3 * loss, [hidden, weight])
    assert counter.get_total_flops() == 0
    for one, three in zip(once, thrice, strict=True):
        torch.testing.assert_close(three, 3 * one)


@pytest.mark.parametrize(("hidden_wanted", "weight_wanted"), [(True, True), (True, False), (False, True)])
def test_only_wanted_gradients_are_computed(hidden_wanted: bool, weight_wanted: bool) -> None:
    case = Case(ignored=0.0)
    hidden, weight, labels = case.inputs()
    hidden.requires_grad_(hidden_wanted)
    weight.requires_grad_(weight_wanted)
    with FlopCounterMode(display=False) as counter:
        chunked_cross_entropy(hidden, weight, labels, num_items=7, chunk=8).backward()
    product = 2 * case.tokens * case.vocabulary * case.dim
    assert counter.get_total_flops() == product * (1 + hidden_wanted + weight_wanted)
    expected = run(whole, case)
    for name, tensor, wanted in (("hidden", hidden, hidden_wanted), ("weight", weight, weight_wanted)):
        assert (tensor.grad is not None) == wanted
        if tensor.grad is not None:
            torch.testing.assert_close(tensor.grad, expected[name])


def test_without_grad_only_the_loss_is_computed() -> None:
    case = Case()
    hidden, weight, labels = case.inputs()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        loss = chunked_cross_entropy(
            hidden.requires_grad_(), weight.requires_grad_(), labels, num_items=7, chunk=case.chunk
        )
    assert counter.get_total_flops() == 2 * case.tokens * case.vocabulary * case.dim
    assert not loss.requires_grad
    torch.testing.assert_close(loss, run(whole, case)["loss"])


class LargestOutput(TorchDispatchMode):
    """The most elements that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if isinstance(output, Tensor):
            self.elements = max(self.elements, output.numel())
        return output


def test_never_holds_all_logits() -> None:
    with LargestOutput() as largest:
        run(chunked_cross_entropy, Case(tokens=64, dim=2, vocabulary=100, chunk=8))
    assert largest.elements == 8 * 100


@pytest.mark.parametrize("vocabulary", [50, 1000])
def test_autocast_multiplies_in_bf16_and_is_as_exact_as_stock(vocabulary: int) -> None:
    case = Case(tokens=256, dim=64, vocabulary=vocabulary, chunk=64, scale=0.3)
    truth, actual = run(whole, case), run(chunked_cross_entropy, case, autocast=True)
    assert {tensor.dtype for tensor in actual.values()} == {torch.float32}
    ours, stock = error(actual, truth), error(run(whole, case, autocast=True), truth)
    for name in ("hidden", "weight"):
        assert 1e-4 < ours[name] <= 1.1 * stock[name], name
    assert ours["loss"] < 1e-3


def test_gradients_are_exact_in_fp64() -> None:
    hidden, weight, labels = Case().inputs()
    inputs = (hidden.double().requires_grad_(), weight.double().requires_grad_())
    assert torch.autograd.gradcheck(lambda h, w: chunked_cross_entropy(h, w, labels, num_items=7, chunk=8), inputs)
