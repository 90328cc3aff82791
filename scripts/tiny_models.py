"""A tiny, randomly initialised model of every transformers package with routed experts.

`build("mixtral")` gives a model of three layers (at least two of them with routed experts), width 32 and 8 experts,
with a batch that its forward and backward take on the CPU in well under a second. The packages are those whose modeling
file decorates an experts class with `@use_experts_implementation`, found in the transformers that is installed, and
`OUTSIDE`: mixture-of-experts packages that do not take part in that interface.

    python scripts/tiny_models.py [package ...]
"""

import dataclasses
import importlib
import inspect
import re
import sys
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.configuration_utils import SubConfigSpec
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY, ROWS, LENGTH, PADDING = 64, 2, 12, 4
MODELS = Path(transformers.__file__).parent / "models"
HEADS = ("ForCausalLM", "ForConditionalGeneration", "ForBlockDiffusion", "ForTokenClassification")

# Packages with routed experts of their own, outside the experts interface.
OUTSIDE = ("dbrx", "doge", "jetmoe", "llama4", "longcat_flash", "nllb_moe", "step3p7", "switch_transformers")

# Names of the biases that enter the choice of experts but not their weights.
SELECTION_BIAS = r"correction_bias|expert_bias|balancing_bias|router_bias|moe_statics"

# The config attribute that holds the number of experts of one token: the first that the config has.
TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts", "moe_top_k")

