"""Documents split into train and held-out text, by their content alone.

A document's fingerprint (a hash of its text) decides which side it is on and where in the order it stands. So the
split does not depend on file names, on the order of files or on a random state, and a duplicate could only land on
the same side; exact duplicates are dropped, the first one read stays.
"""

import hashlib
import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain

from moestro.data.progress import watched
from moestro.data.sources import Document, read_source
from moestro.data.standard_library import read_standard_library
from moestro.errors import Misuse

logger = logging.getLogger(__name__)

HELD_OUT_FRACTION = 0.05
MAX_HELD_OUT_BYTES = 256 * 1024
WINDOW = 64 * 1024  # characters; a longer document is cut at line ends
MIN_WINDOW = 1024
FEW_DOCUMENTS = 20  # below this a split by whole documents has no use: 1 / HELD_OUT_FRACTION


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Train and held-out documents, both in the order of their fingerprints: a shuffle that mixes the domains."""

    train: tuple[Document, ...]
    held_out: tuple[Document, ...]
    domains: tuple[str, ...]  # sorted
    missing: tuple[str, ...]  # domains of the default corpus that this interpreter lacks
    duplicates: int  # documents dropped because their text had been read before
    left_out: dict[str, int]  # bytes per domain beyond `max_bytes` and `max_held_out_bytes`, on neither side
    hash: str  # SHA-256 over side, domain and text of every document, in whatever order they were read


def load_corpus(
    sources: Sequence[str] = (),
    *,
    text_column: str = "text",
    held_out_fraction: float = HELD_OUT_FRACTION,
    max_bytes: int | None = None,
    max_held_out_bytes: int = MAX_HELD_OUT_BYTES,
) -> Corpus:
    """Read and split `sources` (`sources.read_source`), or the standard library where none are given.

    Raises:
        Misuse: as `read_source` and `split_documents`.
    """
    missing: tuple[str, ...] = ()
    if sources:
        documents = chain.from_iterable(read_source(spec, text_column=text_column) for spec in sources)
    else:
        documents, missing = read_standard_library()
    corpus = split_documents(
        watched(documents, "reading documents"),
        held_out_fraction=held_out_fraction,
        max_bytes=max_bytes,
        max_held_out_bytes=max_held_out_bytes,
    )
    return replace(corpus, missing=missing)


def split_documents(
    documents: Iterable[Document],
    *,
    held_out_fraction: float = HELD_OUT_FRACTION,
    max_bytes: int | None = None,
    max_held_out_bytes: int = MAX_HELD_OUT_BYTES,
) -> Corpus:
    """Split documents into train and held-out.

    Per domain: a document is held out when its fingerprint, read as a number in [0, 1), is below
    `held_out_fraction`; where there are two documents or more, each side gets at least one. A document longer than
    64 Ki characters is cut at line ends into windows, which stay together on its side. In a domain of fewer than 20
    documents (one large file, say) windows of a twentieth of its text, but 1 Ki to 64 Ki characters, take the place
    of documents in all of this.

    Each domain keeps at most `max_bytes` of train text (None: all of it) and `max_held_out_bytes` of held-out text,
    in UTF-8, taken in the order of fingerprints, which is a random sample; the last document is cut to fit.
    Held-out text beyond that is left out altogether, not moved to train, so that a document's side never depends on
    the limits.
    """
    if not 0 < held_out_fraction < 1:
        raise Misuse(f"held_out_fraction must lie between 0 and 1, got {held_out_fraction}")
    for name, limit in (("max_bytes", max_bytes), ("max_held_out_bytes", max_held_out_bytes)):
        if limit is not None and limit < 1:
            raise Misuse(f"{name} must be at least 1, got {limit}")
    domains, duplicates = _group(documents)
    train: list[Document] = []
    held_out: list[Document] = []
    left_out: dict[str, int] = {}
    for domain, texts in sorted(domains.items()):
        sides = _split_domain(texts, held_out_fraction)
        train_sample, train_rest = _sample(sides[0], max_bytes)
        held_out_sample, held_out_rest = _sample(sides[1], max_held_out_bytes)
        train += train_sample
        held_out += held_out_sample
        left_out[domain] = train_rest + held_out_rest
        if not held_out_sample:
            logger.warning("domain %s is one short text: all of it is for training, none is held out", domain)
    return Corpus(
        train=tuple(sorted(train, key=_fingerprint)),
        held_out=tuple(sorted(held_out, key=_fingerprint)),
        domains=tuple(sorted(domains)),
        missing=(),
        duplicates=duplicates,
        left_out=left_out,
        hash=_hash(train, held_out),
    )


def _fingerprint(document: Document) -> bytes:
    return hashlib.blake2b(document.text.encode(), digest_size=16).digest()


def _group(documents: Iterable[Document]) -> tuple[dict[str, list[Document]], int]:
    """Documents per domain, each text once over all domains, and how many were dropped."""
    domains: defaultdict[str, list[Document]] = defaultdict(list)
    seen: set[bytes] = set()
    count = 0
    for count, document in enumerate(documents, start=1):  # noqa: B007 (the last count is used below)
        fingerprint = _fingerprint(document)
        if fingerprint not in seen:
            seen.add(fingerprint)
            domains[document.domain].append(document)
    return dict(domains), count - len(seen)


def _split_domain(documents: list[Document], held_out_fraction: float) -> tuple[list[Document], list[Document]]:
    """Windows of train and of held-out text."""
    if len(documents) < FEW_DOCUMENTS:
        total = sum(len(document.text) for document in documents)
        limit = min(max(total // FEW_DOCUMENTS, MIN_WINDOW), WINDOW)
        documents = [window for document in documents for window in _windows(document, limit)]
    ranked = {_fingerprint(document): document for document in documents}
    held_out = {key for key in ranked if int.from_bytes(key[:8], "big") < held_out_fraction * 2**64}
    held_out = (held_out or {min(ranked)}) - {max(ranked)}  # neither side stays empty; a lone document is for training
    sides: tuple[list[Document], list[Document]] = ([], [])
    for key, document in ranked.items():
        sides[key in held_out].extend(_windows(document, WINDOW))
    return sides


def _windows(document: Document, limit: int) -> Iterator[Document]:
    """Cut text into windows of at most `limit` characters: at the last line end, else the last space, else anywhere."""
    text, start, number = document.text, 0, 0
    if len(text) <= limit:
        yield document
        return
    while start < len(text):
        end = start + limit
        if end < len(text):
            cut = text.rfind("\n", start, end)
            cut = cut if cut > start else text.rfind(" ", start, end)
            end = cut + 1 if cut > start else end
        number += 1
        if not text[start:end].isspace():
            yield replace(document, text=text[start:end], source=f"{document.source}[{number}]")
        start = end


def _sample(documents: list[Document], max_bytes: int | None) -> tuple[list[Document], int]:
    """The first `max_bytes` of text in the order of fingerprints, and how many bytes are left out."""
    total = sum(len(document.text.encode()) for document in documents)
    if max_bytes is None or total <= max_bytes:
        return documents, 0
    kept: list[Document] = []
    room = max_bytes
    for document in sorted(documents, key=_fingerprint):
        text = document.text.encode()[:room].decode(errors="ignore")  # whole, but for the last one
        if text.strip():
            kept.append(document if text == document.text else replace(document, text=text))
            room -= len(text.encode())
        if room <= 0:
            break
    return kept, total - (max_bytes - room)


def _hash(train: Iterable[Document], held_out: Iterable[Document]) -> str:
    entries = sorted(
        (side, document.domain, _fingerprint(document).hex())
        for side, documents in (("train", train), ("held-out", held_out))
        for document in documents
    )
    return hashlib.sha256(repr(entries).encode()).hexdigest()
