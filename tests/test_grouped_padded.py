"""`padded_mm` against transformers' `eager` and `grouped_mm`: outputs and every gradient, for every kind of experts."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import GptOssConfig, MuseSparkTextConfig, NemotronHConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.muse_spark.modeling_muse_spark import MuseSparkExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from agreement import assert_all_equal, gradients, randomise
from moestro.models import grouped_padded
from moestro.models.grouped_padded import PADDED_MM, register

DIM, WIDTH = 16, 24

EXPERTS: dict[str, Callable[[int], nn.Module]] = {
    "plain": lambda n: Qwen3MoeExperts(Qwen3MoeConfig(num_experts=n, hidden_size=DIM, moe_intermediate_size=WIDTH)),
    "transposed, interleaved, biased, own gate": lambda n: GptOssExperts(
        GptOssConfig(num_local_experts=n, hidden_size=DIM, intermediate_size=WIDTH)
    ),
    "ungated": lambda n: NemotronHExperts(
        NemotronHConfig(n_routed_experts=n, hidden_size=DIM, moe_intermediate_size=WIDTH, moe_latent_size=None)
    ),
    "normed": lambda n: MuseSparkExperts(
        MuseSparkTextConfig(num_local_experts=n, moe_hidden_size=DIM, moe_intermediate_size=WIDTH)
    ),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """Tokens and where they go: each to `top_k` of the first `used` experts."""

    tokens: int
    num_experts: int
    used: int
    top_k: int
    seed: int = 0

    def routing(self) -> tuple[Tensor, Tensor, Tensor]:
        """hidden, top_k_index, top_k_weights (of either sign)."""
        torch.manual_seed(self.seed)
        index = torch.rand(self.tokens, self.used).topk(self.top_k).indices
        return torch.randn(self.tokens, DIM), index, torch.randn(self.tokens, self.top_k)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    num_experts = draw(st.integers(1, 6))
    used = draw(st.integers(1, num_experts))
    top_k, tokens = draw(st.integers(1, used)), draw(st.integers(1, 100))
    return Case(tokens=tokens, num_experts=num_experts, used=used, top_k=top_k, seed=draw(st.integers(0, 2**32)))


ONE_TOKEN = Case(tokens=1, num_experts=4, used=4, top_k=2)
ALL_ON_ONE = Case(tokens=70, num_experts=4, used=1, top_k=1)
IDLE = Case(tokens=40, num_experts=8, used=2, top_k=2)
EVERY_EXPERT = Case(tokens=33, num_experts=3, used=3, top_k=3)


@pytest.fixture(params=EXPERTS)
def build(request: pytest.FixtureRequest) -> Callable[[int], nn.Module]:
    return EXPERTS[request.param]


@pytest.fixture
def padded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups are padded whatever their number and dtype (usually not in fp32, where it does not pay)."""
    monkeypatch.setattr(grouped_padded, "_rows_multiple", lambda *_: 32)


@pytest.fixture(autouse=True)
def registered() -> None:
    register()


def run(
    experts: Any, backend: str, hidden: Tensor, index: Tensor, weight: Tensor, *, autocast: bool = False
) -> dict[str, Tensor]:
    """The output, and the gradients of a fixed linear function of it."""
    experts.config._experts_implementation = backend
    experts.zero_grad()
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        output = experts(hidden, index, weight)
    output.backward(torch.linspace(-1, 1, output.numel(), dtype=output.dtype).sin().view_as(output))
    assert hidden.grad is not None and weight.grad is not None
    return {"output": output.detach(), "hidden": hidden.grad, "weight": weight.grad} | gradients(experts)


def randomised(experts: Any) -> Any:
    randomise(experts)
    return experts


