"""Show other people's text as it is, whatever it holds.

Names of recipes, domains, layers and files come from users and their data, and so does much of what libraries say of
them. Characters that steer a terminal or the direction of text are replaced by their numbers where text leaves the
package: the last line of a command, warnings, tables and progress. Messages themselves hold the text unchanged.
"""

import logging
import sys
import unicodedata
import warnings
from typing import Any

_JOINERS = "\u200c\u200d"  # invisible but part of how Persian, Hindi and emoji are written
_LINE, _END = 1200, 300


def visible(text: str) -> str:
    """Return `text` with every control, direction and surrogate character replaced by its number."""
    return text if text.isascii() and text.isprintable() else "".join(_visible(character) for character in text)


def shortened(text: str, length: int) -> str:
    """Return `text`, or its beginning and an ellipsis if it has more than `length` characters."""
    return text if len(text) <= length else text[: length - 1] + "…"


def one_line(text: str) -> str:
    """Return `text` as one visible line of bounded length; a long one loses its middle, since reasons stand last."""
    text = text if len(text) <= _LINE else f"{text[: _LINE - _END]}…{text[-_END:]}"
    return visible(text)


def said(error: BaseException) -> str:
    """Return what a library said, on one line of at most 240 characters."""
    return shortened(" ".join(str(error)[:10_000].split()), 240) or type(error).__name__


class VisibleLines(logging.Handler):
    """Write what the package warns of to stderr, one visible line for each."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        print(one_line(record.getMessage()), file=sys.stderr)


def make_visible() -> None:
    """Let every warning of the program be one visible line; those of other packages are for programmers, and go."""
    logger = logging.getLogger("moestro")
    if not any(isinstance(handler, VisibleLines) for handler in logger.handlers):
        logger.addHandler(VisibleLines())
    warnings.filterwarnings("ignore", module=r"(?!moestro\b)")
    warnings.showwarning = show_warning


def show_warning(message: Warning | str, *where: Any, **options: Any) -> None:
    """Print a warning as one line, without the place in the code."""
    print(one_line(str(message)), file=sys.stderr)


def _visible(character: str) -> str:
    if unicodedata.category(character) in {"Cc", "Cf", "Cs", "Zl", "Zp"} and character not in _JOINERS:
        return f"⟨U+{ord(character):04X}⟩"
    return character
