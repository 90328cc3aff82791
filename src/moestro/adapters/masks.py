"""Find padding and the starts of sequences in a batch from the inputs that describe attention.

Models take a matrix of valid tokens, a mask of queries and keys (True, or 0 and not minus infinity, where a query may
attend), a BlockMask of flex attention, one of these per type of layer, or the bounds of sequences packed into rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from moestro.errors import Misuse

MASKED = -5000.0
"""Additive masks are below this where a query must not attend: minus infinity, a dtype's minimum, -1e9 or -1e4."""

BOUNDS = ("cu_seq_lens_q", "cu_seqlens_q", "cu_seq_lens", "cu_seqlens")
"""Names of the ends of packed sequences, counted over all tokens of the batch and beginning with 0."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The tokens of a batch of rows."""

    valid: Bool[Tensor, "rows length"] | None = None
    """False at padding; None means that every token is valid."""
    starts: Bool[Tensor, "rows length"] | None = None
    """True where a sequence begins; None means that a sequence is a row."""


def layout(inputs: Mapping[str, Any], rows: int, length: int) -> Layout:
    """Find padding and sequence starts in the inputs of a model that takes `rows` rows of `length` tokens.

    Padding comes from the mask. Starts come from the bounds of packed sequences; else from the mask; else, if no mask
    is given, from jumps in the positions.

    Raises:
        Misuse: the mask is of an unknown kind or shape, or marks all tokens as padding.
    """
    own = layout_of_mask(inputs.get("attention_mask"), rows, length)
    starts = starts_of_packing(inputs, rows, length)
    if starts is not None:
        return Layout(own.valid, starts)
    position = positions(inputs.get("position_ids"), rows, length)
    if own.valid is not None or position is None:
        return own
    return Layout(None, starts_at(position.diff(dim=1) != 1))


def positions(value: Any, rows: int, length: int) -> Int[Tensor, "rows length"] | None:
    """Return the positions of tokens. Multimodal positions are [4, rows, length], and the text's come first."""
    if isinstance(value, Tensor) and value.ndim == 3 and len(value) == 4:
        value = value[0]
    return value.expand(rows, length) if isinstance(value, Tensor) and value.ndim == 2 else None


def starts_at(begins: Bool[Tensor, "rows rest"]) -> Bool[Tensor, "rows length"]:
    """Put a start before `begins`, which lacks the first token of each row: that one always starts a sequence."""
    return torch.cat(
        [torch.ones_like(begins[:, :1]) if begins.shape[1] else begins.new_ones(len(begins), 1), begins], 1
    )


def starts_of_packing(inputs: Mapping[str, Any], rows: int, length: int) -> Bool[Tensor, "rows length"] | None:
    """Return where packed sequences start, from Mamba's `seq_idx` or FlashAttention's bounds; None without either."""
    index = inputs.get("seq_idx")
    if isinstance(index, Tensor) and index.ndim == 2:
        return starts_at(index.expand(rows, length).diff(dim=1) != 0)
    for bounds in (inputs.get(name) for name in BOUNDS):
        if isinstance(bounds, Tensor):
            place = torch.arange(rows * length, device=bounds.device)
            index = torch.searchsorted(bounds[1:].to(place.dtype).contiguous(), place, right=True).view(rows, length)
            return starts_at(index.diff(dim=1) != 0)
    return None


def layout_of_mask(mask: Any, rows: int, length: int) -> Layout:
    """Return padding and, unless the mask is a matrix of valid tokens, sequence starts. Raise Misuse if unsupported."""
    if isinstance(mask, Mapping):
        mask = mask_of_whole_rows(mask)
    if mask is None:
        return Layout()
    rows_fit = isinstance(mask, Tensor) and mask.ndim > 0 and mask.shape[0] in (1, rows)
    if rows_fit and mask.ndim == 2 and mask.shape[1] >= length:
        # With a cache the mask covers the past too; the tokens of this pass are its last columns.
        return Layout(mask[:, -length:].bool().expand(rows, length))
    if rows_fit and mask.ndim in (3, 4) and mask.shape[-2] == length <= mask.shape[-1]:
        return layout_of_pairs(allowed(mask), rows)
    if callable(getattr(mask, "mask_mod", None)):
        return layout_of_block_mask(mask, rows, length)
    got = f"one of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
    raise Misuse(
        "attention_mask must say which tokens are padding, as [batch, sequence], [batch, 1, queries, keys] or a "
        f"BlockMask, got {got} for {rows} rows of {length} tokens"
    )


def mask_of_whole_rows(masks: Mapping[str, Any]) -> Any:
    """Return the full-attention mask from a mapping with one mask per type of layer; else the first; None if empty."""
    given = {name: mask for name, mask in masks.items() if mask is not None}
    return given.get("full_attention", next(iter(given.values()), None))


def allowed(mask: Tensor) -> Bool[Tensor, "rows queries keys"]:
    """Return True where a query may attend to a key in at least one head."""
    may = mask > MASKED if mask.is_floating_point() else mask.bool()
    return may.any(1) if may.ndim == 4 else may


def layout_of_pairs(may: Bool[Tensor, "some queries keys"], rows: int) -> Layout:
    """Return the layout of a mask of queries and keys.

    A token that may not attend to itself is padding. So is a token that may attend to every key and that the row's
    last token may not attend to: for left padding, masks allow all keys to kernels that need at least one.
    """
    length = may.shape[1]
    past = may.shape[2] - length
    own = may.diagonal(past, dim1=1, dim2=2)
    valid = own & ~(may.all(2) & ~may[:, -1, past:])
    before = may[:, :, past:].gather(2, last_valid(valid)[:, :, None])[:, :, 0]
    return layout_of_valid(valid, before, rows)


def layout_of_block_mask(mask: Any, rows: int, length: int) -> Layout:
    """Return the layout of a BlockMask by evaluating its `mask_mod`."""
    past, device = mask.seq_lengths[1] - mask.seq_lengths[0], mask.kv_num_blocks.device
    row, token = torch.arange(rows, device=device), torch.arange(length, device=device)
    head = torch.zeros((), dtype=torch.long, device=device)

    def may(keys: Tensor) -> Tensor:
        def pair(row: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return mask.mask_mod(row, head, query, key + past)

        return torch.vmap(torch.vmap(pair, (None, 0, 0)), (0, None, 0))(row, token, keys)

    valid = may(token.expand(rows, length))
    return layout_of_valid(valid, may(last_valid(valid)), rows)


def last_valid(valid: Bool[Tensor, "some length"]) -> Int[Tensor, "some length"]:
    """Return the place of the last valid token before each token; its own place if there is none."""
    place = torch.arange(valid.shape[1], device=valid.device).expand_as(valid)
    last = place.masked_fill(~valid, -1).cummax(1).values.roll(1, 1)
    last[:, :1] = -1
    return torch.where(last < 0, place, last)


def layout_of_valid(valid: Bool[Tensor, "some length"], before: Bool[Tensor, "some length"], rows: int) -> Layout:
    """Return the layout of tokens of which some are valid; `before`: may attend to the last valid token before it.

    A valid token that may not do so starts a sequence. Padding never starts one. "some" is 1 or the number of rows.

    Raises:
        Misuse: no token is valid (not checked while torch compiles).
    """
    if not torch.compiler.is_compiling() and not bool(valid.any()):
        raise Misuse("attention_mask must let tokens attend to themselves, got one in which none may: all are padding")
    length = valid.shape[1]
    return Layout(valid.expand(rows, length), starts_at((valid & ~before)[:, 1:].expand(rows, length - 1)))
