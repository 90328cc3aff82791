"""All experts on the same tokens, by dense products, against each of them asked by transformers' own code."""

import copy
from collections.abc import Callable

import pytest
import tiny_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moestro import reroute
from moestro.models.every_expert import every_expert
from test_grouped_padded import DIM, EXPERTS, randomised


@pytest.mark.parametrize("build", EXPERTS.values(), ids=EXPERTS)
@settings(deadline=None, max_examples=10)
@given(tokens=st.integers(1, 9), num_experts=st.integers(1, 5), seed=st.integers(0, 99))
def test_it_is_what_each_expert_makes_of_each_token(build: Callable, tokens: int, num_experts: int, seed: int):
    torch.manual_seed(seed)
    experts = randomised(build(num_experts))
    experts.config._experts_implementation = "eager"
    hidden = torch.randn(tokens, DIM)
    found = every_expert(experts, hidden, torch.float32)
    for expert in range(num_experts):
        alone = experts(hidden, torch.full((tokens, 1), expert), torch.ones(tokens, 1))
        torch.testing.assert_close(found[:, expert], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("backend", ["eager", "grouped_mm", "padded_mm"])
def test_a_proposal_asks_all_experts_or_any(backend: str, autocast: bool):
    """In the dtype in which the backend multiplies: grouped_mm in the weights', under autocast too."""
    near = {"rtol": 2e-2, "atol": 1e-2} if autocast and backend != "grouped_mm" else {"rtol": 1e-4, "atol": 1e-5}
    model = copy.deepcopy(tiny_models.build("gpt_oss").model).eval()
    model.set_experts_implementation(backend)
    inputs = tiny_models.build("gpt_oss").inputs
    asked: list[str] = []

    def ask(proposal):
        everyone = torch.arange(proposal.layer.num_experts).expand(len(proposal.hidden), -1)
        answers = proposal.run(proposal.hidden)
        torch.testing.assert_close(answers, proposal.run(proposal.hidden, everyone), **near)
        asked.append(proposal.layer.name)
        return proposal.routing

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast), reroute(model, ask):
        model(**inputs)
    assert asked
