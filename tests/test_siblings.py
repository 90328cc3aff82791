"""Export to stock families: plain transformers, without this package, computes the same logits."""

import json
from typing import Any

import pytest
import torch

from agreement import run_fresh, small_config, small_model
from command_line import moestro
from moestro import Dense, Misuse, MoE, RouterRule
from moestro.models.siblings import export_stock, stock_sibling

SOFTMAX = MoE(num_experts=6, top_k=2, width=16)
SHARED = MoE(num_experts=6, top_k=2, width=16, num_shared=1, shared_width=24)
SIGMOID = MoE(num_experts=6, top_k=2, width=8, num_shared=2, router=RouterRule(scores="sigmoid"))
V3 = MoE(
    num_experts=8,
    top_k=3,
    width=8,
    num_shared=1,
    shared_width=24,
    router=RouterRule(scores="sigmoid", scale=2.5, selection_bias=True, num_groups=4, top_groups=2, renormalise=False),
)
RAW = RouterRule(renormalise=False)
UNLIMITED = RouterRule(num_groups=3, top_groups=3)
DENSE = Dense(width=24)


def blocks(*sub_layers: Dense | MoE) -> list[list[Dense | MoE]]:
    return [[sub_layer] for sub_layer in sub_layers]


EXPORTS = {
    "llama": ("llama", {"feed_forward": blocks(DENSE, DENSE), "qk_norm": False, "head_dim": 16}),
    "qwen3": ("qwen3", {"feed_forward": blocks(DENSE, DENSE), "attention_bias": True}),
    "mixtral": ("mixtral", {"feed_forward": blocks(SOFTMAX, SOFTMAX), "qk_norm": False, "tie_word_embeddings": False}),
    "mixtral-window": (
        "mixtral",
        {"feed_forward": blocks(SOFTMAX, SOFTMAX), "qk_norm": False, "sliding_window": 4, "head_dim": 16},
    ),
    "mixtral-groups-without-limit": (
        "mixtral",
        {"feed_forward": blocks(*[MoE(num_experts=6, top_k=2, width=16, router=UNLIMITED)] * 2), "qk_norm": False},
    ),
    "qwen3_moe": ("qwen3_moe", {"feed_forward": blocks(SOFTMAX, SOFTMAX), "tie_word_embeddings": False}),
    "qwen3_moe-mixed": (
        "qwen3_moe",
        {
            "feed_forward": blocks(MoE(num_experts=4, top_k=2, width=16, router=RAW), DENSE),
            "attention_bias": True,
            "sliding_window": 4,
            "head_dim": 16,
            "num_key_value_heads": 1,
        },
    ),
    "granite": ("granitemoeshared", {"feed_forward": blocks(SHARED, SHARED), "qk_norm": False, "head_dim": 16}),
    "dots1": ("dots1", {"feed_forward": blocks(DENSE, V3), "tie_word_embeddings": False, "attention_bias": True}),
    "dots1-plain": ("dots1", {"feed_forward": blocks(SIGMOID, SIGMOID), "head_dim": 16}),
    "glm4_moe": ("glm4_moe", {"feed_forward": blocks(DENSE, V3), "qk_norm": False, "head_dim": 16}),
    "rope": (
        "glm4_moe",
        {
            "feed_forward": blocks(SIGMOID, SIGMOID),
            "qk_norm": False,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0},
            "rms_norm_eps": 1e-2,
            "hidden_act": "gelu",
        },
    ),
}


def test_exports_load_in_plain_transformers_with_the_same_logits(tmp_path):
    """All families in one process that cannot import this package: a process takes seconds to start."""
    ids = torch.randint(64, (2, 9))
    expected = {}
    for name, (_, changes) in EXPORTS.items():
        torch.manual_seed(1)
        model = small_model(**changes)
        before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        export_stock(model, tmp_path / name)
        assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
        expected[name] = model(ids).logits.detach()
    torch.save({"ids": ids, "logits": expected}, tmp_path / "expected.pt")
    script = """
import json, sys
sys.modules["moestro"] = None  # importing it now raises ImportError
import torch
from transformers import AutoModelForCausalLM
saved, report = torch.load("expected.pt"), {}
for name, logits in saved["logits"].items():
    model, loading = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True)
    assert not any(loading.values()), (name, loading)
    with torch.no_grad():
        error = (model(saved["ids"]).logits - logits).norm() / logits.norm()
    tied = model.lm_head.weight is model.get_input_embeddings().weight
    report[name] = model.config.model_type, error.item(), tied
print(json.dumps(report))
"""
    report = json.loads(run_fresh(script, tmp_path).splitlines()[-1])
    for name, (family, changes) in EXPORTS.items():
        model_type, error, tied = report[name]
        assert model_type == family, name
        assert error <= 1e-5, f"{name}: relative error {error:.1e}"
        assert tied == changes.get("tie_word_embeddings", True), name


