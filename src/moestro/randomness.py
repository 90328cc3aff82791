"""Random numbers without a state: functions of what is named and of the tokens, and of nothing else.

They are the same on every rank, under any cut of the batch, in a recomputation and after a resume.
"""

import hashlib

import torch
from jaxtyping import Int
from torch import Tensor

from moestro.routing import Batch

HASH_FACTORS = (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)
"""Of splitmix64's last step, as signed numbers."""


def number_of(name: str) -> int:
    """64 bits that stand for a name, as a signed number."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little", signed=True)


def content(batch: Batch) -> Int[Tensor, " tokens"]:
    """A number for each token that stands for all tokens of its sequence and its place among them."""
    assert batch.input_ids is not None
    valid = torch.ones_like(batch.sequence) if batch.valid is None else batch.valid.long()
    before = valid.cumsum(0) - valid
    start = torch.full((batch.num_sequences,), len(valid), device=valid.device)
    place = before - start.scatter_reduce(0, batch.sequence, before, "amin")[batch.sequence]
    own = hashed(hashed(batch.input_ids.long()) + place) * valid
    whole = torch.zeros_like(start).index_add_(0, batch.sequence, own)
    return hashed(whole)[batch.sequence] + place


def hashed(key: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """64 well mixed bits of each number (splitmix64), in integers that wrap around."""
    key = key - 0x61C8864680B583EB
    for shift, factor in zip((30, 27), HASH_FACTORS, strict=True):
        key = (key ^ shifted(key, shift)) * factor
    return key ^ shifted(key, 31)


def shifted(key: Int[Tensor, "*shape"], by: int) -> Int[Tensor, "*shape"]:
    """The bits moved down, zeros above them."""
    return (key >> by) & (2 ** (64 - by) - 1)
