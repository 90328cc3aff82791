"""`MoestroForCausalLM` in training, and saved and loaded."""

import json
import warnings
from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from agreement import (
    COMPOSED,
    CONVEX,
    MOE,
    SHAPES,
    V3,
    assert_all_equal,
    assert_equal,
    block,
    every_shape,
    gradients,
    loss_and_gradients,
    run_fresh,
    small_model,
    some_ids,
)
from moestro import Dense, Misuse, MoE, MoestroForCausalLM
from moestro.models.layers import Router


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16 autocast"])
@pytest.mark.parametrize("name", COMPOSED)
def test_recomputation_routes_as_before(name, dtype):
    """To the last bit, in every sub-layer: a token that went elsewhere in A would send B elsewhere too."""
    model = small_model(**SHAPES[name]).train()
    model.activation_checkpointing_enable()
    seen = defaultdict(list)
    for path, module in model.named_modules():
        if isinstance(module, Router):
            module.register_forward_hook(lambda _, args, output, path=path: seen[path].append(output))
    ids = some_ids(4, 16)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    assert [len(runs) for runs in seen.values()] == [1] * len(seen)
    loss.backward()
    assert len(seen) == sum(isinstance(spec, MoE) for block in model.config.sub_layers for spec in block)
    for path, runs in seen.items():
        assert len(runs) == 2, path
        assert all(torch.equal(first, again) for first, again in zip(*runs, strict=True)), path


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


@every_shape
def test_a_saved_model_comes_back_whole(shape, tmp_path):
    model = small_model(**shape)
    model.save_pretrained(tmp_path)
    loaded, report = MoestroForCausalLM.from_pretrained(tmp_path, output_loading_info=True)  # type: ignore[misc]
    assert not any(report.values()), report
    ids = some_ids()
    assert torch.equal(loaded(ids).logits, model(ids).logits)


COMPILED = {"serial": [V3, CONVEX], "parallel": [MOE, CONVEX], "tied": [CONVEX, CONVEX], "shared-pool": [MOE, MOE]}


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a new process finds in a saved model; one process for all that needs one, for it takes seconds to start."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("fresh")
    ids = some_ids()
    expected = {"ids": ids}
    for composition, sub_layers in COMPILED.items():
        model = small_model(num_hidden_layers=1, feed_forward=[sub_layers], composition=composition)
        model.save_pretrained(folder / composition)
        expected[composition] = model(ids).logits.detach()
    torch.save(expected, folder / "expected.pt")
    script = """
import json, torch, moestro.models
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
expected = torch.load("expected.pt")
ids = expected.pop("ids")

def gradients(call, model):
    model.zero_grad()
    loss = call(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters()}

def examine(name):
    model = AutoModelForCausalLM.from_pretrained(name, experts_implementation="grouped_mm")
    assert type(model) is moestro.MoestroForCausalLM
    identical = torch.equal(model(ids).logits, expected[name])
    plain = gradients(model, model)
    torch.compiler.reset()
    compiled = gradients(torch.compile(model, fullgraph=True, backend="aot_eager"), model)
    errors = {name: ((compiled[name] - plain[name]).norm() / plain[name].norm()).item() for name in plain}
    return {"identical": identical, "errors": errors}

print(json.dumps({name: examine(name) for name in expected}))
"""
    return json.loads(run_fresh(script, folder).splitlines()[-1])


@pytest.mark.xdist_group("fresh")  # which is made once
@pytest.mark.parametrize("composition", COMPILED)
def test_logits_are_identical_in_a_fresh_process(fresh, composition):
    assert fresh[composition]["identical"]


@pytest.mark.xdist_group("fresh")
@pytest.mark.parametrize("composition", COMPILED)
def test_compiled_in_one_graph(fresh, composition):
    """Forward and backward without a graph break, equal to the uncompiled ones."""
    errors = fresh[composition]["errors"]
    assert len(errors) > 20
    assert max(errors.values()) <= 1e-5, errors
