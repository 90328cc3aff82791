"""Counts from the config alone, against models that were built, against PyTorch's counter, and against the papers."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from agreement import small_config
from moestro import Dense, MoE, MoestroConfig, MoestroForCausalLM, RouterRule
from moestro.architecture.counting import (
    count_parameters,
    forward_flops_per_token,
    moe_layer_names,
    training_flops_per_token,
)
from moestro.architecture.sub_layers import SubLayer
from moestro.models.layers import SparseMoE
from moestro.training.recipes import recipe
from test_controls import EVERY_SPEC


@st.composite
def sub_layers(draw: st.DrawFn) -> SubLayer:
    if draw(st.integers(0, 3)) == 0:
        return Dense(width=draw(st.integers(1, 40)))
    num_experts, num_shared = draw(st.integers(1, 5)), draw(st.integers(0, 2))
    return MoE(
        num_experts=num_experts,
        top_k=draw(st.integers(1, num_experts)),
        width=8 * draw(st.integers(1, 3)),
        num_shared=num_shared,
        shared_width=draw(st.sampled_from([None, 5])),
        mix=draw(st.sampled_from(["sum", "convex"])) if num_shared else "sum",
        router=RouterRule(scores="sigmoid", selection_bias=True) if draw(st.booleans()) else RouterRule(),
    )


def composable(block: list[SubLayer], composition: str) -> list[SubLayer]:
    """The block with its MoE sub-layers made alike in what must be."""
    first = next((spec for spec in block if isinstance(spec, MoE)), None)
    alike = {"tied": ("num_experts", "top_k", "router"), "shared-pool": ("num_experts", "width", "router")}

    def fitted(spec: SubLayer) -> SubLayer:
        if not isinstance(spec, MoE):
            return spec
        changes = {name: getattr(first, name) for name in alike.get(composition, ())}
        return replace(spec, **changes | {"top_k": min(spec.top_k, changes.get("num_experts", spec.top_k))} | changes)

    return [fitted(spec) for spec in block]


@st.composite
def configs(draw: st.DrawFn) -> MoestroConfig:
    composition = draw(st.sampled_from(["serial", "parallel", "tied", "shared-pool"]))
    blocks = draw(st.lists(st.lists(sub_layers(), min_size=1, max_size=3), min_size=1, max_size=3))
    blocks = [composable(block, composition) for block in blocks]
    qk_norm = draw(st.booleans())
    return MoestroConfig(
        vocab_size=draw(st.integers(1, 50)),
        hidden_size=16,
        num_hidden_layers=len(blocks),
        num_attention_heads=4,
        num_key_value_heads=draw(st.sampled_from([None, 1, 2])),
        head_dim=draw(st.sampled_from([None, 6])),
        qk_norm=qk_norm,
        attention_bias=qk_norm and draw(st.booleans()),
        tie_word_embeddings=draw(st.booleans()),
        feed_forward=blocks,
        composition=composition,
    )


def build_without_memory(config: MoestroConfig) -> MoestroForCausalLM:
    with torch.device("meta"):
        model = MoestroForCausalLM(config)
    model.tie_weights()
    return model


@given(configs())
def test_parameters_are_those_of_the_built_model(config):
    assert count_parameters(config.architecture).total == sum(
        p.numel() for p in build_without_memory(config).parameters()
    )


@given(configs())
def test_active_parameters_are_what_multiplies_a_token(config):
    """All but the experts, and top_k of them per sub-layer: a token that passes a shared pool twice counts twice."""
    model = build_without_memory(config)
    active = sum(p.numel() for name, p in model.named_parameters() if ".experts." not in name)
    for layer in model.modules():
        if isinstance(layer, SparseMoE):
            active += layer.router.top_k * sum(p[0].numel() for p in layer.experts.parameters())
    assert count_parameters(config.architecture).active == active


@given(configs())
def test_moe_layers_have_the_names_of_modules(config):
    model = build_without_memory(config).model
    assert moe_layer_names(config.architecture) == [
        n for n, module in model.named_modules() if isinstance(module, SparseMoE)
    ]


@given(configs(), st.integers(1, 7))
def test_flops_are_those_that_torch_counts(config, length):
    """With the eager experts and eager attention, whose products are plain ones that the counter knows."""
    model = MoestroForCausalLM(config)
    model.set_experts_implementation("eager")
    model.set_attn_implementation("eager")
    ids = torch.randint(config.vocab_size, (2, length))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids)
    assert counter.get_total_flops() == 2 * length * forward_flops_per_token(config.architecture, length)


def test_training_costs_three_forward_passes():
    """Counted too: a gradient for each factor of each product, but for the weights' inputs that need none."""
    config = small_config()
    model = MoestroForCausalLM(config)
    model.set_experts_implementation("eager")
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        model(torch.randint(64, (2, 7))).logits.sum().backward()
    assert counter.get_total_flops() == 2 * 7 * training_flops_per_token(config.architecture, 7)