def test_an_export_keeps_dtype_and_generation_settings(tmp_path):
    model = small_model(feed_forward=blocks(SOFTMAX, SOFTMAX)).bfloat16()
    assert model.generation_config is not None
    model.generation_config.eos_token_id = 7
    export_stock(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == 7


def test_exported_tensors_are_borrowed_not_copied(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(
        "transformers.PreTrainedModel.save_pretrained", lambda self, folder: seen.update(self.state_dict())
    )
    model = small_model(feed_forward=blocks(SOFTMAX, SOFTMAX))
    export_stock(model, tmp_path)
    ours = {tensor.data_ptr() for tensor in model.state_dict().values()}
    assert seen and all(tensor.data_ptr() in ours for tensor in seen.values())


def with_moe(**changes) -> dict:
    """Two blocks of one changed MoE, without query-key norm."""
    fields: dict[str, Any] = {"num_experts": 6, "top_k": 2, "width": 16} | changes
    return {"feed_forward": blocks(*[MoE(**fields)] * 2), "qk_norm": False}


@pytest.mark.parametrize(
    ("changes", "nearest"),
    [
        (with_moe(router=RouterRule(scale=2.0)), "mixtral, has no scale of the weights"),
        (with_moe(router=RouterRule(selection_bias=True)), "mixtral, has no selection bias"),
        (with_moe(router=RouterRule(num_groups=3)), "mixtral, has no group limits"),
        (with_moe(router=RAW), "mixtral, has no unnormalised weights"),
        (with_moe() | {"feed_forward": blocks(DENSE, SOFTMAX)}, "mixtral, has no dense blocks"),
        (with_moe(num_shared=1, mix="convex"), "granitemoeshared, has no convex mix"),
        (with_moe(num_shared=1) | {"qk_norm": True}, "qwen3_moe, has no shared experts"),
        (with_moe(router=RouterRule(scores="sigmoid")), "mixtral, has no sigmoid scores"),
        (
            with_moe(router=RouterRule(scores="sigmoid", selection_bias=True)) | {"qk_norm": True},
            "dots1, always has shared experts",
        ),
        (
            with_moe(num_shared=1, shared_width=20, router=RouterRule(scores="sigmoid")),
            "granitemoeshared, has no sigmoid scores",
        ),
        (
            with_moe(num_shared=1, router=RouterRule(scores="sigmoid", num_groups=6, top_groups=3)),
            "glm4_moe, has no groups of one expert",
        ),
        (
            with_moe(num_experts=1, top_k=1, num_shared=1, router=RouterRule(scores="sigmoid")),
            "glm4_moe, has no groups of one expert",
        ),
        (with_moe() | {"feed_forward": [[SOFTMAX, SOFTMAX]] * 2}, "mixtral, has no blocks of several sub-layers"),
        (with_moe() | {"feed_forward": [[], [SOFTMAX]]}, "mixtral, has no blocks without a sub-layer"),
        (
            {"feed_forward": blocks(SOFTMAX, MoE(num_experts=4, top_k=2, width=16))},
            "qwen3_moe, has no blocks with different experts",
        ),
        (
            {"feed_forward": blocks(DENSE, Dense(width=40))},
            "qwen3, has no dense blocks of different widths",
        ),
        ({"feed_forward": blocks(SIGMOID, DENSE)}, "dots1, has no dense blocks behind MoE blocks"),
        ({"feed_forward": blocks(DENSE, DENSE), "sliding_window": 4}, "qwen3, has no sliding window"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_shapes_that_no_stock_model_has_are_refused_with_the_reason(changes, nearest, tmp_path):
    with pytest.raises(Misuse) as refusal:
        stock_sibling(small_config(**changes))
    assert str(refusal.value) == f"no stock model has this shape: the nearest, {nearest}"
    with pytest.raises(Misuse):
        export_stock(small_model(**changes), tmp_path / "export")
    assert not (tmp_path / "export").exists()


def test_a_recipe_without_a_sibling_is_refused_before_it_is_trained(tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    assert moestro(monkeypatch, "train", "cartesian", "--export-stock", "--out", str(out)) == 2
    assert capsys.readouterr().err.startswith("moestro: no stock model has this shape")
    assert not out.exists()


def test_an_export_over_a_file_is_an_error_that_keeps_the_file(tmp_path):
    (tmp_path / "stock").write_text("mine")
    with pytest.raises(FileExistsError):
        export_stock(small_model(feed_forward=blocks(SOFTMAX, SOFTMAX)), tmp_path / "stock")
    assert (tmp_path / "stock").read_text() == "mine"
