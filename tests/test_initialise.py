"""Initial weights: models that share a part start with it equal, and seeds differ."""

import pytest
import torch

from moestro import Dense, MoE, MoestroConfig, MoestroForCausalLM
from moestro.training.initialise import initialise, stable_hash


def model(seed: int, *block: Dense | MoE, **changes) -> dict[str, torch.Tensor]:
    config = MoestroConfig(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        feed_forward=[list(block) for _ in range(2)],
        **changes,
    )
    built = MoestroForCausalLM(config)
    initialise(built, seed)
    return dict(built.state_dict())


def test_shared_parts_start_equal_whatever_the_experts():
    dense, moe = model(0, Dense(width=8)), model(0, MoE(num_experts=4, top_k=2, width=8))
    shared = [name for name in dense if name in moe]
    assert any("q_proj" in name for name in shared)
    assert any("embed" in name for name in shared)
    for name in shared:
        assert torch.equal(dense[name], moe[name]), name


@pytest.mark.parametrize("composition", ["parallel", "tied", "shared-pool"])
def test_compositions_start_from_the_same_weights(composition: str):
    """All of the serial block's but what the later sub-layer shares with the first, which is the first one's."""
    moe = MoE(num_experts=4, top_k=2, width=8, num_shared=1, mix="convex")
    serial, other = model(0, moe, moe), model(0, moe, moe, composition=composition)
    shared = {"tied": ("router.weight",), "shared-pool": ("gate_up_proj", "down_proj")}.get(composition, ())
    for name in serial:
        borrowed = "feed_forward.1." in name and name.endswith(shared) and "shared_expert" not in name
        source = name.replace("feed_forward.1.", "feed_forward.0.") if borrowed else name
        assert torch.equal(other[name], serial[source]), name
        assert not (borrowed and torch.equal(other[name], serial[name])), name


def test_seed_and_place_matter():
    one, other = model(0, MoE(num_experts=4, top_k=2, width=8)), model(1, MoE(num_experts=4, top_k=2, width=8))
    name = "model.layers.{}.feed_forward.0.experts.down_proj"
    assert not torch.equal(one[name.format(0)], other[name.format(0)])
    assert not torch.equal(one[name.format(0)], one[name.format(1)])
    assert one[name.format(0)].std().item() > 0.01
    assert torch.equal(one[name.format(0)], model(0, MoE(num_experts=4, top_k=2, width=8))[name.format(0)])


def test_global_generator_is_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    built = MoestroForCausalLM(MoestroConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
    torch.manual_seed(5)
    initialise(built, 0)
    assert torch.equal(torch.rand(1), expected)


def test_hash_is_the_same_in_every_process():
    assert stable_hash(0, "a") == 1481238324449861677
    assert stable_hash(0, "a") != stable_hash("0a")
