"""`MoestroForCausalLM` is a model of transformers like any other: forward, attention, caches, generation."""

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from agreement import (
    COMPOSED,
    CONVEX,
    CPU_BACKENDS,
    MOE,
    SHAPES,
    assert_all_equal,
    assert_equal,
    block,
    every_shape,
    loss_and_gradients,
    small_config,
    small_model,
    some_ids,
)
from moestro import Dense, Misuse, MoestroConfig, MoestroForCausalLM, MoestroModel


def test_auto_classes_know_the_family(tmp_path):
    config = small_config()
    config.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), MoestroConfig)
    assert isinstance(AutoModelForCausalLM.from_config(config), MoestroForCausalLM)
    assert isinstance(AutoModel.from_config(config), MoestroModel)


WRITTEN = ("o_proj.weight", "down_proj", "down_proj.weight")
"""Ends of the names of matrices whose product is added to the residual stream."""


@every_shape
def test_initialisation_leaves_nothing_out(shape):
    """Matrices are drawn with `initializer_range`, over the root of all writes where they write; norms are 1."""
    model = MoestroForCausalLM(small_config(**shape, initializer_range=0.05))
    writes = sum(1 + len(layer.feed_forward) for layer in model.model.layers)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "norm" in name:
            assert (tensor == 1).all(), name
        elif "bias" in name:
            assert (tensor == 0).all(), name
        elif "inv_freq" not in name:
            scaled = model.config.depth_scaled_init and name.endswith(WRITTEN)
            assert tensor.std().item() == pytest.approx(0.05 / writes**0.5 if scaled else 0.05, rel=0.3), name


@pytest.mark.parametrize("composition", ["serial", "parallel", "tied", "shared-pool"])
def test_a_block_of_two_sub_layers_writes_three_times(composition):
    """So its writes start at the root of 3 per block below the rest: 2 per block would be a fifth too large."""
    config = small_config(feed_forward=[[CONVEX, CONVEX]] * 2, composition=composition, initializer_range=0.05)
    assert config.residual_writes == 6
    assert small_config().residual_writes == small_config(feed_forward=[[Dense(width=8)]] * 2).residual_writes == 4
    written = [w.flatten() for name, w in MoestroForCausalLM(config).named_parameters() if name.endswith(WRITTEN)]
    assert torch.cat(written).std().item() == pytest.approx(0.05 / 6**0.5, rel=0.05)


@every_shape
def test_every_parameter_gets_a_gradient(shape):
    model = small_model(**shape)
    results = loss_and_gradients(model, some_ids(4, 16))
    assert not [name for name, gradient in results.items() if gradient.abs().sum() == 0]


def test_tied_embeddings_are_one_tensor():
    tied, untied = small_model(), small_model(tie_word_embeddings=False)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight


def test_logits_are_causal():
    model = small_model()
    ids = some_ids()
    changed = ids.clone()
    changed[:, 5:] = some_ids(2, 4)
    assert_equal(model(changed).logits[:, :5], model(ids).logits[:, :5])
    assert not torch.allclose(model(changed).logits[:, 5:], model(ids).logits[:, 5:])


def test_a_block_is_attention_and_its_sub_layers_in_turn():
    """Written out: x + attention(norm x), then y + f(norm y) for each sub-layer."""
    model = small_model(**SHAPES["two sub-layers, convex"])
    layer = block(model, 0)
    hidden = torch.randn(2, 5, 32)
    rotary = model.model.rotary_emb(hidden, torch.arange(5)[None])
    inputs = {"position_embeddings": rotary, "attention_mask": None}
    expected = hidden + layer.self_attn(layer.input_layernorm(hidden), **inputs)[0]
    expected = expected + layer.feed_forward[0](layer.feed_forward_norm[0](expected))
    expected = expected + layer.feed_forward[1](layer.feed_forward_norm[1](expected))
    assert_equal(layer(hidden, **inputs), expected)


# --- backends ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [name for name in CPU_BACKENDS if name != "eager"])
@pytest.mark.parametrize("name", ["sigmoid, dense first", *COMPOSED])
def test_experts_backends_agree(name, backend):
    model = small_model(**SHAPES[name])
    ids = some_ids()
    model.set_experts_implementation("eager")
    expected = loss_and_gradients(model, ids)
    model.set_experts_implementation(backend)
    assert block(model, 1).feed_forward[-1].experts.config._experts_implementation == backend
    assert_all_equal(loss_and_gradients(model, ids), expected)


