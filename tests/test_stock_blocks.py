"""Our layer with the weights of transformers' own MoE blocks: the same output and the same gradients."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DeepseekV3Config, MixtralConfig, OlmoeConfig, PreTrainedConfig, Qwen3MoeConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from agreement import CPU_BACKENDS, assert_all_equal, assert_equal, randomise
from moestro import MoE, MoestroConfig, RouterRule
from moestro.models.layers import SparseMoE

DIM, WIDTH = 32, 16


@dataclass(frozen=True, kw_only=True)
class Stock:
    """A block of transformers and the sub-layer that it should equal."""

    block: Callable[[Any], nn.Module]
    config: PreTrainedConfig
    spec: MoE


STOCK = {
    "mixtral": Stock(
        block=MixtralSparseMoeBlock,
        config=MixtralConfig(hidden_size=DIM, intermediate_size=WIDTH, num_local_experts=6, num_experts_per_tok=2),
        spec=MoE(num_experts=6, top_k=2, width=WIDTH),
    ),
    "olmoe": Stock(
        block=OlmoeSparseMoeBlock,
        config=OlmoeConfig(hidden_size=DIM, intermediate_size=WIDTH, num_experts=6, num_experts_per_tok=3),
        spec=MoE(num_experts=6, top_k=3, width=WIDTH, router=RouterRule(renormalise=False)),
    ),
    "qwen3_moe": Stock(
        block=Qwen3MoeSparseMoeBlock,
        config=Qwen3MoeConfig(
            hidden_size=DIM, moe_intermediate_size=WIDTH, num_experts=6, num_experts_per_tok=2, norm_topk_prob=True
        ),
        spec=MoE(num_experts=6, top_k=2, width=WIDTH),
    ),
    "deepseek_v3": Stock(
        block=DeepseekV3MoE,
        config=DeepseekV3Config(
            hidden_size=DIM,
            moe_intermediate_size=WIDTH,
            n_routed_experts=8,
            num_experts_per_tok=3,
            n_shared_experts=2,
            n_group=4,
            topk_group=2,
            norm_topk_prob=True,
            routed_scaling_factor=2.5,
        ),
        spec=MoE(
            num_experts=8,
            top_k=3,
            width=WIDTH,
            num_shared=2,
            router=RouterRule(scores="sigmoid", scale=2.5, selection_bias=True, num_groups=4, top_groups=2),
        ),
    ),
}
NAMES = (("gate.", "router."), ("shared_experts.", "shared_expert."))
"""Theirs and ours; but `gate_proj` of a shared expert is `gate_proj` in both."""


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    for theirs, ours in NAMES:
        state = {ours + name.removeprefix(theirs) if name.startswith(theirs) else name: t for name, t in state.items()}
    return state


def build_stock(family: str) -> nn.Module:
    stock = STOCK[family]
    stock.config._experts_implementation = "eager"
    block = stock.block(stock.config)
    randomise(block)
    return block


def build_ours(family: str, block: nn.Module, backend: str) -> SparseMoE:
    spec = STOCK[family].spec
    config = MoestroConfig(hidden_size=DIM, num_hidden_layers=1, feed_forward=[[spec]])
    config._experts_implementation = backend
    layer = SparseMoE(config, spec)
    layer.load_state_dict(renamed(block.state_dict()))
    return layer


def run(layer: nn.Module, hidden: Tensor, cotangent: Tensor) -> dict[str, Tensor]:
    hidden = hidden.clone().requires_grad_()
    output = layer(hidden)
    output.backward(cotangent)
    assert hidden.grad is not None
    by_name = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    return {"output": output.detach(), "hidden": hidden.grad} | by_name


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("family", STOCK)
def test_layer_equals_the_stock_block(family, backend):
    block = build_stock(family)
    layer = build_ours(family, block, backend)
    hidden, cotangent = torch.randn(2, 3, 7, DIM).unbind()
    assert_all_equal(run(layer, hidden, cotangent), renamed(run(block, hidden, cotangent)))


@pytest.mark.parametrize("family", STOCK)
def test_router_returns_what_the_stock_router_returns(family):
    """(logits, weights, indices): whatever hooks a stock router finds the same in ours."""
    block = build_stock(family)
    hidden = torch.randn(7, DIM)
    ours = build_ours(family, block, "eager").router(hidden)
    theirs = block.get_submodule("gate")(hidden)
    order, stock_order = ours[2].argsort(-1), theirs[2].argsort(-1)
    assert torch.equal(ours[2].gather(-1, order), theirs[2].gather(-1, stock_order))
    assert_equal(ours[1].gather(-1, order), theirs[1].gather(-1, stock_order))
    assert_equal(ours[0], theirs[0])
