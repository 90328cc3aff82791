"""Turn one row of a file into a document: a text or a chat."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from moestro.data.chats import Message, chat_columns, messages_of, plain
from moestro.data.compression import LONGEST_ROW
from moestro.errors import Misuse

DEFAULT_COLUMNS = ("text",)


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a table, or a part of a file of text."""

    number: int
    """Position in the file, counted from 1."""
    text: str | None
    """None if a column is missing or null: an incomplete row is not a document."""
    chat: tuple[Message, ...] = ()
    """Messages of a chat; `text` is then the chat as plain text."""


def columns_among(names: Iterable[str], columns: Sequence[str]) -> tuple[str, ...] | None:
    """Return the requested columns if they exist; if they are the default, else those of a chat; else None."""
    existing = set(names)
    if existing.issuperset(columns):
        return tuple(columns)
    return chat_columns(existing) if tuple(columns) == DEFAULT_COLUMNS else None


def row_of(where: str, number: int, record: Mapping[str, Any], columns: Sequence[str], *, chat: bool) -> Row:
    """Return the row of `record`: its columns joined by line ends, or its chat.

    A list of messages is a chat. Texts in `prompt` and `completion` are a chat only if `chat` is true.

    Raises:
        Misuse: a column holds neither text nor a chat, or more than 32 Mi characters.
    """
    values = [record.get(column) for column in columns]
    if None in values:
        return Row(number, None)
    messages: tuple[Message, ...] = ()
    if all(isinstance(value, str) for value in values) and not (chat and len(values) > 1):
        text = "\n".join(cast(list[str], values))
    else:
        found = messages_of(columns, values)
        if found is None:
            column, value = next(pair for pair in zip(columns, values, strict=True) if not isinstance(pair[1], str))
            raise Misuse(
                f"{where}: column {column!r} must hold text (or a list of messages), got {type(value).__name__}"
            )
        messages, text = found, plain(found)
    if len(text) > LONGEST_ROW:
        raise Misuse(f"{where} must hold at most {LONGEST_ROW:,} characters, got {len(text):,}")
    return Row(number, text, messages)


def no_column(where: str, columns: Sequence[str], existing: Iterable[str]) -> Misuse:
    """Return the error for a missing text column; it lists the existing columns."""
    names = sorted(existing)
    missing = " and ".join(repr(column) for column in columns if column not in names)
    listed = ", ".join(repr(name if len(name) <= 40 else f"{name[:40]}…") for name in names[:20])
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return Misuse(f"{where} has no column {missing}; it has {listed}{more} (choose with --text-column or ::COLUMN)")
