"""Read text files: detect their encoding, and cut long files into parts."""

import codecs
import io
import tokenize
from collections.abc import Iterator
from pathlib import Path

from moestro.data.compression import MEBIBYTE, open_bytes
from moestro.errors import Misuse

LONGEST_PART = 16 * MEBIBYTE
"""Largest number of characters of a text file in one document; a longer file is cut at line ends."""

_BYTE_ORDER_MARKS = {  # the longer ones first: UTF-32's begins with UTF-16's
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_ASCII = bytes([*b"\t\n\r", *range(32, 92), *range(93, 127)]) + rb" a+b- ~{ \n"


class NotText(Misuse):
    """A file of text that turns out to be binary, or in no encoding that we read."""


def open_text(path: Path, encoding: str | None = None) -> io.TextIOWrapper:
    """Open a file of UTF-8, or of UTF-16 or UTF-32 with a byte-order mark; line ends stay as they are."""
    stream = open_bytes(path)
    return io.TextIOWrapper(stream, encoding=encoding or _marked_encoding(path), newline="\n")


def read_parts(path: Path, *, declared: bool) -> Iterator[str]:
    """Yield a file of text, in parts of at most 16 Mi characters.

    `declared` says that the file is Python code, which may declare its encoding.

    Raises:
        NotText: it holds NUL bytes or cannot be decoded.
    """
    encoding = _declared_encoding(path) if declared else _marked_encoding(path)
    with open_text(path, encoding) as stream:
        rest = ""
        while piece := _decoded(path, stream, LONGEST_PART - len(rest)):
            rest += piece
            if len(rest) == LONGEST_PART:
                cut = _last_end(rest)
                yield rest[:cut]
                rest = rest[cut:]
        if rest:
            yield rest


def _decoded(path: Path, stream: io.TextIOWrapper, size: int) -> str:
    try:
        text = stream.read(size)
    except UnicodeError as error:
        raise NotText(f"{path} is not text in UTF-8: {error}") from error
    if "\0" in text:
        raise _binary(path)
    return text


def _last_end(text: str) -> int:
    """Return where to cut: after the last line end, else after the last space, else at the end."""
    return (text.rfind("\n") + 1) or (text.rfind(" ") + 1) or len(text)


def _marked_encoding(path: Path) -> str:
    with open_bytes(path) as stream:
        head = stream.read(1024)
    encoding = next((name for mark, name in _BYTE_ORDER_MARKS.items() if head.startswith(mark)), "utf-8-sig")
    if encoding == "utf-8-sig" and b"\0" in head:
        raise _binary(path)
    return encoding


def _binary(path: Path) -> NotText:
    return NotText(f"{path} is binary, not text: it holds NUL bytes")


def _declared_encoding(path: Path) -> str:
    """Return the encoding that a Python file declares.

    Raises:
        NotText: the encoding is unknown, or cannot hold Python code: `rot13` and `hex` do not decode to text, and
            `punycode` and `unicode_escape` would change the code.
    """
    with open_bytes(path) as stream:
        try:
            encoding = tokenize.detect_encoding(lambda: stream.readline(MEBIBYTE))[0]
        except SyntaxError as error:  # detect_encoding raises it for an unknown encoding
            raise NotText(f"{path} is not text in UTF-8: {error}") from error
    try:
        keeps_ascii = _ASCII.decode(encoding) == _ASCII.decode("ascii")
    except (LookupError, ValueError):  # ValueError includes UnicodeError
        keeps_ascii = False
    if not keeps_ascii:
        raise NotText(f"{path} declares the encoding {encoding!r}, which cannot hold Python code")
    return encoding
