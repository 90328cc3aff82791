"""Split a corpus into training and held-out pieces, and limit the size of both."""

import heapq
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from moestro.data.decontamination import unseen_parts
from moestro.data.sources import Document
from moestro.data.spool import Piece, Spool, fingerprint

_POOL = 2  # candidates for held-out text, as a multiple of the wanted bytes: some of it will be cut
_ATTEMPTS = (
    (1, 0.25),
    (2, 0.25),
    (4, 0.25),
    (8, 0.1),
)  # multiples of the held-out fraction to try in turn, and the share of the wanted bytes that must then remain
_UNCUT = len(_ATTEMPTS)  # the last attempt: the held-out fraction itself, uncut


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """The keys of a domain that are held out: those below a threshold; with two or more keys, some and not all."""

    below: bytes
    largest: bytes

    @classmethod
    def of(cls, keys: tuple[bytes, bytes], fraction: float) -> "Rule":
        """Return the rule that holds out about `fraction` of a domain, from its smallest and largest key."""
        threshold = math.ceil(fraction * 2**64).to_bytes(8, "big")
        return cls(below=max(threshold, keys[0] + b"\0"), largest=keys[1])

    def holds(self, piece: Piece) -> bool:
        """Return whether the piece is held out."""
        return piece.key < self.below and piece.key != self.largest


class Train:
    """Training documents in the order of their fingerprints; every iteration reads them from disk.

    Each domain keeps its first `max_bytes` (None: all) in that order; the last document is cut to fit.
    """

    def __init__(self, spool: Spool, rules: Mapping[str, Rule], max_bytes: int | None) -> None:
        self._spool, self._rules = spool, rules
        self._ends: dict[str, bytes] = {}  # per domain, the fingerprint of the first piece that does not fit
        self._cut: list[Piece] = []  # the parts of it, and of later pieces, that fit into the remaining bytes
        if max_bytes is not None:
            self._limit(max_bytes)

    def __iter__(self) -> Iterator[Document]:
        return self.documents()

    def documents(self, start: int = 0, step: int = 1) -> Iterator[Document]:
        """Read every `step`-th document from index `start` on."""
        return map(self._spool.read, islice(self.pieces(), start, None, step))

    def pieces(self) -> Iterator[Piece]:
        """Yield the pieces of all documents, without their text."""
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
    """The two sides of a split: training and held-out documents."""

    train: Train
    held_out: tuple[Document, ...]  # in the order of their fingerprints
    shared: Counter[str]  # bytes per domain cut from candidates for held-out text because training text has them


def split(spool: Spool, fraction: float, max_bytes: int | None, max_held_out_bytes: int) -> Sides:
    """Split documents into about `fraction` held-out text and the rest, and cut shared passages from held-out text.

    If less than a quarter of a domain's wanted bytes remains, more of the domain is held out: up to eight times as
    much, at most half of it. If less than a tenth remains even then, the domain repeats itself throughout: about
    `fraction` of it is held out, uncut. The wanted bytes are the candidates' bytes or, if less, `max_held_out_bytes`.
    Each attempt reads all training text.
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
    """Return the UTF-8 bytes of text in each domain."""
    sizes: Counter[str] = Counter()
    for document in documents:
        sizes[document.domain] += len(document.text.encode())
    return sizes


def sample(documents: Sequence[Document], max_bytes: int) -> Iterator[Document]:
    """Yield documents up to `max_bytes` of UTF-8 in each domain; the last document is cut to fit."""
    used: Counter[str] = Counter()
    for document in documents:
        text = first_bytes(document.text, max_bytes - used[document.domain])
        if text.strip():
            yield document if text == document.text else replace(document, text=text)
            used[document.domain] += len(text.encode())


def first_bytes(text: str, room: int) -> str:
    """Return the longest beginning of a text that fits into `room` bytes of UTF-8."""
    return text.encode()[: max(room, 0)].decode(errors="ignore")


def _pool(spool: Spool, rules: Mapping[str, Rule], room: Mapping[str, int]) -> Iterator[Document]:
    """Yield candidates for held-out text until each domain has `room` bytes; the last one may exceed it."""
    used: Counter[str] = Counter()
    for piece in spool.pieces():
        if rules[piece.domain].holds(piece) and used[piece.domain] < room[piece.domain]:
            used[piece.domain] += piece.size
            yield spool.read(piece)


def _fingerprint(document: Document) -> bytes:
    return fingerprint(document.text.encode())
