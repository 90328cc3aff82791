"""One file on disk, of any format that moestro reads, as rows of text."""

import csv
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from moestro.data.compression import UNREADABLE, open_bytes, without_compression
from moestro.data.json_rows import holds_json_lines, read_json
from moestro.data.plain_text import NotText, read_parts
from moestro.data.rows import Row, columns_among, no_column, row_of
from moestro.data.tables import TabSeparated, read_arrow, read_delimited, read_parquet
from moestro.errors import Misuse

logger = logging.getLogger(__name__)

TEXT_ENDINGS = (".txt", ".md", ".rst", ".py")
JSON_ENDINGS = (".jsonl", ".json", ".ndjson", ".jsonlines", ".jl")
PARQUET_ENDINGS, ARROW_ENDINGS = (".parquet", ".parq", ".pq"), (".arrow", ".feather")
KNOWN_ENDINGS = (*TEXT_ENDINGS, *JSON_ENDINGS, ".csv", ".tsv", *PARQUET_ENDINGS, *ARROW_ENDINGS)
ARCHIVES = (".zip", ".tar", ".tgz", ".tbz", ".tbz2", ".txz", ".tzst", ".7z", ".rar")


def ending_of(path: Path) -> str:
    """Return the ending that decides how a file is read: `.jsonl` for `part0.JSONL.gz`, empty where there is none."""
    return Path(without_compression(path)).suffix.lower()


def stem_of(path: Path) -> str:
    """Return the file's name without its endings: `part0` for `part0.jsonl.gz`."""
    return Path(without_compression(path)).stem


def read_rows(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    """Yield the rows of a file, in bounded memory; a file of text is one row, or several of 16 Mi characters.

    In formats with columns, a row's text is that of `columns`, joined by line ends. If `columns` is the default `text`,
    which the file lacks, and the file holds chats (`chats.CHAT_COLUMNS`), a row is a chat. A file of unknown ending, or
    `.txt`, is read as JSON lines, with a warning, if its first lines are JSON objects.

    Raises:
        NotText: the file is binary, or not in UTF-8 (for `.py`: not in the encoding that it declares).
        Misuse: the file cannot be read or parsed, has no such column, or expands beyond the limit.
    """
    try:
        match format_of(path):
            case "json":
                yield from _rows(path, read_json(path), columns)
            case "csv":
                yield from _rows(path, read_delimited(path, columns, csv.excel), columns)
            case "tsv":
                yield from _rows(path, read_delimited(path, columns, TabSeparated), columns)
            case "parquet":
                yield from _rows(path, read_parquet(path, columns), columns)
            case "arrow":
                yield from _rows(path, read_arrow(path, columns), columns)
            case "archive":
                raise Misuse(f"{path} is an archive: unpack it, and name its folder")
            case _:
                parts = read_parts(path, declared=ending_of(path) == ".py")
                yield from (Row(number, part) for number, part in enumerate(parts, start=1))
    except UnicodeError as error:
        raise NotText(f"{path} is not text in UTF-8: {error}") from error
    except UNREADABLE as error:
        raise Misuse(f"{path} cannot be read: {error}") from error


def read_text(path: Path) -> str:
    """Return a whole file of text, line ends as they are.

    Raises:
        NotText: it holds NUL bytes or cannot be decoded.
    """
    return "".join(read_parts(path, declared=ending_of(path) == ".py"))


def format_of(path: Path) -> str:
    """Return the format by the file's ending, or by its first bytes or lines if the ending is unknown or `.txt`."""
    ending = ending_of(path)
    for name, endings in (
        ("json", JSON_ENDINGS),
        ("csv", (".csv",)),
        ("tsv", (".tsv",)),
        ("parquet", PARQUET_ENDINGS),
        ("arrow", ARROW_ENDINGS),
        ("archive", ARCHIVES),
        ("text", tuple(e for e in TEXT_ENDINGS if e != ".txt")),
    ):
        if ending in endings or (name == "archive" and path.suffix.lower() in ARCHIVES):
            return name
    return _format_by_content(path)


def _format_by_content(path: Path) -> str:
    with open_bytes(path) as stream:
        head = stream.read(6)
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith(b"ARROW1"):
        return "arrow"
    try:
        found = holds_json_lines(path)
    except UnicodeError:  # binary, or in another encoding: reading it as text says so
        return "text"
    if found:
        logger.warning("%s holds JSON lines: each is read as a row", path)
    return "json" if found else "text"


def _rows(path: Path, records: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> Iterator[Row]:
    """Check columns as rows go by: JSON rows may leave out a null, so one row that has them all is enough."""
    seen: set[str] = set()
    found = False
    for number, record in enumerate(records, start=1):
        chosen = columns_among(record, columns)
        found = found or chosen is not None
        if not found and len(seen) < 1000:
            seen.update(record)
        chat = chosen is not None and chosen != tuple(columns)
        yield row_of(f"{path}:{number}", number, record, chosen or columns, chat=chat)
    if seen and not found:
        raise no_column(str(path), columns, seen)
