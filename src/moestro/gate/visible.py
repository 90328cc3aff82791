"""Print text from users and their data safely.

Names of recipes, domains, layers and files come from users and their data, and libraries repeat them in messages.
Characters that control a terminal or the direction of text are replaced by their code points when text is printed: in
the last line of a command, warnings, tables and progress. Messages in exceptions hold the text unchanged.
"""

import logging
import sys
import unicodedata
import warnings
from typing import Any

_JOINERS = "\u200c\u200d"  # invisible but part of how Persian, Hindi and emoji are written
_LINE, _END = 1200, 300  # characters of the longest line, and those of its end that stay if it is cut


def visible(text: str) -> str:
    """Return `text` with line breaks and every control, direction and surrogate character replaced by code points."""
    return text if text.isascii() and text.isprintable() else "".join(_visible(character) for character in text)


def shortened(text: str, length: int) -> str:
    """Return `text`, or its beginning and an ellipsis if it has more than `length` characters."""
    return text if len(text) <= length else text[: length - 1] + "…"


def one_line(text: str) -> str:
    """Return `text` as one visible line of bounded length; a long one loses its middle, as the reason comes last."""
    text = text if len(text) <= _LINE else f"{text[: _LINE - _END]}…{text[-_END:]}"
    return visible(text)


def said(error: BaseException) -> str:
    """Return the message of a library's error on one line of at most 240 characters, or the name of its class."""
    return shortened(" ".join(str(error)[:10_000].split()), 240) or type(error).__name__


class VisibleLines(logging.Handler):
    """Write warnings of the package to stderr, one visible line each."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        print(one_line(record.getMessage()), file=sys.stderr)


def make_visible() -> None:
    """Print every warning of the package as one visible line, and hide warnings of other packages."""
    logger = logging.getLogger("moestro")
    if not any(isinstance(handler, VisibleLines) for handler in logger.handlers):
        logger.addHandler(VisibleLines())
    warnings.filterwarnings("ignore", module=r"(?!moestro\b)")
    warnings.showwarning = show_warning


def show_warning(message: Warning | str, *where: Any, **options: Any) -> None:
    """Print a warning as one line, without its place in the code."""
    print(one_line(str(message)), file=sys.stderr)


def _visible(character: str) -> str:
    if unicodedata.category(character) in {"Cc", "Cf", "Cs", "Zl", "Zp"} and character not in _JOINERS:
        return f"⟨U+{ord(character):04X}⟩"
    return character
