"""One file on disk, of any format that moestro reads, as rows of text."""

import csv
import gzip
import io
import json
import sys
import tokenize
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from moestro.errors import Misuse

TEXT_ENDINGS = (".txt", ".md", ".rst", ".py")
ROW_ENDINGS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
KNOWN_ENDINGS = (*TEXT_ENDINGS, *ROW_ENDINGS)


class _TabSeparated(csv.excel_tab):
    """text/tab-separated-values knows no quoting: a lone " in a field is a quotation mark."""

    quoting = csv.QUOTE_NONE


class NotText(Misuse):
    """A file of text that turns out to be binary, or in no encoding that we read."""


def ending_of(path: Path) -> str:
    """The ending that decides how a file is read: `.jsonl` for `part0.JSONL.gz`, empty where there is none."""
    return Path(_without_gz(path)).suffix.lower()


def stem_of(path: Path) -> str:
    """The file's name without its endings: `part0` for `part0.jsonl.gz`."""
    return Path(_without_gz(path)).stem


def _without_gz(path: Path) -> str:
    return path.stem if path.suffix.lower() == ".gz" else path.name


def read_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, str]]:
    """Yield `(row number from 1, text)`; a file of text is one row, whatever its ending.

    In the formats with columns a row's text is that of `columns`, joined by line ends; rows with a null among them
    are passed over, since half a row is not a document.

    Raises:
        NotText: a file of text is binary, or not in UTF-8 (for `.py`: not in the encoding that it declares).
        Misuse: the file cannot be read or parsed, or has no such column of text.
    """
    try:
        match ending_of(path):
            case ".jsonl":
                yield from _texts(path, _json_lines(path), columns)
            case ".json":
                yield from _texts(path, _json_records(path), columns)
            case ".csv":
                yield from _texts(path, _delimited(path, columns, csv.excel), columns)
            case ".tsv":
                yield from _texts(path, _delimited(path, columns, _TabSeparated), columns)
            case ".parquet":
                yield from _texts(path, _parquet(path, columns), columns)
            case _:
                yield 1, read_text(path)
    except (OSError, EOFError, zlib.error) as error:
        raise Misuse(f"{path} cannot be read: {error}") from error


def read_text(path: Path) -> str:
    """A whole file of text, line ends as they are.

    Raises:
        NotText: it holds NUL bytes or cannot be decoded.
    """
    with _open(path) as stream:
        data = stream.read()
    if b"\0" in data:
        raise NotText(f"{path} is binary, not text: it holds NUL bytes")
    try:
        encoding = tokenize.detect_encoding(io.BytesIO(data).readline)[0] if ending_of(path) == ".py" else "utf-8-sig"
        return data.decode(encoding)
    except (UnicodeDecodeError, SyntaxError) as error:  # SyntaxError: detect_encoding's word for "no such encoding"
        raise NotText(f"{path} is not text in UTF-8: {error}") from error


def no_column(where: str, columns: Sequence[str], existing: Iterable[str]) -> Misuse:
    """The error for a text column that is not there; names the columns that are."""
    names = sorted(existing)
    missing = " and ".join(repr(column) for column in columns if column not in names)
    listed = ", ".join(repr(name if len(name) <= 40 else f"{name[:40]}…") for name in names[:20])
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return Misuse(f"{where} has no column {missing}; it has {listed}{more} (choose with --text-column or ::COLUMN)")


def join_columns(where: str, row: Mapping[str, Any], columns: Sequence[str]) -> str | None:
    """The text of one row: its columns joined by line ends, None where one of them is null or absent."""
    values = [row.get(column) for column in columns]
    for column, value in zip(columns, values, strict=True):
        if value is not None and not isinstance(value, str):
            raise Misuse(f"{where}: column {column!r} must hold text, got {type(value).__name__}")
    return None if None in values else "\n".join(cast(list[str], values))


def _texts(path: Path, records: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> Iterator[tuple[int, str]]:
    """Check columns as rows go by: JSON rows may leave out a null, so one row that has them all is enough."""
    seen: set[str] = set()
    for number, record in enumerate(records, start=1):
        if not seen.issuperset(columns):
            seen.update(record)
        text = join_columns(f"{path}:{number}", record, columns)
        if text is not None:
            yield number, text
    if seen and not seen.issuperset(columns):
        raise no_column(str(path), columns, seen)


def _open(path: Path) -> gzip.GzipFile | io.BufferedReader:
    return gzip.GzipFile(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")


def _json_lines(path: Path) -> Iterator[Mapping[str, Any]]:
    with _open(path) as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield _json_object(path, number, line)


def _json_records(path: Path) -> Iterator[Mapping[str, Any]]:
    """A `.json` file is an array of objects, one object, or (as often found) JSON lines."""
    with _open(path) as stream:
        data = stream.read()
    try:
        whole = json.loads(data)
    except (ValueError, RecursionError):
        yield from _json_lines(path)
        return
    for number, record in enumerate(whole if isinstance(whole, list) else [whole], start=1):
        yield _as_object(path, number, record)


def _json_object(path: Path, number: int, line: bytes) -> Mapping[str, Any]:
    try:
        return _as_object(path, number, json.loads(line))
    except Misuse:
        raise
    except (ValueError, RecursionError) as error:
        raise Misuse(f"{path}:{number} must be a JSON object, got {_start_of(line)}: {error}") from error


def _as_object(path: Path, number: int, value: object) -> Mapping[str, Any]:
    if isinstance(value, dict):
        return value
    raise Misuse(f"{path}:{number} must be a JSON object, got {type(value).__name__}")


def _start_of(line: bytes) -> str:
    return repr(line[:40].decode("utf-8", "replace"))


def _delimited(path: Path, columns: Sequence[str], dialect: type[csv.Dialect]) -> Iterator[Mapping[str, Any]]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the stock limit of 128 KiB refuses a long document
    with _open(path) as stream, io.TextIOWrapper(stream, encoding="utf-8-sig", newline="") as text:
        reader = csv.DictReader(text, dialect=dialect)
        try:
            if reader.fieldnames and not set(columns).issubset(reader.fieldnames):
                raise no_column(str(path), columns, reader.fieldnames)
            yield from reader
        except (csv.Error, UnicodeDecodeError) as error:
            raise Misuse(f"{path}:{reader.line_num} cannot be read as a table: {error}") from error


def _parquet(path: Path, columns: Sequence[str]) -> Iterator[Mapping[str, Any]]:
    with _open(path) as stream:
        try:
            table = pq.ParquetFile(io.BytesIO(stream.read()) if path.suffix.lower() == ".gz" else stream)
            names = table.schema_arrow.names
            if not set(columns).issubset(names):
                raise no_column(str(path), columns, names)
            for batch in table.iter_batches(batch_size=1024, columns=list(columns)):
                yield from batch.to_pylist()
        except pa.ArrowException as error:
            raise Misuse(f"{path} is not a readable Parquet file: {error}") from error
