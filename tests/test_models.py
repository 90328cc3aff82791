"""`MoestroForCausalLM` is a model of transformers like any other."""

import json
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from agreement import (
    CPU_BACKENDS,
    assert_all_equal,
    assert_equal,
    block,
    gradients,
    run_fresh,
    small_config,
    small_model,
)
from moestro import Dense, Misuse, MoE, MoestroConfig, MoestroForCausalLM, MoestroModel, RouterRule

MOE = MoE(num_experts=4, top_k=2, width=16, num_shared=1)
V3 = MoE(
    num_experts=8,
    top_k=2,
    width=8,
    num_shared=2,
    router=RouterRule(scores="sigmoid", scale=2.5, selection_bias=True, num_groups=4, top_groups=2),
)
CONVEX = MoE(num_experts=4, top_k=2, width=8, num_shared=1, mix="convex")
SHAPES = {
    "plain": {},
    "dense": {"feed_forward": [[Dense(width=24)], [Dense(width=40)]]},
    "no query-key norm, untied": {"qk_norm": False, "tie_word_embeddings": False},
    "sigmoid, dense first": {"feed_forward": [[Dense(width=24)], [V3]]},
    "two sub-layers, convex": {
        "feed_forward": [[MoE(num_experts=4, top_k=2, width=8, num_shared=1, mix="convex")] * 2] * 2
    },
    "one key-value head, wide heads": {"num_key_value_heads": 1, "head_dim": 16},
    "biases": {"attention_bias": True},
}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


def some_ids(rows: int = 2, length: int = 9) -> Tensor:
    return torch.randint(1, 64, (rows, length))


def loss_and_gradients(model: MoestroForCausalLM, ids: Tensor, **inputs) -> dict[str, Tensor]:
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids, **inputs).loss
    loss.backward()
    return {"loss": loss.detach()} | gradients(model)


def test_auto_classes_know_the_family(tmp_path):
    config = small_config()
    config.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), MoestroConfig)
    assert isinstance(AutoModelForCausalLM.from_config(config), MoestroForCausalLM)
    assert isinstance(AutoModel.from_config(config), MoestroModel)


@every_shape
def test_config_survives_its_file(shape, tmp_path):
    config = small_config(**shape)
    config.save_pretrained(tmp_path)
    assert MoestroConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    assert MoestroConfig.from_pretrained(tmp_path).sub_layers == config.sub_layers


@every_shape
def test_initialisation_leaves_nothing_out(shape):
    """Every matrix is drawn with `initializer_range`, norms are one, biases zero."""
    model = MoestroForCausalLM(small_config(**shape, initializer_range=0.05))
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "norm" in name:
            assert (tensor == 1).all(), name
        elif "bias" in name:
            assert (tensor == 0).all(), name
        elif "inv_freq" not in name:
            assert 0.03 < tensor.std().item() < 0.07, name


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
    model = small_model(**SHAPES["two sub-layers, convex"], num_hidden_layers=2)
    layer = block(model, 0)
    hidden = torch.randn(2, 5, 32)
    rotary = model.model.rotary_emb(hidden, torch.arange(5)[None])
    inputs = {"position_embeddings": rotary, "attention_mask": None}
    expected = hidden + layer.self_attn(layer.input_layernorm(hidden), **inputs)[0]
    expected = expected + layer.feed_forward[0](layer.feed_forward_norm[0](expected))
    expected = expected + layer.feed_forward[1](layer.feed_forward_norm[1](expected))
    assert_equal(layer(hidden, **inputs), expected)


# --- backends ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_experts_backends_agree(backend):
    model = small_model(feed_forward=[[Dense(width=24)], [V3]])
    ids = some_ids()
    model.set_experts_implementation("eager")
    expected = loss_and_gradients(model, ids)
    model.set_experts_implementation(backend)
    assert block(model, 1).feed_forward[0].experts.config._experts_implementation == backend
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


# --- training ---------------------------------------------------------------------------------------------------------


