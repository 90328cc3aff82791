"""What one forward pass knows about its tokens, from the model's inputs."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from moestro.adapters.masks import layout, positions
from moestro.errors import Misuse
from moestro.routing import Batch


@dataclass
class TrainerBatch:
    """What a trainer knows of the whole batch and its model is not told."""

    items: Tensor | int | None = None
    """Label tokens over all micro-batches and ranks; None where sequences count alike and micro-batches are averaged
    (DPO, GRPO)."""
    computes_loss: bool = False
    """Whether the trainer's `compute_loss` runs: passes outside it are no part of the batch."""


def describe(inputs: dict[str, Any], domain: Tensor | None = None, *, shifts_labels: bool = True) -> Batch:
    """Return the batch of one forward pass; `shifts_labels`: position i is scored by label i + 1, as in causal losses.

    A sequence is a row, or what lies between two starts where several are packed into a row (moestro.adapters.masks).
    """
    tokens = inputs.get("input_ids")
    if tokens is None:
        tokens = inputs.get("inputs_embeds")
    if tokens is None:
        raise Misuse("the model must be called with input_ids or inputs_embeds")
    rows, length = tokens.shape[:2]
    found, position = layout(inputs, rows, length), positions(inputs.get("position_ids"), rows, length)
    label = label_positions(inputs, shifts_labels)
    if label is not None and label.shape != tokens.shape[:2]:
        label = None  # a trainer's own way to batch
    row = torch.arange(rows, device=tokens.device).repeat_interleave(length)
    return Batch(
        sequence=row if found.starts is None else found.starts.flatten().cumsum(0).to(row.device) - 1,
        num_sequences=rows if found.starts is None else rows * length,
        valid=None if found.valid is None else found.valid.flatten(),
        label=None if label is None else label.flatten(),
        position=None if position is None else position.flatten(),
        input_ids=inputs["input_ids"].flatten() if inputs.get("input_ids") is not None else None,
        domain=None if domain is None else domain.to(tokens.device).flatten(),
    )


def label_positions(inputs: dict[str, Any], shifts_labels: bool) -> Tensor | None:
    """True at each position that is scored, [batch, sequence]; None without labels."""
    if isinstance(shifted := inputs.get("shift_labels"), Tensor):
        return shifted != -100
    labels = inputs.get("labels")
    if not isinstance(labels, Tensor) or labels.ndim != 2:
        return None
    if not shifts_labels:
        return labels != -100
    shifted = torch.zeros_like(labels, dtype=torch.bool)
    shifted[:, :-1] = labels[:, 1:] != -100
    return shifted


def share_of_sequences(
    batch: Batch, items: Tensor | int | None, *, by_label: bool = True
) -> Float[Tensor, " sequences"]:
    """Each sequence's share of the whole batch: its label tokens / `items`, the whole batch's (None: this one's).

    Without labels, or where sequences shall count alike (not `by_label`), each has the same share of this pass.
    """
    zeros = torch.zeros(batch.num_sequences, device=batch.sequence.device)
    if batch.label is not None and by_label:
        own = zeros.index_add(0, batch.sequence, batch.label.float())
        everything = own.sum() if items is None else torch.as_tensor(items, device=own.device).float()
        return own / everything.clamp_min(1)
    valid = torch.ones_like(batch.sequence, dtype=torch.bool) if batch.valid is None else batch.valid
    present = (zeros.index_add(0, batch.sequence, valid.float()) > 0).float()
    return present / present.sum().clamp_min(1)
