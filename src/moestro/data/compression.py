"""Read compressed files as streams of bytes, with a limit on how far a file may expand."""

import bz2
import gzip
import io
import lzma
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pyarrow as pa

from moestro.errors import Misuse

MEBIBYTE = 2**20
LONGEST_ROW = 32 * MEBIBYTE
"""Largest number of characters in one row of a table or one line of JSON."""
FREE_EXPANSION = 64 * MEBIBYTE
LARGEST_RATIO = 100
"""A file may expand to FREE_EXPANSION bytes or LARGEST_RATIO times its size, whichever is more; text compresses 3 to
20-fold."""
ROW_COST = 64
"""Bytes counted for each row or line besides its text, so that a small file cannot hold endless empty rows."""

UNREADABLE = (OSError, EOFError, zlib.error, lzma.LZMAError)
"""Exceptions that decompressors raise for a broken file."""


def _arrow(codec: str) -> Callable[[Path], Any]:
    return lambda path: pa.CompressedInputStream(path.open("rb"), codec)  # pyarrow opens no names that are not UTF-8


_OPENERS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".lzma": lzma.open,
    ".zst": _arrow("zstd"),
    ".zstd": _arrow("zstd"),
    ".lz4": _arrow("lz4"),
}
_FIRST_BYTES = {
    b"\x1f\x8b\x08": ".gz",
    b"BZh91AY&SY": ".bz2",
    b"\xfd7zXZ\0": ".xz",
    b"\x28\xb5\x2f\xfd": ".zst",
    b"\x04\x22\x4d\x18": ".lz4",
}


def without_compression(path: Path) -> str:
    """Return the file's name without the ending of its compression: `a.jsonl` for `a.jsonl.zst`."""
    return path.stem if path.suffix.lower() in _OPENERS else path.name


def open_bytes(path: Path) -> io.BufferedReader:
    """Open a file for reading, and decompress it if its ending or first bytes mark it as compressed.

    Reading raises Misuse once the file expands beyond the limit, so that a small file cannot fill memory or disk.
    """
    opener = _OPENERS.get(path.suffix.lower()) or _OPENERS.get(_by_content(path))
    if opener is None:
        return path.open("rb")
    return io.BufferedReader(_Bounded(opener(path), path), MEBIBYTE)


@contextmanager
def seekable(path: Path) -> Iterator[Path]:
    """Yield the path of an uncompressed copy (or of the file itself), for formats that need random access."""
    with open_bytes(path) as stream:
        if isinstance(stream.raw, io.FileIO):
            yield path
            return
        with tempfile.NamedTemporaryFile(prefix="moestro-") as copy:
            shutil.copyfileobj(stream, copy, MEBIBYTE)
            copy.flush()
            yield Path(copy.name)


class Expansion:
    """Count the bytes read from one file, and enforce the limit on its expansion."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.limit = max(FREE_EXPANSION, LARGEST_RATIO * path.stat().st_size)
        self.total = 0

    def add(self, size: int) -> None:
        """Count `size` bytes; raise Misuse beyond the limit."""
        self.total += size
        if self.total > self.limit:
            raise Misuse(
                f"{self.path} must expand to at most {LARGEST_RATIO} times its size (or {FREE_EXPANSION // MEBIBYTE} "
                f"MiB), got more than {self.limit // MEBIBYTE} MiB: store it uncompressed if this is intended"
            )


class _Bounded(io.RawIOBase):
    """A decompressing stream that counts the bytes it returns."""

    def __init__(self, stream: Any, path: Path) -> None:
        self._stream = stream
        self._expansion = Expansion(path)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = cast(bytes, self._stream.read(len(buffer)))
        self._expansion.add(len(data))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._stream.close()
        super().close()


def _by_content(path: Path) -> str:
    with path.open("rb") as stream:
        head = stream.read(10)
    return next((ending for start, ending in _FIRST_BYTES.items() if head.startswith(start)), "")