@pytest.mark.parametrize(
    "variant",
    ["compete:start=0", "compete:start=0,forward=False", "compete:start=0,rate=0.02", "compete:rate=0.25,end=0.75"],
)
def test_answers_of_all_experts_are_counted(variant):
    """Of the whole run, where competition rests for a part: here a half of it, by the words of the recipe.

    Of a sequence whole tokens compete: 2 of 64 at a rate of 0.02.
    """
    resting = "end" in variant  # after a quarter of the run, which is the default, and before the last
    chosen = recipe(f"smoe+{variant}", sequence_length=64, batch_tokens=128, tokens=128 * 8, vocab_size=512)
    aux, model = chosen.aux_losses(), MoestroForCausalLM(chosen.model.config(64))
    model.set_experts_implementation("eager")
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, aux.attach(model):
        for _ in range(8):
            model(input_ids=(ids := torch.randint(512, (2, 64))), labels=ids).loss.backward()
            aux.step()
    assert counter.get_total_flops() == 8 * 128 * chosen.training_flops()
    without = training_flops_per_token(model.config.architecture, 64)
    of_experts = 2 * 16 * 2 * 3 * 128 * 128  # layers, experts, multiply and add, matrices
    assert chosen.training_flops() - without == of_experts * (0.25 / 2 if resting else 1 / 32)


@pytest.mark.parametrize(
    ("spec", "size"),
    [
        *((spec, size) for size in ("tiny", "small") for spec in EVERY_SPEC),
        *(("cartesian-paper", size) for size in ("base", "large", "7b")),
    ],
)
def test_parameters_of_every_recipe_are_those_of_its_model(spec, size):
    model = recipe(spec, size).model
    config = model.config(512)
    assert model.architecture == config.architecture
    assert count_parameters(config.architecture).total == sum(
        p.numel() for p in build_without_memory(config).parameters()
    )


def test_tied_embeddings_count_once():
    tied, untied = (count_parameters(small_config(tie_word_embeddings=tie).architecture) for tie in (True, False))
    assert untied.total - tied.total == untied.active - tied.active == 64 * 32


@pytest.mark.parametrize(
    ("name", "size", "total", "active"),
    [
        ("dense", "base", 162.4e6, 162.4e6),
        ("dense", "large", 468.2e6, 468.2e6),
        ("smoe", "base", 842.0e6, 247.4e6),
        ("smoe", "large", 2884e6, 770.4e6),
        ("fine-grained", "base", 842.0e6, 247.4e6),
        ("fine-grained", "large", 2884e6, 770.4e6),
        ("cartesian-paper", "base", 842.0e6, 247.4e6),
        ("cartesian-paper", "large", 2884e6, 770.4e6),
        ("cartesian-paper", "7b", 7245e6, 1608e6),
    ],
)
def test_sizes_of_the_cartesian_moe_paper(name, size, total, active):
    """Every figure of Su et al. 2024 (arXiv:2410.16077) within 0.1 %."""
    count = count_parameters(recipe(name, size).model.architecture)
    assert count.total == pytest.approx(total, rel=1e-3)
    assert count.active == pytest.approx(active, rel=1e-3)