# Any config takes those of these that it has.
GENERIC: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "model_max_length": 64,
    "sliding_window": 8,
    "use_cache": False,
    "tie_word_embeddings": False,
    # attention through low-rank latents, and its index of keys
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "index_topk": 8,
    "index_head_dim": 16,
    "index_n_heads": 2,
    # linear attention
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
    "mamba_dt_rank": 4,
    "use_mamba_kernels": False,
    # experts
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    **dict.fromkeys(TOP_K, 3),
    "n_group": 2,
    "num_expert_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 16,
    "shared_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "shared_experts_intermediate_size": 16,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    # one dense layer, then two sparse ones
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "mlp_layer_types": ["dense", "sparse", "sparse"],
    "num_nextn_predict_layers": 0,
    # nothing random but the weights
    "router_jitter_noise": 0.0,
    "dropout": 0.0,
    "dropout_rate": 0.0,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "classifier_dropout": 0.0,
    # towers for images and sound, which a text-only batch does not enter
    "depth": 1,
    "num_heads": 2,
    "out_hidden_size": 32,
    "patch_size": 4,
    "image_size": 16,
    "text_hidden_size": 32,
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What one package needs beside `GENERIC`: arguments of its (text) config, of its whole config, and a remark."""

    text: dict[str, Any] = dataclasses.field(default_factory=dict)
    whole: dict[str, Any] = dataclasses.field(default_factory=dict)  # a sub-config's own arguments under its name
    model: str | None = None
    note: str = ""


# What a package needs beside `GENERIC`.
INDEXED = ["linear_attention", "indexed_attention", "linear_attention"]
LINEAR = ["linear_attention", "full_attention", "linear_attention"]
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
SAM = {
    "mlp_dim": 32,
    "output_channels": 8,
    "downsample_channels": [8, 32],
    "window_size": 2,
    "global_attn_indexes": [0],
}
SINGLE = "one expert per token, by the family's design"

RECIPES: dict[str, Recipe] = {
    "axk2": Recipe(text={"gated_norm_rank": 4}),
    "bailing_hybrid": Recipe(text={"layer_types": LINEAR}),
    "dbrx": Recipe(
        whole={
            "d_model": 32,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 64,
            "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
            "ffn_config": {"ffn_hidden_size": 16},
        },
        note="all experts of a layer in flat matrices; the block chooses the experts, the router only gives logits",
    ),
    "deepseek_ocr2": Recipe(
        whole={"vision_config": {"sam_config": SAM, "encoder_config": {}}}, note="text only: the vision tower is idle"
    ),
    "deepseek_v4": Recipe(
        text={
            "head_dim": 16,
            "partial_rotary_factor": 0.5,
            "num_key_value_heads": 1,
            "o_groups": 2,
            "o_lora_rank": 8,
            "hc_mult": 2,
            "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
            "layer_types": ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
            "mlp_layer_types": ["hash_moe", "moe", "moe"],
        },
        note="the first layer's experts come from a fixed table by token id; its router gives only their weights",
    ),
    "diffusion_gemma": Recipe(
        text={"global_head_dim": 8, "final_logit_softcapping": 30.0},
        whole={"canvas_length": LENGTH, "tie_word_embeddings": True},
        note="block diffusion: no loss of its own, and every layer runs twice (prompt encoder and canvas decoder)",
    ),
    "doge": Recipe(
        text={"is_moe": True, "num_experts": 16, "keep_window_size": 64},
        note="product keys: two routers of 4 keys give 16 experts, rows of two embedding tables",
    ),
    "dots3_note": Recipe(
        text={
            "head_dim": 16,
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 4,
            "swa_q_lora_rank": 16,
            "swa_kv_lora_rank": 16,
            "swa_head_dim": 16,
            "swa_qk_nope_head_dim": 8,
            "swa_v_head_dim": 8,
        },
        note="the text model; the vision tower, with experts of its own, is left out",
    ),
    "ernie4_5_vl_moe": Recipe(
        text={"moe_intermediate_size": [16, 8], "rope_parameters": ROPE | {"mrope_section": [1, 1, 2]}},
        whole={"vision_config": {"temporal_merge_size": 1}},
        note="a second set of experts for image tokens, which a text-only batch leaves idle",
    ),
    "flint": Recipe(text={"mlp_only_layers": [0]}),
    "gemma4": Recipe(
        text={
            "enable_moe_block": True,
            "global_head_dim": 8,
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": VOCABULARY,
        },
        note="a dense MLP beside the experts in every layer; the decoder layer calls router and experts itself",
    ),
    "glm4v_moe": Recipe(
        text={"rope_parameters": ROPE | {"partial_rotary_factor": 1.0, "mrope_section": [1, 1, 2]}},
        note="text only: the vision tower is idle",
    ),
    "glm5_next": Recipe(
        text={"qk_rope_head_dim": 0, "head_dim": 0, "index_kpool": 4, "hc_mult": 2, "layer_types": INDEXED},
        whole={"vision_config": {"projection_intermediate_size": 32}},
        note="text only: the vision tower is idle",
    ),
    "granitemoehybrid": Recipe(text={"layer_types": LINEAR}),
    "inkling": Recipe(
        text={
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 2,
            "swa_head_dim": 8,
            "sliding_window_size": 8,
            "rel_extent": 16,
            "d_rel": 4,
            "logits_mup_width_multiplier": 1.0,
            "route_scale": 1.0,
        }
    ),
    "inkling2": Recipe(
        text={
            "unpadded_vocab_size": VOCABULARY,
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 2,
            "swa_head_dim": 8,
            "sliding_window_size": 8,
            "rel_extent": 16,
            "d_rel": 4,
            "route_scale": 1.0,
            "n_layers_per_attn_res_block": 2,
        }
    ),
    "jamba": Recipe(
        text={"expert_layer_offset": 0, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8},
        note="two Mamba layers with experts and, between them, a dense attention layer",
    ),
    "jetmoe": Recipe(
        text={"num_key_value_heads": 2, "kv_channels": 8},
        note="attention is a mixture of experts too, with a router of its own",
    ),
    "kimi_linear": Recipe(text={"layer_types": LINEAR}),
    "lfm2_moe": Recipe(text={"layer_types": ["conv", "full_attention", "conv"]}),
    "llama4": Recipe(note="released models take one expert per token; the scores scale the experts' inputs"),
    "longcat_flash": Recipe(
        text={"num_layers": 2, "ffn_hidden_size": 32, "expert_ffn_hidden_size": 16, "zero_expert_num": 4},
        note="4 of the router's 12 classes are identity experts",
    ),
    "minimax": Recipe(text={"block_size": 8}),
    "minimax_m3_vl": Recipe(
        text={
            "dense_intermediate_size": 32,
            "rotary_dim": 4,
            "index_block_size": 4,
            "index_topk_blocks": 2,
            "layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"],
        }
    ),
    "mistral_large4": Recipe(note="text only: the vision tower is idle"),
    "muse_spark": Recipe(
        text={"moe_hidden_size": 16},
        whole={
            "out_hidden_size": 32,
            "projector_hidden_size": 32,
            "audio_config": {"num_hidden_layers": 4, "hidden_sizes": [4, 4, 4, 4], "depths": [1, 1, 1, 1]},
        },
    ),
    "nemotron_h": Recipe(
        text={
            "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "ssm_state_size": 8,
            "n_groups": 2,
            "chunk_size": 8,
            "moe_shared_expert_intermediate_size": 16,
            "moe_latent_size": 16,
        },
        note="experts without a gate, in a latent space half the model's width",
    ),
    "nllb_moe": Recipe(
        text={
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_sparse_step": 1,
            "decoder_sparse_step": 1,
            "encoder_ffn_dim": 16,
            "decoder_ffn_dim": 16,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_layerdrop": 0.0,
            "decoder_layerdrop": 0.0,
            "moe_token_dropout": 0.0,
        },
        note="encoder and decoder; always two experts per token, and a capacity",
    ),
    "openai_privacy_filter": Recipe(
        text={"num_labels": VOCABULARY}, note="token classification with attention to both sides"
    ),
    "phimoe": Recipe(
        text={"num_experts_per_tok": 2, "router_jitter_noise": 0.5},
        note="always two experts, drawn at random in train mode; with jitter 0 the router would get no gradient",
    ),
    "qwen3_5_moe": Recipe(text={"layer_types": LINEAR}),
    "qwen3_next": Recipe(text={"layer_types": LINEAR}),
    "qwen3_omni_moe": Recipe(
        model="Qwen3OmniMoeThinkerForConditionalGeneration",
        whole={
            "vision_start_token_id": VOCABULARY,  # the released config has it, the class does not
            "vision_config": {"deepstack_visual_indexes": [0]},
            "audio_config": {
                "d_model": 32,
                "encoder_layers": 1,
                "encoder_attention_heads": 2,
                "encoder_ffn_dim": 32,
                "output_dim": 32,
                "downsample_hidden_size": 4,
            },
        },
        note="the thinker; text only: the towers for images and sound are idle",
    ),
    "qwen3_vl_moe": Recipe(
        whole={"vision_config": {"deepstack_visual_indexes": [0]}}, note="text only: the vision tower is idle"
    ),
    "qwen4_exp": Recipe(
        text={
            "hc_count": 2,
            "hc_lowrank": 4,
            "layer_types": INDEXED,
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 8,
            "indexer_budget": 8,
            "indexer_compress_ratio": 4,
        }
    ),
    "step3p7": Recipe(text={"share_expert_dim": 16, "num_sliding_attention_heads": 4}),
    "switch_transformers": Recipe(
        text={
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 16,
            "num_heads": 4,
            "num_layers": 2,
            "num_decoder_layers": 2,
            "num_sparse_encoder_layers": 2,
            "num_sparse_decoder_layers": 2,
            "decoder_start_token_id": 0,
        },
        note=f"encoder and decoder; {SINGLE}, with a capacity",
    ),
    "unlimited_ocr": Recipe(
        whole={"vision_config": {"sam_config": SAM, "encoder_config": {}}}, note="text only: the vision tower is idle"
    ),
    "zaya": Recipe(
        text={"num_experts_per_tok": 1, "router_hidden_size": 16},
        note=f"{SINGLE}; a ninth class of the router skips the experts, and a router sees the one before it",
    ),
}


@dataclass(frozen=True, kw_only=True)
class TinyModel:
    """A model in train mode and a batch with labels for it; `note` says what is unusual."""

    package: str
    model: nn.Module
    inputs: dict[str, torch.Tensor]
    note: str


@cache
def packages() -> list[str]:
    """The packages with routed experts: on the experts interface (by a search of the sources), then `OUTSIDE`."""
    decorated = re.compile(r"^@use_experts_implementation", re.MULTILINE)
    inside = {path.parent.name for path in MODELS.glob("*/modeling_*.py") if decorated.search(path.read_text())}
    return sorted(inside) + [name for name in OUTSIDE if (MODELS / name).is_dir()]


def build(
    package: str,
    *,
    seed: int = 0,
    top_k: int | None = None,
    experts_implementation: str | None = None,
    padded: bool = False,
) -> TinyModel:
    """A tiny model of `package` and a batch for it, the same for the same seed.

    With `padded` the second row ends in padding and the batch has an attention mask. Families that fix the number of
    experts per token (see the note) do not follow `top_k`.
    """
    recipe = RECIPES.get(package, Recipe())
    model_class = _model_class(package, recipe)
    generic = GENERIC if top_k is None else GENERIC | dict.fromkeys(TOP_K, top_k)
    config = _config(model_class.config_class, generic, recipe.text, recipe.whole)
    arguments = {} if experts_implementation is None else {"experts_implementation": experts_implementation}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class._from_config(config, dtype=torch.float32, **arguments)
        _randomise(model)
        inputs = _inputs(model, padded)
    return TinyModel(package=package, model=model.train(), inputs=inputs, note=recipe.note)


def _model_class(package: str, recipe: Recipe) -> type[PreTrainedModel]:
    """The package's causal language model, or the next best head that it has."""
    module = importlib.import_module(f"transformers.models.{package}.modeling_{package}")
    if recipe.model:
        return getattr(module, recipe.model)
    own = [c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == module.__name__]
    models = [c for c in own if issubclass(c, PreTrainedModel)]
    return next(c for head in HEADS for c in models if c.__name__.endswith(head))


