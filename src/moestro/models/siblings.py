"""Stock siblings: the family of transformers that has the shape of one of our models, and export to it.

A stock family is described by traits in words: those that it always has and those that it can have. A model whose
traits lie between the two is that family's, with the same weights under other names; serving engines take it there.
"""

from collections.abc import Callable, Set
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from moestro.architecture.sub_layers import Dense, MoE
from moestro.errors import Misuse
from moestro.models.configuration import MoestroConfig
from moestro.models.modeling import MoestroForCausalLM

SHARED_FIELDS = [
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("hidden_act", "max_position_embeddings", "rope_parameters", "rms_norm_eps", "attention_dropout", "use_cache"),
    *("initializer_range", "tie_word_embeddings", "pad_token_id", "bos_token_id", "eos_token_id"),
]
"""Fields that mean the same in every family."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The feed-forward of a model in the terms of stock configs: one kind of MoE, one width of dense blocks."""

    config: MoestroConfig
    moe: MoE
    dense_width: int
    dense_blocks: list[int]

    @property
    def num_groups(self) -> int:
        """Groups of experts that limit the choice; 1 where every group is reachable."""
        rule = self.moe.router
        return rule.num_groups if rule.top_groups < rule.num_groups else 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A family of transformers: which models are its, the fields of its config, and its names for our modules."""

    model_type: str
    always: Set[str]
    can: Set[str] = frozenset()
    fields: Callable[[Shape], dict[str, Any]]
    names: tuple[tuple[str, str], ...]
    """Parts of our parameters' names and what stands there instead, tried in order; tensors of one name are stacked."""


def shape_of(config: MoestroConfig) -> Shape:
    """The first MoE and the first dense sub-layer stand for all; `traits` names what that leaves out."""
    entries = [entry for block in config.sub_layers for entry in block]
    return Shape(
        config=config,
        moe=next((e for e in entries if isinstance(e, MoE)), MoE(num_experts=1, top_k=1, width=8)),
        dense_width=next((e.width for e in entries if isinstance(e, Dense)), config.hidden_size),
        dense_blocks=[i for i, block in enumerate(config.sub_layers) if block and isinstance(block[0], Dense)],
    )


def traits(shape: Shape) -> frozenset[str]:
    """What a family must have to hold this shape, in words."""
    config, blocks = shape.config, shape.config.sub_layers
    present = {
        "query-key norm": config.qk_norm,
        "attention biases": config.attention_bias,
        "a sliding window": config.sliding_window is not None,
        "blocks of several sub-layers": any(len(block) > 1 for block in blocks),
        "blocks without a sub-layer": not all(blocks),
        "experts": config.has_experts,
    }
    if config.has_experts:
        present |= moe_traits(shape)
    entries = [entry for block in blocks for entry in block]
    present |= {
        "blocks with different experts": any(isinstance(e, MoE) and e != shape.moe for e in entries),
        "dense blocks of different widths": any(isinstance(e, Dense) and e.width != shape.dense_width for e in entries),
    }
    return frozenset(name for name, there in present.items() if there)


def moe_traits(shape: Shape) -> dict[str, bool]:
    """The traits that only models with experts have."""
    moe, rule, dense = shape.moe, shape.moe.router, shape.dense_blocks
    return {
        "sigmoid scores": rule.scores == "sigmoid",
        "unnormalised weights": not rule.renormalise,
        "a scale of the weights": rule.scale != 1,
        "a selection bias": rule.selection_bias,
        "group limits": shape.num_groups > 1,
        "groups of one expert": rule.scores == "sigmoid" and moe.num_experts // shape.num_groups < 2,
        "shared experts": moe.num_shared > 0,
        "a convex mix": moe.mix == "convex",
        "a shared width other than a multiple of the experts'": moe.total_shared_width % moe.width != 0,
        "dense blocks": bool(dense),
        "dense blocks behind MoE blocks": dense != list(range(len(dense))),
    }


def grouped_sigmoid_fields(shape: Shape) -> dict[str, Any]:
    """The config that DeepSeek-V3 began and dots1 and GLM-4.5 share."""
    moe, rule = shape.moe, shape.moe.router
    return {
        "intermediate_size": shape.dense_width,
        "moe_intermediate_size": moe.width,
        "n_routed_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "n_shared_experts": moe.total_shared_width // moe.width,
        "first_k_dense_replace": len(shape.dense_blocks),
        "n_group": shape.num_groups,
        "topk_group": rule.top_groups if shape.num_groups > 1 else 1,
        "norm_topk_prob": rule.renormalise,
        "routed_scaling_factor": rule.scale,
    }


def mixtral_fields(shape: Shape) -> dict[str, Any]:
    """The config of Mixtral, and of Granite's as far as it is the same."""
    moe = shape.moe
    return {
        "intermediate_size": moe.width,
        "num_local_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
    }


MLP_NAMES = (
    ("feed_forward_norm.0.", "post_attention_layernorm."),
    ("feed_forward.0.router.", "mlp.gate."),
    ("feed_forward.0.shared_expert.", "mlp.shared_experts."),
    ("feed_forward.0.", "mlp."),
)
GRANITE_NAMES = (
    ("feed_forward_norm.0.", "post_attention_layernorm."),
    ("feed_forward.0.shared_expert.gate_proj.", "shared_mlp.input_linear."),
    ("feed_forward.0.shared_expert.up_proj.", "shared_mlp.input_linear."),
    ("feed_forward.0.shared_expert.down_proj.", "shared_mlp.output_linear."),
    ("feed_forward.0.", "block_sparse_moe."),
)
GROUPED_SIGMOID = {"experts", "sigmoid scores", "shared experts"}
GROUPED_SIGMOID_CAN = {
    "unnormalised weights",
    "a scale of the weights",
    "a selection bias",
    "group limits",
    "dense blocks",
}

