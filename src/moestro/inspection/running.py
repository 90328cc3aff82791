"""What a user may say about an inspection, checked before torch and transformers are imported."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from moestro.errors import Misuse
from moestro.gate.ranges import BatchTokens, Length, check_fields

DEFAULT_MAX_BYTES = 256 * 2**10
"""Bytes of each domain that are read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """Settings for running the models."""

    tokenizer: str | None = None
    """Folder or name of a tokenizer of transformers. Default: each checkpoint's own."""
    sequence_length: Length | None = None
    """Tokens per row. Default: 512, or fewer if the model cannot take as many."""
    batch_tokens: BatchTokens = 4096
    """Tokens that run at once; MaxVio within a batch depends on it."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute dtype; auto measures whether bfloat16 is faster on this machine."""
    robustness: bool = False
    """Also run the text with each token's first expert disabled, in every layer singly and in all, with random experts
    in its place, and with noise on the router's logits: one pass for each."""

    def __post_init__(self) -> None:
        check_fields(self)


def check_number(specs: Sequence[str]) -> None:
    """Raise Misuse unless one or two checkpoints are named."""
    if not 1 <= len(specs) <= 2:
        raise Misuse(f"name one checkpoint, or two to set side by side, got {len(specs)}")
