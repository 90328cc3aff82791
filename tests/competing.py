"""A model of one MoE layer, small enough for plain loops, and what competition does to it."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from moestro import AuxLosses, LayerRecord, MoE, MoestroConfig, RouterRule, observe, reference
from moestro.models.layers import SparseMoE


class OneLayer(nn.Module):
    """Embeddings and one layer; its loss is a fixed linear function of the layer's output, zero at padding."""

    def __init__(self, num_experts: int = 4, top_k: int = 2, seed: int = 0, **rule: Any) -> None:
        super().__init__()
        torch.manual_seed(seed)
        spec = MoE(num_experts=num_experts, top_k=top_k, width=8, router=RouterRule(**rule))
        config = MoestroConfig(
            vocab_size=64, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, feed_forward=[[spec]]
        )
        self.embed = nn.Embedding(64, 8)
        self.layer = SparseMoE(config, spec)
        for parameter in self.layer.parameters():
            nn.init.normal_(parameter, std=0.7)
        self.register_buffer("direction", torch.randn(64, 64, 8))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, offset: int = 0) -> Any:
        """`offset`: which rows of a larger batch these are."""
        output = self.layer(self.embed(input_ids))
        rows, length = input_ids.shape
        weight = self.direction[offset : offset + rows, :length]
        if attention_mask is not None:
            weight = weight * attention_mask.unsqueeze(-1)
        return SimpleNamespace(loss=(output * weight).sum(), output=output)

    def experts(self) -> list[reference.ExpertWeights]:
        """The experts' weights, for the reference."""
        experts = self.layer.experts
        pairs = zip(experts.gate_up_proj, experts.down_proj, strict=True)
        return [reference.ExpertWeights(*gate_up.chunk(2), down) for gate_up, down in pairs]


def batch(rows: int, length: int, seed: int = 0, padded: bool = False) -> dict[str, Tensor]:
    """Random tokens; rows of random lengths where padded."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(64, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        mask = (torch.arange(length)[None] < torch.randint(1, length + 1, (rows, 1), generator=generator)).long()
    return {"input_ids": ids, "attention_mask": mask}


def run(model: nn.Module, aux: AuxLosses, **inputs: Tensor) -> tuple[dict[str, Tensor], list[LayerRecord]]:
    """Loss and gradients of one pass, and its records."""
    records: list[LayerRecord] = []
    model.zero_grad()
    with aux.attach(model), observe(model, records.append):
        loss = model(**inputs).loss
        loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **gradients}, records


def observed(model: nn.Module, inputs: dict[str, Tensor]) -> list[LayerRecord]:
    """The records of one pass."""
    records: list[LayerRecord] = []
    with observe(model, records.append):
        model(**inputs)
    return records
