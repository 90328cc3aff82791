"""Documents as one stream of tokens on disk, and rows of equal length cut from it.

The stream is `<eos> document <eos> document <eos> ...`: the end-of-text token closes a document and opens the next,
so that every token of every document is predicted from something. On disk it is four arrays, mapped into memory
when read.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int, Integer
from torch import Tensor
from torch.utils.data import Dataset

IGNORED = -100  # transformers' label for "not predicted"


def write_stream(
    folder: Path,
    documents: Sequence[Integer[np.ndarray, " _tokens"]],  # each of its own length
    *,
    end_of_text: int,
    vocabulary: int,
    domain: Sequence[int],
    num_bytes: Sequence[int],
) -> None:
    """Write tokenised documents to `folder` (made here): the stream, each document's first place, domain and bytes."""
    dtype = np.uint16 if vocabulary <= 2**16 else np.uint32
    end = np.array([end_of_text], dtype=dtype)
    pieces = [end] + [piece for tokens in documents for piece in (tokens.astype(dtype), end)]
    lengths = np.array([len(tokens) + 1 for tokens in documents], dtype=np.int64)  # with the end that closes it
    folder.mkdir(parents=True)
    np.save(folder / "tokens.npy", np.concatenate(pieces))
    np.save(folder / "starts.npy", 1 + np.cumsum(lengths) - lengths)
    np.save(folder / "domain.npy", np.array(domain, dtype=np.int64))
    np.save(folder / "bytes.npy", np.array(num_bytes, dtype=np.int64))


class PackedRows(Dataset[dict[str, Tensor]]):
    """Rows of `sequence_length` tokens: `{"input_ids", "labels"}`, with shapes ["tokens"] and dtype int64.

    `labels` are the ids themselves (transformers shifts them); the first of a row is never predicted and is -100.

    *Train rows* follow one another without overlap; the last partial row is dropped.

    *Held-out rows* (`every_token_once=True`) overlap by one token, and the last row ends with the stream, the
    tokens that the row before has predicted already being -100 there. So over one pass every token of every
    document, and the end-of-text token that closes it, is predicted exactly once, and there is no padding. These
    rows also hold `document` and `domain`: for each token the document whose text its prediction pays for (its
    closing end-of-text token included).

    `block_diagonal=True` adds `position_ids` that start again at each end-of-text token, which opens its block.
    transformers then masks attention across documents, as long as neither an attention mask nor a cache is given
    (`use_cache=False`).
    """

    def __init__(
        self, folder: Path, sequence_length: int, *, every_token_once: bool = False, block_diagonal: bool = False
    ) -> None:
        self.folder = folder
        self.sequence_length = sequence_length
        self.every_token_once = every_token_once
        self.block_diagonal = block_diagonal
        self.tokens = np.load(folder / "tokens.npy", mmap_mode="r")
        self.document_starts = np.load(folder / "starts.npy", mmap_mode="r")
        self.document_domain = np.load(folder / "domain.npy")
        self.document_bytes = np.load(folder / "bytes.npy")

    def __reduce__(self) -> tuple[object, ...]:
        """Workers that are spawned map the files again; pickling the arrays would copy the corpus to each."""
        return _open_rows, (self.folder, self.sequence_length, self.every_token_once, self.block_diagonal)

    @property
    def num_tokens(self) -> int:
        """Tokens of the stream, end-of-text tokens included."""
        return len(self.tokens)

    @property
    def document_tokens(self) -> Integer[np.ndarray, " documents"]:
        """Tokens of each document, with the end-of-text token that closes it."""
        return np.diff(self.document_starts, append=self.num_tokens)

    def __len__(self) -> int:
        if self.num_tokens < self.sequence_length:
            return 0
        if self.every_token_once:
            return -(-(self.num_tokens - 1) // (self.sequence_length - 1))
        return self.num_tokens // self.sequence_length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"row must lie between 0 and {len(self) - 1}, got {index}")
        wanted = index * (self.sequence_length - self.every_token_once)
        start = min(wanted, self.num_tokens - self.sequence_length)
        input_ids = torch.from_numpy(self.tokens[start : start + self.sequence_length].astype(np.int64))
        labels = input_ids.clone()
        labels[: wanted - start + 1] = IGNORED
        row = {"input_ids": input_ids, "labels": labels}
        if self.every_token_once:
            place = np.arange(start, start + self.sequence_length)
            document = np.maximum(np.searchsorted(self.document_starts, place, side="right") - 1, 0)
            row |= {
                "document": torch.from_numpy(document),
                "domain": torch.from_numpy(self.document_domain[document]),
            }
        if self.block_diagonal:
            row["position_ids"] = _positions(input_ids, end_of_text=int(self.tokens[0]))
        return row


def _positions(input_ids: Int[Tensor, " tokens"], end_of_text: int) -> Int[Tensor, " tokens"]:
    """Places counted from the start of the row or the last end of text, whichever is nearer."""
    place = torch.arange(len(input_ids))
    return place - torch.where(input_ids == end_of_text, place, 0).cummax(dim=0).values


def _open_rows(folder: Path, sequence_length: int, every_token_once: bool, block_diagonal: bool) -> PackedRows:
    return PackedRows(folder, sequence_length, every_token_once=every_token_once, block_diagonal=block_diagonal)
