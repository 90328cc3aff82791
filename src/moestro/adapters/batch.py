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
    """True while the trainer's `compute_loss` runs: passes outside it are not part of the batch."""


def describe(
    inputs: dict[str, Any], domain: Tensor | None = None, *, shifts_labels: bool = True, labels_tokens: bool = True
) -> Batch:
    """Return the batch of one forward pass.

    `shifts_labels`: label i + 1 scores position i, as in causal losses. `labels_tokens`: labels of the same shape as
    the tokens label tokens; false for classification of rows, which may have several labels each.
    A sequence is a row, or one packed sequence of a row (moestro.adapters.masks). In multiple choice,
    [batch, choices, sequence], every choice is a row.
    """
    inputs = with_choices_as_rows(inputs)
    tokens = inputs.get("input_ids")
    if tokens is None:
        tokens = inputs.get("inputs_embeds")
    if tokens is None:
        raise Misuse("the model must be called with input_ids or inputs_embeds")
    rows, length = tokens.shape[:2]
    found, position = layout(inputs, rows, length), positions(inputs.get("position_ids"), rows, length)
    label = label_positions(inputs, shifts_labels) if labels_tokens else None
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


def with_choices_as_rows(inputs: dict[str, Any]) -> dict[str, Any]:
    """Return multiple-choice inputs [batch, choices, sequence] with every choice as a row; other inputs unchanged."""
    if not isinstance(ids := inputs.get("input_ids"), Tensor) or ids.ndim != 3:
        return inputs
    given = {name: inputs.get(name) for name in ("input_ids", "attention_mask", "position_ids")}
    return inputs | {name: value.flatten(0, 1) for name, value in given.items() if isinstance(value, Tensor)}


def labels_of_rows(inputs: dict[str, Any], *, shifts_labels: bool) -> Float[Tensor, " labelled"] | None:
    """Return the number of labels in each row, counted as the Trainer counts items; None without labels.

    There may be one per row (classification, the answer's start), several (multi-label), or one per token.
    """
    shifted = inputs.get("shift_labels")
    labels = inputs.get("labels", inputs.get("start_positions")) if shifted is None else shifted
    if not isinstance(labels, Tensor):
        return None
    scored = labels != -100
    if shifts_labels and shifted is None and labels.ndim > 1:
        scored = scored[..., 1:]
    return scored.reshape(labels.shape[0] if labels.ndim else 1, -1).sum(1).float()


def share_of_sequences(
    batch: Batch,
    items: Tensor | int | None,
    *,
    by_label: bool = True,
    rows: Float[Tensor, " labelled"] | None = None,
) -> Float[Tensor, " sequences"]:
    """Return each sequence's share of the whole batch: its labels / `items`, the whole batch's (None: this pass's).

    Labels that are not one per token count by `rows`. Without labels, or where sequences shall count alike (not
    `by_label`), each has the same share of this pass. Raise Misuse if there are `items` and no labels.
    """
    zeros = torch.zeros(batch.num_sequences, dtype=torch.float32, device=batch.sequence.device)
    valid = torch.ones_like(batch.sequence, dtype=torch.bool) if batch.valid is None else batch.valid
    present = (zeros.index_add(0, batch.sequence, valid.float()) > 0).float()
    if not by_label or (items is None and batch.label is None and rows is None):
        return present / present.sum().clamp_min(1)
    if batch.label is not None:
        own = zeros.index_add(0, batch.sequence, batch.label.float())
    elif rows is not None:
        own = labels_of_sequences(rows.to(zeros.device), present)
    else:
        raise Misuse(
            "with num_items_in_batch the labels that it counts must be given too, as labels, shift_labels or "
            "start_positions: a row's share of the auxiliary losses is its labels / num_items_in_batch"
        )
    everything = own.sum() if items is None else torch.as_tensor(items, device=own.device).float()
    return own / everything.clamp_min(1)


def labels_of_sequences(
    rows: Float[Tensor, " labelled"], present: Float[Tensor, " sequences"]
) -> Float[Tensor, " sequences"]:
    """Return the number of labels of each sequence; sequences of one example (choices) share its labels equally.

    If the sequences do not divide evenly among the labelled rows, all sequences share all labels equally.
    """
    each, rest = divmod(len(present), len(rows))
    if rest:
        return present * rows.sum() / present.sum().clamp_min(1)
    parts = present.view(len(rows), each)
    return (parts * (rows / parts.sum(1).clamp_min(1))[:, None]).flatten()