def _config(
    kind: type[PreTrainedConfig], generic: dict[str, Any], text: dict[str, Any], whole: dict[str, Any]
) -> PreTrainedConfig:
    """A config of class `kind`, small throughout; `text` goes to its text config, or to itself if it has none."""
    fields = {field.name for field in dataclasses.fields(kind)}
    arguments = {name: value for name, value in generic.items() if name in fields}
    if "kv_lora_rank" in fields:
        arguments["num_key_value_heads"] = arguments["num_attention_heads"]  # one latent serves all heads
    arguments |= whole if "text_config" in fields else text | whole
    for name, default in (kind.sub_configs_defaults or kind.sub_configs).items():
        sub = CONFIG_MAPPING[default.model_type] if isinstance(default, SubConfigSpec) else default
        arguments[name] = _config(sub, generic, text if name == "text_config" else {}, whole.get(name, {}))
    return kind(**arguments)


@torch.no_grad()
def _randomise(model: nn.Module) -> None:
    """Matrices and selection biases drawn anew, so that routing is uneven and every loss has usable gradients."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("tid2eid"):  # DeepSeek-V4's table: the experts of every token id, all different
            experts = model.config.num_local_experts
            tensor.copy_(torch.rand(len(tensor), experts).argsort(dim=1)[:, : tensor.shape[1]])
        elif re.search(SELECTION_BIAS, name):
            tensor.add_(torch.randn_like(tensor), alpha=0.05)
        elif tensor.ndim > 1 and isinstance(tensor, nn.Parameter):
            tensor.normal_(std=0.2)


def _inputs(model: PreTrainedModel, padded: bool) -> dict[str, torch.Tensor]:
    """Two rows of text without special tokens, and labels if the model has a loss for them."""
    tokens = torch.randint(3, VOCABULARY, (ROWS, LENGTH))
    inputs = {"input_ids": tokens, "labels": tokens.clone()}
    if model.config.model_type == "diffusion_gemma":
        inputs = {"input_ids": tokens, "decoder_input_ids": torch.randint(3, VOCABULARY, (ROWS, LENGTH))}
    if padded:
        inputs["attention_mask"] = torch.ones_like(tokens)
        inputs["attention_mask"][-1, -PADDING:] = 0
        tokens[-1, -PADDING:] = 0
        if "labels" in inputs:
            inputs["labels"][-1, -PADDING:] = -100
    return inputs


def main(names: list[str]) -> None:
    """Builds and runs the named packages, or all of them."""
    for package in names or packages():
        start = time.perf_counter()
        try:
            tiny = build(package)
            output = tiny.model(**tiny.inputs)
            loss = output.loss if "labels" in tiny.inputs else output.logits.square().mean()
            loss.backward()
        except Exception as error:
            print(f"{package:22} FAILS  {type(error).__name__}: {str(error)[:300]}")
            continue
        size = sum(p.numel() for p in tiny.model.parameters())
        print(f"{package:22} {loss.item():8.3f} {size:9,} parameters {time.perf_counter() - start:5.2f} s  {tiny.note}")


if __name__ == "__main__":
    main(sys.argv[1:])