@example(ONE_TOKEN)
@example(ALL_ON_ONE)
@example(IDLE)
@example(EVERY_EXPERT)
@given(cases())
@pytest.mark.parametrize(
    ("multiple", "most_zeros"), [(1, 0.0), (32, 0.0), (32, torch.inf)], ids=["as they are", "padded", "equal"]
)
@pytest.mark.parametrize("kind", EXPERTS)
def test_equals_eager_and_grouped_mm(kind: str, multiple: int, most_zeros: float, case: Case) -> None:
    experts = randomised(EXPERTS[kind](case.num_experts))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grouped_padded, "_rows_multiple", lambda *_: multiple)
        patch.setattr(grouped_padded, "_MOST_ZEROS", most_zeros)
        actual = run(experts, PADDED_MM, *case.routing())
    assert_all_equal(actual, run(experts, "eager", *case.routing()))
    assert_all_equal(actual, run(experts, "grouped_mm", *case.routing()))


ONE_ROW_EACH = Case(tokens=1, num_experts=4, used=4, top_k=4)
"""Three of them here: as much padding as there can be, and a foreign pair."""


@example(ONE_ROW_EACH, 3)
@example(EVERY_EXPERT, 1)
@given(cases(), st.integers(1, 6))
@pytest.mark.parametrize("left_over", [torch.nan, 1.0])
@pytest.mark.parametrize("kind", EXPERTS)
def test_experts_of_other_ranks_add_nothing(kind: str, left_over: float, case: Case, here: int) -> None:
    """Whatever the kernel leaves in the rows that it does not compute."""
    experts = randomised(EXPERTS[kind](here))
    experts._is_expert_parallel = True
    hidden, index, weight = case.routing()
    weight = weight.where(index < here, 0.0)
    expected = run(experts, "eager", hidden, index.where(index < here, 0), weight)
    expected["weight"] = expected["weight"].where(index < here, 0.0)

    def poisoned(left: Tensor, right: Tensor, *, offs: Tensor) -> Tensor:
        output = grouped_mm(left, right, offs=offs)
        if output.dim() == 2:
            output[int(offs[-1]) :] = left_over
        return output

    grouped_mm = F.grouped_mm
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grouped_padded, "_rows_multiple", lambda *_: 32)
        patch.setattr(F, "grouped_mm", poisoned)
        assert_all_equal(run(experts, PADDED_MM, hidden, index, weight), expected)


def test_no_rows_at_all(build: Callable[[int], nn.Module]) -> None:
    """As on an expert-parallel rank that no token chose."""
    experts = randomised(build(3))
    actual = run(experts, PADDED_MM, torch.randn(0, DIM), torch.zeros(0, 2, dtype=torch.long), torch.randn(0, 2))
    assert actual["output"].shape == (0, DIM)
    assert all(gradient.eq(0).all() for gradient in actual.values())


