"""Which piece of a corpus is for training, which is held out, and how much of each is used."""

import heapq
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from moestro.data.decontamination import unseen_parts
from moestro.data.sources import Document
from moestro.data.spool import Piece, Spool, fingerprint

_POOL = 2  # times the held-out bytes that are wanted: what is looked at, as some of it will be cut
_ATTEMPTS = ((1, 0.25), (2, 0.25), (4, 0.25), (8, 0.1))  # times the text, and the share of what is wanted that suffices
_UNCUT = len(_ATTEMPTS)  # the last resort


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """Which keys of a domain are held out: those below a threshold, but never all and, of two or more, never none."""

    below: bytes
    largest: bytes

    @classmethod
    def of(cls, keys: tuple[bytes, bytes], fraction: float) -> "Rule":
        """Make the rule for about `fraction` of a domain from its smallest and largest key."""
        threshold = math.ceil(fraction * 2**64).to_bytes(8, "big")
        return cls(below=max(threshold, keys[0] + b"\0"), largest=keys[1])

    def holds(self, piece: Piece) -> bool:
        """Say whether the piece is held out."""
        return piece.key < self.below and piece.key != self.largest


class Train:
    """The train documents in the order of their fingerprints, read from disk each time that they are gone through.

    Each domain keeps its first `max_bytes` (None: all) in that order; the last document is cut to fit.
    """

    def __init__(self, spool: Spool, rules: Mapping[str, Rule], max_bytes: int | None) -> None:
        self._spool, self._rules = spool, rules
        self._ends: dict[str, bytes] = {}  # the first piece of a domain that there is no room for
        self._cut: list[Piece] = []  # what fits of it, and of later ones into the bytes that are left
        if max_bytes is not None:
            self._limit(max_bytes)

    def __iter__(self) -> Iterator[Document]:
        return self.documents()

    def documents(self, start: int = 0, step: int = 1) -> Iterator[Document]:
        """Read every `step`-th document from the `start`-th one on."""
        return map(self._spool.read, islice(self.pieces(), start, None, step))

    def pieces(self) -> Iterator[Piece]:
        """Yield where the documents lie."""
        whole = (
            piece for piece in self._side() if (end := self._ends.get(piece.domain)) is None or piece.fingerprint < end
        )
        return heapq.merge(whole, self._cut, key=lambda piece: (piece.fingerprint, piece.domain))

    def _side(self) -> Iterator[Piece]:
        return (piece for piece in self._spool.pieces() if not self._rules[piece.domain].holds(piece))

    def _limit(self, max_bytes: int) -> None:
        used: Counter[str] = Counter()
        for piece in self._side():
            room = max_bytes - used[piece.domain]
            if piece.domain not in self._ends and piece.size <= room:
                used[piece.domain] += piece.size
            elif room > 0:
                self._ends.setdefault(piece.domain, piece.fingerprint)
                text = first_bytes(self._spool.read(piece).text, room)
                if text.strip():
                    data = text.encode()
                    self._cut.append(replace(piece, fingerprint=fingerprint(data), size=len(data)))
                    used[piece.domain] += len(data)
        self._cut.sort(key=lambda piece: (piece.fingerprint, piece.domain))


@dataclass(frozen=True, slots=True, kw_only=True)
class Sides:
    """Both sides of a split."""

    train: Train
    held_out: tuple[Document, ...]  # in the order of their fingerprints
    shared: Counter[str]  # bytes per domain that were cut from held-out text because training text has them too


def split(spool: Spool, fraction: float, max_bytes: int | None, max_held_out_bytes: int) -> Sides:
    """Split what was read into about `fraction` held-out text and the rest, without passages that both have.

    Where less than a quarter of a domain's held-out text is left after cutting, more of the domain is held out, up to
    eight times as much but at most half of it. A domain of which that leaves less than a tenth of what is wanted
    repeats itself throughout, and keeps its held-out text uncut.
    """
    keys = spool.keys()
    attempts = dict.fromkeys(keys, 0)
    wanted: dict[str, int] = {}
    while True:
        more = {domain: _ATTEMPTS[attempt % _UNCUT][0] for domain, attempt in attempts.items()}
        shares = {domain: min(fraction * times, max(fraction, 0.5)) for domain, times in more.items()}
        rules = {domain: Rule.of(keys[domain], share) for domain, share in shares.items()}
        train = Train(spool, rules, max_bytes)
        pool = list(_pool(spool, rules, {domain: _POOL * max_held_out_bytes * more[domain] for domain in more}))
        parts = unseen_parts(pool, (document.text for document in train))
        wanted = wanted or {d: min(size, max_held_out_bytes) for d, size in bytes_of(pool).items()}
        uncut = {domain for domain, attempt in attempts.items() if attempt == _UNCUT}
        kept = [
            part
            for whole, rest in zip(pool, parts, strict=True)
            for part in ([whole] if whole.domain in uncut else rest)
        ]
        own = bytes_of(kept)
        poor = [
            domain
            for domain, attempt in attempts.items()
            if attempt < _UNCUT and own[domain] < _ATTEMPTS[attempt][1] * wanted.get(domain, 0)
        ]
        if not poor:
            held_out = sorted(sample(kept, max_held_out_bytes), key=_fingerprint)
            return Sides(train=train, held_out=tuple(held_out), shared=bytes_of(pool) - own)
        for domain in poor:
            attempts[domain] += 1


def bytes_of(documents: Iterable[Document]) -> Counter[str]:
    """Return how many bytes of text each domain has."""
    sizes: Counter[str] = Counter()
    for document in documents:
        sizes[document.domain] += len(document.text.encode())
    return sizes


def sample(documents: Sequence[Document], max_bytes: int) -> Iterator[Document]:
    """Yield the first `max_bytes` of each domain; the last document is cut to fit."""
    used: Counter[str] = Counter()
    for document in documents:
        text = first_bytes(document.text, max_bytes - used[document.domain])
        if text.strip():
            yield document if text == document.text else replace(document, text=text)
            used[document.domain] += len(text.encode())


def first_bytes(text: str, room: int) -> str:
    """Return what fits of a text into `room` bytes."""
    return text.encode()[: max(room, 0)].decode(errors="ignore")


def _pool(spool: Spool, rules: Mapping[str, Rule], room: Mapping[str, int]) -> Iterator[Document]:
    """Yield held-out documents, per domain until `room` bytes are full."""
    used: Counter[str] = Counter()
    for piece in spool.pieces():
        if rules[piece.domain].holds(piece) and used[piece.domain] < room[piece.domain]:
            used[piece.domain] += piece.size
            yield spool.read(piece)


def _fingerprint(document: Document) -> bytes:
    return fingerprint(document.text.encode())
