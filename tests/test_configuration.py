"""`MoestroConfig`: its file, and what it refuses."""

from dataclasses import replace

import pytest

from agreement import MOE, every_shape, small_config
from moestro import Dense, Misuse, MoestroConfig, RouterRule


@every_shape
def test_config_survives_its_file(shape, tmp_path):
    config = small_config(**shape)
    config.save_pretrained(tmp_path)
    assert MoestroConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    assert MoestroConfig.from_pretrained(tmp_path).sub_layers == config.sub_layers


ROUTED = {"num_experts": 4, "top_k": 2, "width": 16}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (ROUTED | {"top_k": 5}, "top_k must lie between 1 and num_experts (4), got 5"),
        (ROUTED | {"num_experts": 0}, "num_experts must be at least 1, got 0"),
        (ROUTED | {"width": 12}, "width of an expert must be a multiple of 8, got 12"),
        (ROUTED | {"width": 0}, "width must be at least 1, got 0"),
        (ROUTED | {"num_shared": -1}, "num_shared must be at least 0, got -1"),
        (ROUTED | {"num_shared": 1, "shared_width": 0}, "shared_width must be at least 1, got 0"),
        (ROUTED | {"mix": "mean"}, "mix must be sum or convex, got 'mean'"),
        (ROUTED | {"mix": "convex"}, "mix = convex needs a shared expert: num_shared must be at least 1, got 0"),
        (ROUTED | {"router": {"num_groups": 3}}, "num_groups must divide num_experts (4), got 3"),
        (
            ROUTED | {"router": {"tok_k": 3}},
            "unknown field 'tok_k' in a router; it takes num_groups, renormalise, scale, scores, selection_bias, "
            "top_groups",
        ),
        (ROUTED | {"top_k": 1.5}, "top_k must be a whole number of at least 1 and at most 65,536, got 1.5"),
        ({"num_experts": 4, "width": 16}, "a moe sub-layer must have top_k, got num_experts, width"),
        ({"kind": "dense"}, "a dense sub-layer must have width, got kind"),
        ({"kind": "dense", "width": 0}, "width must be at least 1, got 0"),
        ({"kind": "dense", "width": 8, "top_k": 1}, "unknown field 'top_k' in a dense sub-layer; it takes kind, width"),
        ({"kind": "sparse"}, "kind of a sub-layer must be dense or moe, got 'sparse'"),
        (7, "feed_forward must list Dense and MoE sub-layers for each block, got 7"),
    ],
    ids=str,
)
def test_sub_layers_that_cannot_work_are_refused(changes, message, unchecked):
    with pytest.raises(Misuse) as refusal:
        small_config(feed_forward=[[changes], [MOE]])
    assert str(refusal.value) == message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 3}, "feed_forward must list num_hidden_layers (3) blocks, got 2"),
        ({"num_key_value_heads": 3}, "num_key_value_heads must divide num_attention_heads (4), got 3"),
        ({"num_key_value_heads": 0}, "num_key_value_heads must be at least 1, got 0"),
        ({"num_attention_heads": 0}, "num_attention_heads must be at least 1, got 0"),
        (
            {"num_attention_heads": 3, "num_key_value_heads": 3},
            "num_attention_heads must divide hidden_size (32), got 3",
        ),
        (
            {"composition": "product"},
            "composition must be one of serial, parallel, tied, shared-pool, got 'product'",
        ),
        *(
            (
                {"composition": "tied", "feed_forward": [[MOE], [MOE, Dense(width=8), replace(MOE, **other)]]},
                "composition = tied needs the MoE sub-layers of a block to agree in num_experts, top_k, router, and "
                "block 1's do not",
            )
            for other in ({"num_experts": 8}, {"top_k": 1}, {"router": RouterRule(scores="sigmoid")})
        ),
        *(
            (
                {"composition": "shared-pool", "feed_forward": [[MOE, replace(MOE, **other)], [MOE]]},
                "composition = shared-pool needs the MoE sub-layers of a block to agree in num_experts, width, router, "
                "and block 0's do not",
            )
            for other in ({"num_experts": 8}, {"width": 8}, {"router": RouterRule(renormalise=False)})
        ),
        ({"hidden_size": 36}, "hidden_size must be a multiple of 8 where there are experts, got 36"),
        (
            {"attention_bias": True, "qk_norm": False},
            "attention_bias needs qk_norm (attention without query-key norm has no biases), got qk_norm=False",
        ),
    ],
    ids=str,
)
def test_configs_that_cannot_work_are_refused(changes, message):
    with pytest.raises(Misuse) as refusal:
        small_config(**changes)
    assert str(refusal.value) == message


@pytest.mark.parametrize(
    ("composition", "changes"),
    [
        ("serial", {"num_experts": 8, "top_k": 1, "width": 8, "num_shared": 0}),
        ("parallel", {"num_experts": 8, "top_k": 1, "width": 8, "num_shared": 0}),
        ("tied", {"width": 8, "num_shared": 0}),
        ("shared-pool", {"top_k": 1, "num_shared": 2, "mix": "convex"}),
    ],
)
def test_sub_layers_may_differ_in_what_is_not_shared(composition, changes):
    config = small_config(composition=composition, feed_forward=[[MOE, replace(MOE, **changes)], [MOE]])
    assert config.sub_layers[0][1] == replace(MOE, **changes)


def test_an_unknown_activation_is_refused():
    with pytest.raises(Misuse, match=r"hidden_act must be one of .*silu.*, got 'swiglu'"):
        small_config(hidden_act="swiglu")