def error(actual: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    return {name: float((actual[name].float() - truth[name]).norm() / truth[name].norm()) for name in truth}


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_bf16_is_as_exact_as_grouped_mm(build: Callable[[int], nn.Module], weight_dtype: torch.dtype) -> None:
    """Under autocast, against grouped_mm with everything in bf16; both measured by their distance from fp32."""
    experts = randomised(build(4))
    hidden, index, weight = Case(tokens=300, num_experts=4, used=4, top_k=2).routing()
    hidden, weight = hidden.bfloat16().float(), weight.to(weight_dtype)
    truth = run(experts, "grouped_mm", hidden, index, weight.float())
    ours = error(run(experts, PADDED_MM, hidden, index, weight, autocast=True), truth)
    stock = error(run(experts.bfloat16(), "grouped_mm", hidden.bfloat16(), index, weight.bfloat16()), truth)
    assert max(ours.values()) < 0.01
    for name in ours:
        assert ours[name] <= 1.1 * stock[name], name


@dataclass
class Seen:
    """What `F.grouped_mm` and `torch.bmm` were called with."""

    dtypes: set[torch.dtype]
    group_sizes: list[Tensor]
    batched: list[Tensor]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    record, grouped_mm, bmm = Seen(set(), [], []), F.grouped_mm, torch.bmm

    def recording(left: Tensor, right: Tensor, *, offs: Tensor) -> Tensor:
        record.dtypes |= {left.dtype, right.dtype}
        record.group_sizes.append(offs.diff(prepend=offs.new_zeros(1)))
        return grouped_mm(left, right, offs=offs)

    def recording_bmm(left: Tensor, right: Tensor) -> Tensor:
        record.dtypes |= {left.dtype, right.dtype}
        record.batched.append(left)
        return bmm(left, right)

    monkeypatch.setattr(F, "grouped_mm", recording)
    monkeypatch.setattr(torch, "bmm", recording_bmm)
    return record


def test_autocast_multiplies_in_bf16_groups_of_32(
    build: Callable[[int], nn.Module], seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grouped_padded, "_MOST_ZEROS", 0.0)
    experts = randomised(build(4))
    case = Case(tokens=90, num_experts=4, used=3, top_k=2)
    result = run(experts, PADDED_MM, *case.routing(), autocast=True)
    assert seen.dtypes == {torch.bfloat16} and not seen.batched
    assert len(seen.group_sizes) == 6  # up and down: forward and both gradients
    for sizes in seen.group_sizes:
        assert (sizes % 32 == 0).all()
        assert sizes.sum() < 2 * 90 + 31 * 4 + 32
    assert {tensor.dtype for tensor in result.values()} == {torch.float32}


def test_autocast_multiplies_balanced_groups_in_one_product(build: Callable[[int], nn.Module], seen: Seen) -> None:
    experts = randomised(build(4))
    result = run(experts, PADDED_MM, *Case(tokens=90, num_experts=4, used=4, top_k=2).routing(), autocast=True)
    assert seen.dtypes == {torch.bfloat16} and not seen.group_sizes
    assert len(seen.batched) == 6  # up and down: forward and both gradients
    assert {tensor.dtype for tensor in result.values()} == {torch.float32}


def test_groups_of_very_different_size_are_multiplied_one_by_one(seen: Seen) -> None:
    case = Case(tokens=300, num_experts=8, used=1, top_k=1)
    run(randomised(EXPERTS["plain"](8)), PADDED_MM, *case.routing(), autocast=True)
    assert len(seen.group_sizes) == 6 and not seen.batched


def test_large_groups_are_multiplied_one_by_one(seen: Seen) -> None:
    case = Case(tokens=1100, num_experts=2, used=2, top_k=1)
    run(randomised(EXPERTS["plain"](2)), PADDED_MM, *case.routing(), autocast=True)
    assert len(seen.group_sizes) == 6 and not seen.batched


@pytest.mark.parametrize("autocast", [False, True])
def test_small_groups_and_fp32_are_not_padded(autocast: bool, seen: Seen) -> None:
    experts = randomised(EXPERTS["plain"](4))
    run(
        experts,
        PADDED_MM,
        *Case(tokens=5 if autocast else 90, num_experts=4, used=4, top_k=2).routing(),
        autocast=autocast,
    )
    assert len(seen.group_sizes) == 6 and not seen.batched
    assert all(sizes.sum() == 2 * (5 if autocast else 90) for sizes in seen.group_sizes)


def test_repeats_to_the_bit(build: Callable[[int], nn.Module]) -> None:
    experts = randomised(build(4))
    case = Case(tokens=150, num_experts=4, used=4, top_k=2)
    first, second = (run(experts, PADDED_MM, *case.routing(), autocast=True) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_frozen_experts_get_no_gradient_and_pass_one_on(build: Callable[[int], nn.Module], seen: Seen) -> None:
    experts, case = randomised(build(4)), Case(tokens=20, num_experts=4, used=4, top_k=2)
    expected = run(experts, PADDED_MM, *case.routing())
    experts.requires_grad_(False)
    seen.group_sizes.clear()
    actual = run(experts, PADDED_MM, *case.routing())
    assert len(seen.group_sizes) == 4  # up and down: forward and the gradient of the rows
    assert all(parameter.grad is None for parameter in experts.parameters())
    for name in ("output", "hidden", "weight"):
        assert torch.equal(actual[name], expected[name])


def test_unit_weights_give_each_expert_s_output(build: Callable[[int], nn.Module], padded: None) -> None:
    """One choice at a time with weight 1, as adapters call it, then weighted by hand."""
    experts = randomised(build(4))
    hidden, index, weight = Case(tokens=40, num_experts=4, used=4, top_k=2).routing()
    together = run(experts, PADDED_MM, hidden, index, weight)["output"]
    apart = experts(hidden.repeat_interleave(2, 0), index.view(-1, 1), torch.ones(80, 1)).view(40, 2, DIM)
    assert_all_equal({"output": (apart * weight.unsqueeze(-1)).sum(1)}, {"output": together})


@pytest.mark.parametrize("most_zeros", [0.0, torch.inf])
def test_gradients_are_exact_in_fp64(padded: None, most_zeros: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one product, and by the path for what torch's grouped_mm cannot do."""
    monkeypatch.setattr(grouped_padded, "_MOST_ZEROS", most_zeros)
    experts = randomised(EXPERTS["transposed, interleaved, biased, own gate"](3)).double()
    experts.config._experts_implementation = PADDED_MM
    hidden, index, weight = Case(tokens=3, num_experts=3, used=3, top_k=2).routing()
    inputs = (hidden.double().requires_grad_(), weight.double().requires_grad_())
    assert torch.autograd.gradcheck(lambda h, w: experts(h, index, w), inputs)


@pytest.mark.parametrize("autocast", [False, True])
def test_any_width(autocast: bool) -> None:
    """Widths whose rows are not a multiple of 16 bytes."""
    config = Qwen3MoeConfig(num_experts=3, hidden_size=DIM, moe_intermediate_size=7)
    experts, case = randomised(Qwen3MoeExperts(config)), Case(tokens=60, num_experts=3, used=3, top_k=2)
    actual, expected = (
        run(experts, PADDED_MM, *case.routing(), autocast=autocast),
        run(experts, "eager", *case.routing()),
    )
    if autocast:
        assert max(error(actual, expected).values()) < 0.02
    else:
        assert_all_equal(actual, expected)


def test_a_model_of_transformers_trains_with_it() -> None:
    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=DIM, moe_intermediate_size=WIDTH, num_hidden_layers=2, num_experts=4,
        num_experts_per_tok=2, num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM._from_config(config, experts_implementation=PADDED_MM)
    assert model.config._experts_implementation == PADDED_MM
    tokens = torch.randint(0, 64, (2, 20))
    results = []
    for backend in (PADDED_MM, "eager"):
        model.set_experts_implementation(backend)
        model.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        results.append(gradients(model))
    assert_all_equal(*results)


def test_registering_again_changes_nothing() -> None:
    before = ALL_EXPERTS_FUNCTIONS[PADDED_MM]
    register()
    assert ALL_EXPERTS_FUNCTIONS[PADDED_MM] is before


COMPILED = """
import torch
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts
from moestro.models.grouped_padded import PADDED_MM, register

register()
torch.manual_seed(0)
config = Qwen3MoeConfig(num_experts=4, hidden_size=16, moe_intermediate_size=24)
config._experts_implementation = PADDED_MM
experts = Qwen3MoeExperts(config)
for parameter in experts.parameters():
    torch.nn.init.normal_(parameter, std=0.3)
compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")

def run(module, hidden, index, weight):
    experts.zero_grad()
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = module(hidden, index, weight)
    output.square().sum().backward()
    return [output.detach(), hidden.grad, weight.grad, *(p.grad.clone() for p in experts.parameters())]

for autocast in (True, False):
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for step in range(3):
        hidden, weight = torch.randn(90, 16), torch.rand(90, 2)
        index = torch.rand(90, 4 - step).topk(2).indices
        for actual, expected in zip(run(compiled, hidden, index, weight), run(experts, hidden, index, weight)):
            assert (actual - expected).norm() <= 1e-6 * expected.norm(), (autocast, step)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs + 1, "routing changed the graph"
"""


@pytest.mark.slow
def test_compiles_into_one_graph_for_all_routings(fresh_process: Callable[[str], str]) -> None:
    fresh_process(COMPILED)
