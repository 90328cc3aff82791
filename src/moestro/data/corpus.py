"""Documents split into train and held-out text, by their content alone.

A document's fingerprint (a hash of its text) decides which side it is on and where in the order it stands. So the
split does not depend on file names, on the order of files or on a random state, and a duplicate could only land on
the same side; exact duplicates are dropped, the first one read stays. Passages of held-out text that also occur in
training text are cut out of it.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from moestro.data.decontamination import leaked_characters
from moestro.data.progress import watched
from moestro.data.sources import Document, read_source
from moestro.data.split import Sides, Train, bytes_of, split
from moestro.data.spool import fingerprint, spooled
from moestro.data.standard_library import read_standard_library
from moestro.errors import Misuse

logger = logging.getLogger(__name__)

HELD_OUT_FRACTION = 0.05
MAX_HELD_OUT_BYTES = 256 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Train and held-out documents, both in the order of their fingerprints: a shuffle that mixes the domains."""

    train: Train
    held_out: tuple[Document, ...]
    train_documents: int
    domains: tuple[str, ...]  # sorted
    missing: tuple[str, ...]  # domains of the default corpus that this interpreter lacks
    duplicates: int  # documents dropped because their text had been read before
    left_out: dict[str, int]  # bytes per domain on neither side: beyond a limit, or in `shared`
    shared: dict[str, int]  # bytes per domain cut from candidates for held-out text because training text has them
    leaked: dict[str, tuple[int, int]]  # per domain: held-out characters that occur in training text, and all
    hash: str  # SHA-256 over side, domain and text of every document, in whatever order they were read


def load_corpus(
    sources: Sequence[str] = (),
    *,
    text_column: str = "text",
    held_out_fraction: float = HELD_OUT_FRACTION,
    max_bytes: int | None = None,
    max_held_out_bytes: int = MAX_HELD_OUT_BYTES,
    folder: Path | None = None,
) -> Corpus:
    """Read and split `sources` (`sources.read_source`), or the standard library where none are given.

    The text is stored in `folder` (None: a temporary one) while the corpus is used. If a killed process had already
    read all sources into the folder, they are not read again.

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
        folder=folder,
    )
    return replace(corpus, missing=missing)


def split_documents(
    documents: Iterable[Document],
    *,
    held_out_fraction: float = HELD_OUT_FRACTION,
    max_bytes: int | None = None,
    max_held_out_bytes: int = MAX_HELD_OUT_BYTES,
    folder: Path | None = None,
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

    Passages of held-out text that occur in the train text, and near-duplicates of it, are cut out and left out as well
    (`decontamination.unseen_parts`). If that leaves less than a quarter of the held-out bytes that a domain should
    have, up to eight times as many of its documents are held out (at most half). If that is not enough, the domain
    repeats itself throughout, and its held-out text stays uncut. `leaked` counts the overlap that remains.
    """
    check_limits(held_out_fraction, max_bytes, max_held_out_bytes)
    spool = spooled(documents, folder)
    sides = split(spool, held_out_fraction, max_bytes, max_held_out_bytes)
    train_bytes, train_documents, digest = _identify(sides)
    held_out_bytes = bytes_of(sides.held_out)
    sizes = spool.sizes()
    for domain in sizes:
        if not held_out_bytes[domain]:
            logger.warning("domain %s is one short text: all of it is for training, none is held out", domain)
    used = train_bytes + held_out_bytes
    return Corpus(
        train=sides.train,
        held_out=sides.held_out,
        train_documents=train_documents,
        domains=tuple(sizes),
        missing=(),
        duplicates=spool.duplicates,
        left_out={domain: size - used[domain] for domain, size in sizes.items()},
        shared={domain: sides.shared[domain] for domain in sizes},
        leaked=leaked_characters(sides.held_out, (document.text for document in sides.train)),
        hash=digest,
    )


def check_limits(held_out_fraction: float, max_bytes: int | None, max_held_out_bytes: int) -> None:
    """Raise Misuse, with its name and value, for a limit that is out of range."""
    if not 0 < held_out_fraction < 1:
        raise Misuse(f"held_out_fraction must lie between 0 and 1, got {held_out_fraction}")
    for name, limit in (("max_bytes", max_bytes), ("max_held_out_bytes", max_held_out_bytes)):
        if limit is not None and limit < 1:
            raise Misuse(f"{name} must be at least 1, got {limit}")


def _identify(sides: Sides) -> tuple[Counter[str], int, str]:
    """Return the train bytes per domain, the number of train documents and the hash of everything."""
    sizes: Counter[str] = Counter()
    count = 0
    digest = hashlib.sha256()
    for count, piece in enumerate(sides.train.pieces(), start=1):  # noqa: B007 (the last count is used below)
        sizes[piece.domain] += piece.size
        digest.update(repr(("train", piece.domain, piece.fingerprint)).encode())
    for document in sides.held_out:
        digest.update(repr(("held-out", document.domain, fingerprint(document.text.encode()))).encode())
    return sizes, count, digest.hexdigest()
