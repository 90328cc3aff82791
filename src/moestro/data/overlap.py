"""Measure how much of one text occurs in another, by rolling hashes of every window of characters.

Held-out text is small and bounded, so the hashes of all its windows fit into memory. Training text of any size is then
read once. A window is found if training text contains exactly the same characters, up to a collision of 64-bit hashes.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from jaxtyping import Bool, UInt32, UInt64

SPAN = 200  # characters; held-out text in a span of this length that occurs in training text is leaked
_BLOCK = 2**17  # characters hashed at once
_BORDER = "\ud800"  # separates texts: half a surrogate pair, which no document contains
_TABLE_BITS = 24
_SLOTS = (64 - _TABLE_BITS, 64 - 2 * _TABLE_BITS)  # lowest bit of each part of a hash that the filter uses

# Polynomials modulo 2**64. The base is any odd number that mixes well.
_BASE = 0x9E3779B97F4A7C15
_INVERSE = pow(_BASE, -1, 2**64)


class Windows:
    """All windows of `length` characters of some texts, and which of them were found elsewhere.

    With `spaces=False` ASCII white space is removed first, so that text with other line breaks is still found.
    """

    def __init__(self, texts: Sequence[str], length: int, *, spaces: bool = True) -> None:
        self.length, self.spaces = length, spaces
        self._powers = _powers(_BASE, _BLOCK + length)
        self._inverses = _powers(_INVERSE, _BLOCK + length)
        codes = [self._codes(text) for text in texts]
        self._sizes = [len(each) for each in codes]
        hashes = np.concatenate([np.empty(0, np.uint64), *(each for text in codes for each in self._hashes(text))])
        self._known, self._place = np.unique(hashes, return_inverse=True)
        self._found = np.zeros(len(self._known), dtype=bool)
        # A Bloom filter, which quickly rejects most hashes of other texts.
        self._table = np.zeros(2**_TABLE_BITS, dtype=bool)
        for slot in _SLOTS:
            self._table[_slot(self._known, slot)] = True

    def find(self, text: str) -> None:
        """Mark the windows that occur in `text`. Marks accumulate over calls."""
        for hashes in self._hashes(self._codes(text)):
            for slot in _SLOTS:
                hashes = hashes[self._table[_slot(hashes, slot)]]
            place = np.minimum(np.searchsorted(self._known, hashes), len(self._known) - 1)
            self._found[place[self._known[place] == hashes]] = True

    def covered(self) -> list[Bool[np.ndarray, " _characters"]]:
        """Return, per text, which characters lie in a found window. With `spaces=False` white space has no entries."""
        found, start = self._found[self._place.reshape(-1)], 0
        covered = []
        for size in self._sizes:
            count = max(size - self.length + 1, 0)
            steps = np.zeros(size + 1, dtype=np.int32)
            hits = np.flatnonzero(found[start : start + count])
            np.add.at(steps, hits, 1)
            np.add.at(steps, hits + self.length, -1)
            covered.append(np.cumsum(steps[:-1]) > 0)
            start += count
        return covered

    def _codes(self, text: str) -> UInt64[np.ndarray, " _characters"]:
        codes = _code_points(text)
        return (codes if self.spaces else codes[codes > ord(" ")]).astype(np.uint64)

    def _hashes(self, codes: UInt64[np.ndarray, " _characters"]) -> Iterator[UInt64[np.ndarray, " _windows"]]:
        """Yield, in blocks, the hash of the window that starts at each character."""
        for start in range(0, len(codes) - self.length + 1, _BLOCK):
            block = codes[start : start + _BLOCK + self.length - 1]
            sums = np.zeros(len(block) + 1, dtype=np.uint64)
            np.cumsum(block * self._powers[: len(block)], out=sums[1:])
            yield (sums[self.length :] - sums[: -self.length]) * self._inverses[: len(block) - self.length + 1]


def search(texts: Iterable[str], *windows: Windows) -> None:
    """Mark, in each of `windows`, those that occur in any of `texts`. The texts are read once, as a stream."""
    for joined in _joined(texts):
        for each in windows:
            each.find(joined)


def inked(text: str) -> Bool[np.ndarray, " _characters"]:
    """Return which characters `spaces=False` keeps: those above U+0020, so no ASCII white space."""
    return _code_points(text) > ord(" ")


def _code_points(text: str) -> UInt32[np.ndarray, " _characters"]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)


def _powers(base: int, count: int) -> UInt64[np.ndarray, " _count"]:
    powers = np.full(count, base, dtype=np.uint64)
    powers[0] = 1
    return np.cumprod(powers, dtype=np.uint64)


def _slot(hashes: UInt64[np.ndarray, " _windows"], lowest_bit: int) -> UInt64[np.ndarray, " _windows"]:
    return (hashes >> np.uint64(lowest_bit)) & np.uint64(2**_TABLE_BITS - 1)


def _joined(texts: Iterable[str]) -> Iterator[str]:
    """Yield texts joined into batches, because numpy is slow on short arrays. No window matches across a border."""
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= _BLOCK:
            yield _BORDER.join(batch)
            batch, size = [], 0
    yield _BORDER.join(batch)
