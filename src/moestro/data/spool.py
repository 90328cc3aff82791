"""Keep documents on disk: add them once in any order, then iterate repeatedly in the order of their fingerprints.

One file holds all texts. A sorted SQLite table holds a few bytes for each; it removes duplicates and shuffles text of
any size in bounded memory.
"""

import hashlib
import json
import os
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir

from moestro.data.cache import replace_text
from moestro.data.sources import Document
from moestro.gate.writing import failures_as_os_errors

WINDOW = 64 * 1024  # characters; a longer document is cut at line ends
_DONE = "read.json"  # exists once all documents are added
MIN_WINDOW = 1024
FEW_DOCUMENTS = 20  # a domain with fewer documents is split by windows

_TABLES = """
PRAGMA journal_mode = OFF;
PRAGMA cache_size = -32768;
CREATE TABLE documents (fingerprint BLOB PRIMARY KEY, domain TEXT, place INT, size INT, source TEXT) WITHOUT ROWID;
CREATE TABLE pieces (fingerprint BLOB, domain TEXT, key BLOB, place INT, size INT, source TEXT,
                     PRIMARY KEY (fingerprint, domain)) WITHOUT ROWID;
"""
_ADD_PIECE = """
INSERT INTO pieces VALUES (?, ?, ?, ?, ?, ?)
ON CONFLICT DO UPDATE SET key = min(key, excluded.key)
"""  # among equal windows the smaller key wins, regardless of reading order


@dataclass(frozen=True, slots=True)
class Piece:
    """A document or a window of a long one: the unit of splitting, sampling and ordering."""

    fingerprint: bytes  # hash of its text
    domain: str
    key: bytes  # decides its side; see `Spool.finish`
    place: int  # offset in the file of texts, in bytes
    size: int  # bytes
    source: str


class Spool:
    """A store of documents without duplicate texts; the first one added stays. Call `add` for each, then `finish`."""

    def __init__(self, folder: Path | None = None) -> None:
        if folder is None:
            self._temporary = TemporaryDirectory(prefix="moestro-")  # removed together with the spool
            folder = Path(self._temporary.name)
        self._done = folder / _DONE
        complete = self._done.exists()
        self._texts = (folder / "texts").open("rb" if complete else "w+b")
        if not complete:
            (folder / "index.sqlite").unlink(missing_ok=True)
        self._index = sqlite3.connect(
            folder / "index.sqlite", check_same_thread=False
        )  # tokenizers read from threads of their own
        if not complete:
            self._index.executescript(_TABLES)
        self._end = 0
        self._characters: Counter[str] = Counter()
        self._documents: Counter[str] = Counter()
        self.duplicates: int = json.loads(self._done.read_text()) if complete else 0

    def add(self, document: Document) -> None:
        """Add a document unless its text was added before."""
        document = replace(document, domain=storable(document.domain), source=storable(document.source))
        data = document.text.encode()
        key = fingerprint(data)
        row = (key, document.domain, self._end, len(data), document.source)
        if self._index.execute("INSERT OR IGNORE INTO documents VALUES (?, ?, ?, ?, ?)", row).rowcount == 0:
            self.duplicates += 1
            return
        self._texts.write(data)
        self._documents[document.domain] += 1
        self._characters[document.domain] += len(document.text)
        self._add_pieces(document, self._end, WINDOW, key)
        self._end += len(data)

    def finish(self) -> None:
        """Cut domains of fewer than 20 documents into smaller windows, and mark the spool complete on disk.

        The windows of a document have its fingerprint as their key, so that they share one side of the split. In these
        domains each window has its own: otherwise one document could not be split.
        """
        self._texts.flush()
        for domain, count in self._documents.items():
            if count < FEW_DOCUMENTS:
                self._cut_into_windows(domain)
        self._index.commit()
        replace_text(self._done, json.dumps(self.duplicates))

    @property
    def complete(self) -> bool:
        """True once all documents are added, by this process or an earlier one that used the same folder."""
        return self._done.exists()

    def pieces(self) -> Iterator[Piece]:
        """Yield all pieces in the order of their fingerprints: a shuffle that mixes the domains."""
        rows = self._index.execute("SELECT * FROM pieces ORDER BY fingerprint, domain")
        return (Piece(*row) for row in rows)

    def keys(self) -> dict[str, tuple[bytes, bytes]]:
        """Return the smallest and the largest key of each domain."""
        rows = self._index.execute("SELECT domain, min(key), max(key) FROM pieces GROUP BY domain")
        return {domain: (smallest, largest) for domain, smallest, largest in rows}

    def sizes(self) -> dict[str, int]:
        """Return the UTF-8 bytes of each domain's pieces, in the order of the domains' names."""
        return dict(self._index.execute("SELECT domain, sum(size) FROM pieces GROUP BY domain ORDER BY domain"))

    def read(self, piece: Piece) -> Document:
        """Read the text of a piece, and return it as a document."""
        text = os.pread(self._texts.fileno(), piece.size, piece.place).decode()
        return Document(text=text, domain=piece.domain, source=piece.source)

    def _cut_into_windows(self, domain: str) -> None:
        limit = min(max(self._characters[domain] // FEW_DOCUMENTS, MIN_WINDOW), WINDOW)
        query = "SELECT fingerprint, domain, x'', place, size, source FROM documents WHERE domain = ?"
        self._index.execute("DELETE FROM pieces WHERE domain = ?", (domain,))
        for row in self._index.execute(query, (domain,)).fetchall():
            piece = Piece(*row)
            self._add_pieces(self.read(piece), piece.place, limit, None)

    def _add_pieces(self, document: Document, place: int, limit: int, key: bytes | None) -> None:
        """Index windows of at most `limit` characters under `key`; None: each under its own fingerprint."""
        for window in windows(document, limit):
            data = window.text.encode()
            own = fingerprint(data)
            if not window.text.isspace():
                self._index.execute(_ADD_PIECE, (own, window.domain, key or own, place, len(data), window.source))
            place += len(data)


def storable(name: str) -> str:
    """Escape what UTF-8 cannot hold: file names may be any bytes, and Python represents some as lone surrogates."""
    return name.encode("utf-8", "backslashreplace").decode()


def fingerprint(data: bytes) -> bytes:
    """Return the 16-byte hash that identifies a text, given in UTF-8."""
    return hashlib.blake2b(data, digest_size=16).digest()


def windows(document: Document, limit: int) -> Iterator[Document]:
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
        yield replace(document, text=text[start:end], source=f"{document.source}[{number}]")
        start = end


def spooled(documents: Iterable[Document], folder: Path | None = None) -> Spool:
    """Return a spool of all documents in `folder` (None: a temporary one); if that is complete, read no document."""
    with failures_as_os_errors(folder or Path(gettempdir())):
        spool = Spool(folder)
        for document in () if spool.complete else documents:
            spool.add(document)
        if not spool.complete:
            spool.finish()
    return spool