FAMILIES = (
    Family(
        model_type="llama",
        always=set(),
        fields=lambda shape: {"intermediate_size": shape.dense_width},
        names=MLP_NAMES,
    ),
    Family(
        model_type="qwen3",
        always={"query-key norm"},
        can={"attention biases"},
        fields=lambda shape: {
            "intermediate_size": shape.dense_width,
            "attention_bias": shape.config.attention_bias,
        },
        names=MLP_NAMES,
    ),
    Family(
        model_type="mixtral",
        always={"experts"},
        can={"a sliding window"},
        fields=lambda shape: mixtral_fields(shape) | {"sliding_window": shape.config.sliding_window},
        names=MLP_NAMES,
    ),
    Family(
        model_type="qwen3_moe",
        always={"experts", "query-key norm"},
        can={
            "unnormalised weights",
            "dense blocks",
            "dense blocks behind MoE blocks",
            "attention biases",
            "a sliding window",
        },
        fields=lambda shape: {
            "intermediate_size": shape.dense_width,
            "moe_intermediate_size": shape.moe.width,
            "num_experts": shape.moe.num_experts,
            "num_experts_per_tok": shape.moe.top_k,
            "norm_topk_prob": shape.moe.router.renormalise,
            "mlp_only_layers": shape.dense_blocks,
            "attention_bias": shape.config.attention_bias,
            "sliding_window": shape.config.sliding_window,
            "use_sliding_window": shape.config.sliding_window is not None,
        },
        names=MLP_NAMES,
    ),
    Family(
        model_type="granitemoeshared",
        always={"experts", "shared experts"},
        can={"a shared width other than a multiple of the experts'"},
        fields=lambda shape: (
            mixtral_fields(shape)
            | {
                "shared_intermediate_size": shape.moe.total_shared_width,
                "attention_multiplier": shape.config.head_dim**-0.5,  # type: ignore[operator]  # the config fills it in
                "embedding_multiplier": 1.0,
                "residual_multiplier": 1.0,
                "logits_scaling": 1.0,
            }
        ),
        names=GRANITE_NAMES,
    ),
    Family(
        model_type="dots1",
        always=GROUPED_SIGMOID | {"query-key norm"},
        can=GROUPED_SIGMOID_CAN | {"attention biases"},
        fields=lambda shape: (
            grouped_sigmoid_fields(shape) | {"attention_bias": shape.config.attention_bias, "sliding_window": None}
        ),
        names=MLP_NAMES,
    ),
    Family(
        model_type="glm4_moe",
        always=GROUPED_SIGMOID,
        can=GROUPED_SIGMOID_CAN,
        fields=lambda shape: (
            grouped_sigmoid_fields(shape)
            | {"use_qk_norm": False, "partial_rotary_factor": 1.0, "num_nextn_predict_layers": 0}
        ),
        names=MLP_NAMES,
    ),
)


def family_of(shape: Shape) -> Family:
    """The family whose traits the shape's lie between; Misuse, naming the nearest and why not, where there is none."""
    wanted = traits(shape)

    def obstacles(family: Family) -> list[str]:
        lacks = [f"has no {trait.removeprefix('a ')}" for trait in sorted(wanted - family.always - family.can)]
        return lacks + [f"always has {trait}" for trait in sorted(family.always - wanted)]

    nearest = min(FAMILIES, key=lambda family: len(obstacles(family)))
    if reasons := obstacles(nearest):
        raise Misuse(f"no stock model has this shape: the nearest, {nearest.model_type}, {' and '.join(reasons)}")
    return nearest


def stock_sibling(config: MoestroConfig) -> PreTrainedConfig:
    """The config of the stock family whose shape ours is; Misuse with the reason where there is none."""
    shape = shape_of(config)
    family = family_of(shape)
    shared = {name: getattr(config, name) for name in SHARED_FIELDS}
    return AutoConfig.for_model(family.model_type, **shared, **family.fields(shape))


def export_stock(model: MoestroForCausalLM, folder: str | PathLike[str]) -> None:
    """Save `model` as its stock sibling, which plain transformers loads and which computes the same logits.

    The stock model is built without memory of its own and borrows our tensors. Misuse where there is no sibling.
    """
    family = family_of(shape_of(model.config))
    Path(folder).mkdir(parents=True, exist_ok=True)  # save_pretrained writes nothing, without an error, over a file
    with torch.device("meta"):
        stock = AutoModelForCausalLM.from_config(stock_sibling(model.config))
    state = renamed(model.state_dict(), family.names)
    for name, buffer in stock.state_dict().items():
        # Where our rule has no selection bias, the family's is zero.
        if name.endswith("e_score_correction_bias") and name not in state:
            state[name] = torch.zeros(buffer.shape)
    stock.load_state_dict(state, assign=True)
    stock.tie_weights()
    stock.generation_config = model.generation_config
    stock.save_pretrained(folder)


def renamed(state: dict[str, Tensor], names: tuple[tuple[str, str], ...]) -> dict[str, Tensor]:
    """The state under the family's names; tensors that get one name are stacked (gate above up)."""
    parts: dict[str, list[Tensor]] = {}
    for name, tensor in state.items():
        for ours, theirs in names:
            name = name.replace(ours, theirs)
        parts.setdefault(name, []).append(tensor)
    return {name: tensors[0] if len(tensors) == 1 else torch.cat(tensors) for name, tensors in parts.items()}


__all__ = ["export_stock", "stock_sibling"]
