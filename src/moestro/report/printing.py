"""Text and tables for a terminal, wide or narrow.

Text goes to rich as `Text`, never as markup, with its control characters made visible; where the terminal cannot show a
character (an ASCII locale, a pipe), it gets the nearest that it can.
"""

from collections.abc import Callable, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moestro.gate.visible import visible

_ASCII = str.maketrans({"−": "-", "±": "+-", "–": "-", "×": "x", "…": "...", "⟨": "<", "⟩": ">"})


def line(console: Console, words: str, style: str = "") -> None:
    """Print one line."""
    console.print(text(console, words, style))


def text(console: Console, words: str, style: str = "") -> Text:
    """Words as the terminal can show them."""
    words = visible(words)
    try:
        words.encode(console.encoding)
    except UnicodeEncodeError:
        words = words.translate(_ASCII).encode(console.encoding, "backslashreplace").decode(console.encoding)
    return Text(words, style=style)


def say(words: str) -> None:
    """Print one line of a command's results to stdout, without wrapping."""
    console = Console()
    console.print(text(console, words), soft_wrap=True)


class Visible(Console):
    """A console whose `print` shows strings literally, without markup or terminal control characters."""

    def print(self, *objects: Any, **options: Any) -> None:
        """Print like rich, with strings made visible."""
        super().print(*(text(self, o) if isinstance(o, str) else o for o in objects), **options)


def table(console: Console, corner: str, titles: Sequence[str]) -> Table:
    """An empty table with a first column of names and one column of figures per title."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    made.add_column(text(console, corner), overflow="fold")
    for title in titles:
        made.add_column(text(console, title), justify="right", overflow="fold")
    return made


def in_parts(console: Console, make: Callable[[Sequence[int]], Table], columns: int) -> None:
    """Print a table that `make` makes of some of its columns, as several tables where they do not fit side by side."""
    unbounded = console.options.update_width(100_000)
    parts: list[list[int]] = []
    for index in range(columns):
        if parts and console.measure(make([*parts[-1], index]), options=unbounded).maximum <= console.width:
            parts[-1].append(index)
        else:
            parts.append([index])
    for part in parts:
        console.print(make(part))