@every_shape
@pytest.mark.parametrize("given", [None, {"preserve_rng_state": False}], ids=["default", "other options"])
def test_checkpointing_changes_no_gradient(shape, given):
    model = small_model(**shape).train()
    ids = some_ids()
    expected = loss_and_gradients(model, ids, use_cache=False)
    calls = []
    for index in range(2):
        block(model, index).self_attn.register_forward_hook(lambda *_: calls.append(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.activation_checkpointing_enable(given)
        actual = loss_and_gradients(model, ids, use_cache=False)
    assert len(calls) == 4  # two layers, each run again
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.parametrize("enable", ["activation_checkpointing_enable", "gradient_checkpointing_enable"])
@pytest.mark.parametrize("value", [True, None])
def test_reentrant_checkpointing_is_refused(enable, value):
    with pytest.raises(Misuse) as refusal:
        getattr(small_model(), enable)({"use_reentrant": value})
    assert str(refusal.value) == (
        "checkpointing must not be reentrant (auxiliary losses would lose their gradient): "
        f'pass {{"use_reentrant": False}}, got use_reentrant={value}'
    )


@pytest.mark.parametrize(
    "given",
    [{}, {"num_items_in_batch": 11}, {"shift_labels": torch.arange(27).view(3, 9)}],
    ids=["plain", "per item", "shifted"],
)
@every_shape
def test_chunked_loss_is_the_loss(shape, given):
    model = small_model(**shape).train()
    ids = some_ids(3, 9)
    labels = ids.clone()
    labels[0, :4] = labels[1, 6:] = -100

    def run() -> dict[str, Tensor]:
        model.zero_grad()
        outputs = model(input_ids=ids, labels=labels, **given)
        assert (outputs.logits is None) == model.chunked_loss
        outputs.loss.backward()
        return {"loss": outputs.loss.detach()} | gradients(model)

    expected = run()
    model.chunked_loss = True
    assert_all_equal(run(), expected)


def test_chunked_loss_leaves_evaluation_alone():
    model = small_model()
    model.chunked_loss = True
    assert model(input_ids=some_ids(), labels=some_ids()).logits is not None


def test_loss_per_item_is_the_mean_over_labels():
    model = small_model()
    ids = some_ids(2, 9)
    assert_equal(model(ids, labels=ids, num_items_in_batch=16).loss, model(ids, labels=ids).loss)


def test_router_logits_on_request():
    model = small_model(feed_forward=[[Dense(width=24)], [MOE, MOE]])
    ids = some_ids(2, 9)
    assert model(ids).router_logits is None
    outputs = model(ids, output_router_logits=True, output_hidden_states=True)
    assert [tuple(logits.shape) for logits in outputs.router_logits] == [(18, 4)] * 2
    assert len(outputs.hidden_states) == 3
    assert not torch.equal(outputs.router_logits[0], outputs.router_logits[1])
    asked = small_model(feed_forward=[[Dense(width=24)], [MOE, MOE]], output_router_logits=True)
    assert len(asked(ids).router_logits) == 2


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_bf16_runs_and_keeps_its_selection_bias_in_fp32(attention, tmp_path):
    small_model(feed_forward=[[V3], [V3]]).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, attn_implementation=attention)
    router = block(model, 0).feed_forward[0].router
    assert router.weight.dtype == torch.bfloat16 and router.e_score_correction_bias.dtype == torch.float32
    logits = model(some_ids()).logits
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()


# --- files ------------------------------------------------------------------------------------------------------------


@every_shape
def test_a_saved_model_comes_back_whole(shape, tmp_path):
    model = small_model(**shape)
    model.save_pretrained(tmp_path)
    loaded, report = MoestroForCausalLM.from_pretrained(tmp_path, output_loading_info=True)  # type: ignore[misc]
    assert not any(report.values()), report
    ids = some_ids()
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a new process finds in a saved model; one process for all that needs one, for it takes seconds to start."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("fresh")
    model = small_model(num_hidden_layers=1, feed_forward=[[V3, CONVEX]])
    model.save_pretrained(folder / "model")
    ids = some_ids()
    torch.save({"ids": ids, "logits": model(ids).logits.detach()}, folder / "expected.pt")
    script = """
import json, torch, moestro
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
expected = torch.load("expected.pt")
ids = expected["ids"]
model = AutoModelForCausalLM.from_pretrained("model", experts_implementation="grouped_mm")
assert type(model) is moestro.MoestroForCausalLM
identical = torch.equal(model(ids).logits, expected["logits"])

def gradients(call):
    model.zero_grad()
    loss = call(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters()}

plain = gradients(model)
compiled = gradients(torch.compile(model, fullgraph=True, backend="aot_eager"))
errors = {name: ((compiled[name] - plain[name]).norm() / plain[name].norm()).item() for name in plain}
print(json.dumps({"identical": identical, "errors": errors}))
"""
    return json.loads(run_fresh(script, folder).splitlines()[-1])


def test_logits_are_identical_in_a_fresh_process(fresh):
    assert fresh["identical"]


def test_compiled_in_one_graph(fresh):
    """Forward and backward without a graph break, equal to the uncompiled ones."""
    assert len(fresh["errors"]) > 20
    assert max(fresh["errors"].values()) <= 1e-5, fresh["errors"]


# --- what is refused --------------------------------------------------------------------------------------------------

ROUTED = {"num_experts": 4, "top_k": 2, "width": 16}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (ROUTED | {"top_k": 5}, "top_k must lie between 1 and num_experts (4), got 5"),
        (ROUTED | {"num_experts": 0}, "num_experts must be at least 1, got 0"),
        (ROUTED | {"width": 12}, "width of an expert must be a multiple of 8, got 12"),
        (ROUTED | {"width": 0}, "width of an expert must be a multiple of 8, got 0"),
        (ROUTED | {"num_shared": -1}, "num_shared must be 0 or more, got -1"),
        (ROUTED | {"num_shared": 1, "shared_width": 0}, "shared_width must be at least 1, got 0"),
        (ROUTED | {"mix": "mean"}, "mix must be sum or convex, got 'mean'"),
        (ROUTED | {"mix": "convex"}, "mix = convex needs a shared expert: num_shared must be at least 1, got 0"),
        (ROUTED | {"router": {"num_groups": 3}}, "num_groups must divide num_experts (4), got 3"),
        (
            ROUTED | {"router": {"tok_k": 3}},
            "unknown field 'tok_k' in a router; it takes num_groups, renormalise, scale, scores, selection_bias, "
            "top_groups",
        ),
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
        ({"num_key_value_heads": 0}, "num_key_value_heads must divide num_attention_heads (4), got 0"),
        ({"num_attention_heads": 0}, "num_attention_heads must be at least 1, got 0"),
        (
            {"num_attention_heads": 3, "num_key_value_heads": 3},
            "num_attention_heads must divide hidden_size (32), got 3",
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
