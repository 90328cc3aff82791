"""Read JSON as a stream of objects, regardless of the file's name: lines, one array, or consecutive objects."""

import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moestro.data.compression import LONGEST_ROW, MEBIBYTE, ROW_COST, Expansion
from moestro.data.plain_text import open_text
from moestro.errors import Misuse

_WHITE = " \t\n\r"
_BROKEN = (ValueError, RecursionError)
"""Exceptions of json for text that is not JSON, or is nested too deeply."""


def read_json(path: Path) -> Iterator[Mapping[str, Any]]:
    """Yield the objects of a file.

    The first line decides: if it is a whole object, the file holds JSON lines. At most one object is in memory.

    Raises:
        Misuse: a value is not a JSON object or has more than 32 Mi characters (the error names its line, or its number
            in an array), or the file is truncated.
    """
    with open_text(path) as stream:
        lines = _lines(path, stream)
        number, first = next(((number, line) for number, line in lines if line.strip(_WHITE)), (1, ""))
        if _is_object(first):
            yield _object(path, number, first)
            for number, line in lines:
                if line.strip(_WHITE):
                    yield _object(path, number, line)
        else:
            for number, value in enumerate(_Values(path, stream, first), start=1):
                yield _as_object(path, number, value)


def holds_json_lines(path: Path) -> bool:
    """Return whether the first two lines that are not blank (or the only one) are JSON objects."""
    with open_text(path) as stream:
        found: list[str] = []
        while len(found) < 2 and (line := stream.readline(MEBIBYTE)):
            if line.strip(_WHITE):
                found.append(line)
                if not line.lstrip(_WHITE).startswith("{"):
                    return False
    return bool(found) and all(map(_is_object, found))


def _lines(path: Path, stream: io.TextIOWrapper) -> Iterator[tuple[int, str]]:
    number, expansion = 0, Expansion(path)
    while line := stream.readline(LONGEST_ROW + 1):
        number += 1
        expansion.add(ROW_COST + len(line))
        if len(line) > LONGEST_ROW and not line.lstrip(_WHITE).startswith("["):  # an array may stand on one line
            raise Misuse(f"{path}:{number} must be a JSON object of at most {LONGEST_ROW:,} characters")
        yield number, line


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except _BROKEN:
        return False


def _object(path: Path, number: int, line: str) -> Mapping[str, Any]:
    try:
        value = json.loads(line)
    except _BROKEN as error:
        raise _broken(path, number, line, error) from error
    return _as_object(path, number, value)


def _as_object(path: Path, number: int, value: object) -> Mapping[str, Any]:
    if isinstance(value, dict):
        return value
    raise Misuse(f"{path}:{number} must be a JSON object, got {type(value).__name__}")


def _broken(path: Path, number: int, text: str, error: Exception | str) -> Misuse:
    start = repr(text[:40])
    return Misuse(f"{path}:{number} must be a JSON object, got {start}: {error}")


class _Values:
    """The values of one array, or consecutive values, decoded from a window that slides over the file."""

    def __init__(self, path: Path, stream: io.TextIOWrapper, start: str) -> None:
        self.path = path
        self.stream = stream
        self.window = start
        self.at = 0
        self.number = 1
        self.expansion = Expansion(path)
        self.decode = json.JSONDecoder().raw_decode

    def __iter__(self) -> Iterator[object]:
        if self._next_character() != "[":
            while self._next_character():
                yield self._value()
            return
        self.at += 1
        while self._next_character() != "]":
            yield self._value()
            if self._next_character() == ",":
                self.at += 1
            elif self._next_character() != "]":
                raise self._error("the array is not closed" if not self._next_character() else "a comma is missing")
        self.at += 1
        if self._next_character():
            raise self._error("something follows the array")

    def _next_character(self) -> str:
        """Go to the next character that is not white; empty at the end of the file."""
        while True:
            while self.at < len(self.window) and self.window[self.at] in _WHITE:
                self.at += 1
            if self.at < len(self.window):
                return self.window[self.at]
            if not self._more():
                return ""

    def _more(self) -> bool:
        """Double the undecoded part of the window, so that a long value is decoded only a few times."""
        waiting = self.window[self.at :]
        piece = self.stream.read(max(MEBIBYTE, len(waiting)))
        self.window, self.at = waiting + piece, 0
        return bool(piece)

    def _value(self) -> object:
        while True:
            try:
                value, self.at = self.decode(self.window, self.at)
            except RecursionError as error:
                raise self._error(error) from error
            except ValueError as error:
                if len(self.window) - self.at > LONGEST_ROW or not self._more():
                    raise self._error(error) from error
            else:
                self.number += 1
                self.expansion.add(ROW_COST)
                return value

    def _error(self, reason: Exception | str) -> Misuse:
        return _broken(self.path, self.number, self.window[self.at : self.at + 40], reason)
