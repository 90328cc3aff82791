"""Documents as one stream of tokens on disk, and rows of equal length cut from it.

The stream is `<eos> document <eos> document <eos> ...`: the end-of-text token closes a document and opens the next,
so that every token of every document is predicted from something. On disk it is four arrays, mapped into memory
when read.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int, Integer
from torch import Tensor
from torch.utils.data import Dataset

from moestro.data.cache import replace_text

_PER_DOCUMENT = ("starts", "domain", "bytes")
_WRITTEN = "written.json"  # how much of the arrays is complete

IGNORED = -100  # transformers' label for "not predicted"


class StreamWriter:
    """Write the stream: append documents, and flush them to disk.

    A writer that opens the folder of a killed one continues after its last flush.
    """

    def __init__(self, folder: Path, *, end_of_text: int, vocabulary: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._end = end_of_text
        self._vocabulary = vocabulary
        self._state = folder / _WRITTEN
        tokens = np.uint16 if vocabulary <= 2**16 else np.uint32
        written = json.loads(self._state.read_text()) if self._state.exists() else {"documents": 0, "tokens": 0}
        self.documents: int = written["documents"]
        self._tokens = _GrowingArray(folder / "tokens.npy", tokens, written["tokens"])
        self._others = [_GrowingArray(folder / f"{name}.npy", np.int64, self.documents) for name in _PER_DOCUMENT]
        self._new: list[tuple[Integer[np.ndarray, " _tokens"], int, int]] = []

    def append(self, tokens: Integer[np.ndarray, " _tokens"], domain: int, num_bytes: int) -> None:
        """Add a document. Raise ValueError for an id beyond the vocabulary."""
        if len(tokens) and int(tokens.max()) >= self._vocabulary:
            raise ValueError(f"ids must be below the vocabulary of {self._vocabulary}, got {int(tokens.max())}")
        self._new.append((tokens, domain, num_bytes))

    def flush(self) -> None:
        """Write all appended documents to disk."""
        if self._tokens.length == 0:
            self._tokens.extend([self._end])
        lengths = np.array(
            [len(tokens) + 1 for tokens, _, _ in self._new], dtype=np.int64
        )  # with the end that closes it
        starts = self._tokens.length + np.cumsum(lengths) - lengths
        columns = (starts, [domain for _, domain, _ in self._new], [num_bytes for _, _, num_bytes in self._new])
        for array, values in zip(self._others, columns, strict=True):
            array.extend(values)
        self._tokens.extend(
            np.concatenate([np.empty(0, np.int64), *(x for t, _, _ in self._new for x in (t, [self._end]))])
        )
        self.documents += len(self._new)
        self._new.clear()
        replace_text(self._state, json.dumps({"documents": self.documents, "tokens": self._tokens.length}))

    def finish(self) -> None:
        """Flush and close the arrays; nothing can be added after that."""
        self.flush()
        for array in (self._tokens, *self._others):
            array.close()


class _GrowingArray:
    """A one-dimensional `.npy` file that grows; `length` is the number of values written so far."""

    def __init__(self, path: Path, dtype: type[np.integer], length: int) -> None:
        self._dtype = np.dtype(dtype)
        self._file = path.open("r+b" if length else "w+b")
        self.length = length
        self._write_header()
        self._file.truncate(self._file.tell() + length * self._dtype.itemsize)
        self._file.seek(0, os.SEEK_END)

    def extend(self, values: Integer[np.ndarray, " _length"] | Sequence[int]) -> None:
        self._file.write(np.asarray(values).astype(self._dtype).tobytes())
        self._file.flush()
        self.length += len(values)

    def close(self) -> None:
        self._write_header()
        self._file.close()

    def _write_header(self) -> None:
        """Write the header for the current length. numpy pads headers, so a longer array's header has the same size."""
        self._file.seek(0)
        shape = {"descr": self._dtype.str, "fortran_order": False, "shape": (self.length,)}
        np.lib.format.write_array_header_1_0(self._file, shape)


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
    writer = StreamWriter(folder, end_of_text=end_of_text, vocabulary=vocabulary)
    for document in zip(documents, domain, num_bytes, strict=True):
        writer.append(*document)
    writer.finish()


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
        self.document_domain = np.load(folder / "domain.npy", mmap_mode="r")
        self.document_bytes = np.load(folder / "bytes.npy", mmap_mode="r")

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