@pytest.fixture
def uncompiled_flex(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers compiles flex attention and its mask, which takes long; uncompiled they are the same functions."""
    monkeypatch.setattr(
        "transformers.integrations.flex_attention.compile_friendly_flex_attention",
        lambda query, key, value, training=False, **options: flex_attention(query, key, value, **options),
    )
    monkeypatch.setattr(
        "transformers.masking_utils.create_block_mask",
        lambda _compile, **options: create_block_mask(**options),
    )


@torch.no_grad()  # on a CPU, flex attention has no backward
@pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile")
@pytest.mark.parametrize("attention", ["sdpa", "flex_attention"])
@pytest.mark.parametrize("shape", [{}, {"qk_norm": False}, {"sliding_window": 3}], ids=str)
def test_attention_implementations_agree(attention, shape, uncompiled_flex):
    model = small_model(**shape)
    ids = some_ids()
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    model.set_attn_implementation("eager")
    expected = model(ids, attention_mask=mask).logits
    model.set_attn_implementation(attention)
    actual = model(ids, attention_mask=mask).logits
    assert_equal(actual[mask.bool()], expected[mask.bool()])


def test_a_sliding_window_hides_the_far_past():
    model = small_model(sliding_window=3, num_hidden_layers=1, feed_forward=[[MOE]])
    ids = some_ids()
    changed = ids.clone()
    changed[:, 0] = (ids[:, 0] + 1) % 64
    moved = (model(changed).logits - model(ids).logits).abs().amax((0, 2))
    assert (moved[:3] > 1e-4).all() and (moved[3:] == 0).all()


# --- padding, caches, generation --------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@every_shape
def test_padding_changes_no_valid_token(shape, side):
    model = small_model(**shape)
    ids = some_ids(1, 6)
    junk = some_ids(1, 3)
    padded = torch.cat([junk, ids] if side == "left" else [ids, junk], dim=1)
    mask = torch.ones_like(padded)
    valid = slice(3, None) if side == "left" else slice(0, 6)
    mask[:, : 3 if side == "left" else 0] = 0
    mask[:, 9 if side == "left" else 6 :] = 0
    # Only distances between positions matter to the rotary embedding, so padding need not be skipped in them.
    assert_equal(model(padded, attention_mask=mask).logits[:, valid], model(ids).logits)


def greedy(model: MoestroForCausalLM, ids: Tensor, **options) -> list[list[int]]:
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0} | options
    return model.generate(ids, **options)[:, ids.shape[1] :].tolist()  # type: ignore[operator]


@pytest.mark.parametrize("options", [{"use_cache": True}, {"cache_implementation": "static"}], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES.values(), {"sliding_window": 4}], ids=[*SHAPES.keys(), "sliding window"])
def test_greedy_generation_agrees_with_and_without_cache(shape, options):
    model = small_model(**shape)
    ids = some_ids()
    assert greedy(model, ids, **options) == greedy(model, ids, use_cache=False)


def test_a_cache_continues_where_it_ended():
    """Without positions given: the model counts on from the length of the cache (`generate` passes its own)."""
    model = small_model()
    ids = some_ids()
    begun = model(ids[:, :5], use_cache=True)
    continued = model(ids[:, 5:], past_key_values=begun.past_key_values)
    assert_equal(continued.logits, model(ids).logits[:, 5:])


@pytest.mark.parametrize("options", [{"use_cache": False}, {}, {"cache_implementation": "static"}], ids=str)
def test_a_left_padded_batch_generates_what_each_row_does(options):
    model = small_model()
    long, short = some_ids(1, 7), some_ids(1, 4)
    batch = torch.cat([long, torch.nn.functional.pad(short, (3, 0))])
    mask = torch.ones_like(batch)
    mask[1, :3] = 0
    assert greedy(model, batch, attention_mask=mask, **options) == [*greedy(model, long), *greedy(model, short)]


def test_embeddings_may_be_given_instead_of_ids():
    model = small_model()
    ids = some_ids()
    assert_equal(model(inputs_embeds=model.model.embed_tokens(ids)).logits, model(ids).logits)
    for wrong in ({}, {"input_ids": ids, "inputs_embeds": model.model.embed_tokens(ids)}):
        with pytest.raises(Misuse, match=r"^pass exactly one of input_ids and inputs_embeds$"):
            model(**wrong)
