"""A tiny model whose hidden states have the outliers of real ones: most MLP outputs of length 100, a few of 14,000."""

import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from moestro.adapters import moe_layers, observe

TYPICAL, OUTLIER = 100.0, 14_000.0
MASSIVE = 0
"""The token whose MLP outputs are huge, and the coordinate of the hidden state that makes them so."""


def lengths(model: nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Length of each expert's output to each of its tokens, by layer: [tokens, k]."""
    found: dict[str, torch.Tensor] = {}
    with (
        torch.no_grad(),
        observe(model, lambda record: found.__setitem__(record.layer.name, record.outputs.norm(dim=-1)), outputs=True),
    ):
        model(input_ids=ids)
    return found


def outlier_model(seed: int = 0, layers: int = 3, **config: object) -> MixtralForCausalLM:
    """Scale, layer by layer, the rows and columns that bring MLP outputs to these lengths."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 4}
    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=64,
            num_hidden_layers=layers,
            num_local_experts=4,
            num_experts_per_tok=2,
            max_position_embeddings=64,
            use_cache=False,
            **(sizes | config),
        )
    ).train()
    ids = outlier_ids()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
        model.model.embed_tokens.weight[MASSIVE] = 0.0
        model.model.embed_tokens.weight[MASSIVE, MASSIVE] = 1e4  # the norm before each MLP turns it into sqrt(32)
        model.model.embed_tokens.weight[1:, MASSIVE] = 0.0
        for layer in moe_layers(model):
            layer.experts.gate_up_proj[:, :, MASSIVE].abs_()
            for _ in range(4):  # either scale moves the other's length
                layer.experts.down_proj.mul_(TYPICAL / lengths(model, ids)[layer.name].median())
                layer.experts.gate_up_proj[:, :, MASSIVE].mul_((OUTLIER / lengths(model, ids)[layer.name].max()) ** 0.5)
    return model


def outlier_ids(rows: int = 4, length: int = 16) -> torch.Tensor:
    """Rows of a text that repeats itself, each with the outlier token first, as real models have it."""
    ids = 1 + (torch.arange(rows)[:, None] * 5 + torch.arange(length)[None] * 3) % 63
    ids[:, 0] = MASSIVE
    return ids
