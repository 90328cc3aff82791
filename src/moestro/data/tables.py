"""Read tables as streams of records: CSV, TSV, Parquet, Arrow."""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from moestro.data.compression import LONGEST_ROW, ROW_COST, Expansion, seekable
from moestro.data.plain_text import NotText, open_text
from moestro.data.rows import columns_among, no_column
from moestro.errors import Misuse

Records = Iterator[Mapping[str, Any]]
BATCH = 1024
"""Rows in memory at once; fewer if a column holds lists."""


class TabSeparated(csv.excel_tab):
    """text/tab-separated-values knows no quoting: a lone " in a field is a quotation mark."""

    quoting = csv.QUOTE_NONE


def read_delimited(path: Path, columns: Sequence[str], dialect: type[csv.Dialect]) -> Records:
    """Yield the rows of a CSV or TSV file as records of the requested columns.

    Raises:
        Misuse: a quotation mark is not closed where its cell ends, a row has more cells than the header, or there is no
            such column. The error names the line on which the row begins.
    """
    csv.field_size_limit(LONGEST_ROW)  # the stock limit of 128 KiB refuses a long document
    with open_text(path) as stream:
        reader = csv.reader(_lines(path, stream), dialect=dialect, strict=True)
        rows = _cells(path, reader)
        _, header = next(rows, (1, []))
        chosen = _choose(path, columns, header) if header else ()
        for line, cells in rows:
            if len(cells) > len(header):
                raise Misuse(
                    f"{path}:{line} must have {len(header)} cells, as the header has, got {len(cells)}: "
                    "a cell that holds the delimiter must be quoted"
                )
            record = dict(zip(header, cells, strict=False))
            yield {name: record.get(name) for name in chosen}


def _cells(path: Path, reader: Any) -> Iterator[tuple[int, list[str]]]:
    """Yield each row that is not blank with the line on which it begins."""
    begins = 1
    try:
        for cells in reader:
            if cells:
                yield begins, cells
            begins = reader.line_num + 1
    except csv.Error as error:
        hint = " (is a quotation mark in that row not closed?)" if reader.line_num > begins else ""
        raise Misuse(f"{path}:{begins} cannot be read as a row of a table: {error}{hint}") from error


def _lines(path: Path, stream: io.TextIOWrapper) -> Iterator[str]:
    number, expansion = 0, Expansion(path)
    while line := stream.readline(LONGEST_ROW + 1):
        number += 1
        expansion.add(ROW_COST + len(line))
        if len(line) > LONGEST_ROW:
            raise Misuse(f"{path}:{number} must be a row of at most {LONGEST_ROW:,} characters")
        if "\0" in line:
            raise Misuse(f"{path}:{number} cannot be read as a row of a table: it holds NUL bytes")
        yield line


def read_parquet(path: Path, columns: Sequence[str]) -> Records:
    """Yield the rows of a Parquet file, batch by batch.

    Text columns are read dictionary-encoded, so that a value shared by a million rows is in memory once.
    """
    expansion = Expansion(path)
    with seekable(path) as place, place.open("rb") as file:  # pyarrow opens no names that are not UTF-8
        try:
            table = pq.ParquetFile(file)
            schema = table.schema_arrow
            chosen = _choose(path, columns, schema.names)
            for group in range(table.metadata.num_row_groups):
                Expansion(path).add(table.metadata.row_group(group).total_byte_size)  # before it is decompressed
            text = [name for name in chosen if _is_text(schema.field(name).type)]
            table = pq.ParquetFile(file, read_dictionary=text, buffer_size=2**20)
            size = BATCH if len(text) == len(chosen) else BATCH // 64
            for batch in table.iter_batches(batch_size=size, columns=list(chosen)):
                yield from _records(batch, expansion)
        except pa.ArrowException as error:
            raise Misuse(f"{path} is not a readable Parquet file: {_first_line(error)}") from error


def read_arrow(path: Path, columns: Sequence[str]) -> Records:
    """Yield the rows of an Arrow file (the format that `datasets` saves, and Feather), batch by batch."""
    expansion = Expansion(path)
    with seekable(path) as place, place.open("rb") as file, pa.PythonFile(file, mode="r") as source:
        try:
            is_file = source.read(6) == b"ARROW1"
            source.seek(0)
            reader = pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)
            chosen = list(_choose(path, columns, reader.schema.names))
            batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else iter(reader)
            for batch in batches:
                part = batch.select(chosen)
                part.validate(full=True)  # offsets out of bounds would crash the process
                for start in range(0, len(part), BATCH):
                    yield from _records(part.slice(start, BATCH), expansion)
        except pa.ArrowException as error:
            if "UTF8" in str(error):
                raise NotText(f"{path} is not text in UTF-8: {_first_line(error)}") from error
            raise Misuse(f"{path} is not a readable Arrow file: {_first_line(error)}") from error


def _choose(path: Path, columns: Sequence[str], names: Sequence[str]) -> tuple[str, ...]:
    """Return the columns to read among the table's `names`. Raise Misuse unless the table has each exactly once."""
    chosen = columns_among(names, columns)
    if chosen is None:
        raise no_column(str(path), columns, names)
    if repeated := [name for name in dict.fromkeys(chosen) if names.count(name) > 1]:
        raise Misuse(f"{path} must name each column once, got {' and '.join(repeated)} twice")
    return chosen


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _records(batch: pa.RecordBatch, expansion: Expansion) -> Records:
    columns = [_values(batch.column(name), f"{expansion.path}: column {name!r}") for name in batch.schema.names]
    for values in zip(*columns, strict=True):
        expansion.add(ROW_COST + sum(len(value) for value in values if isinstance(value, str)))
        yield dict(zip(batch.schema.names, values, strict=True))


def _values(array: pa.Array, where: str) -> Iterator[Any]:
    """Yield Python values; rows with the same dictionary entry share one string."""
    if not isinstance(array, pa.DictionaryArray):
        yield from _as_python(array, where)
        return
    shared = _as_python(array.dictionary, where)
    for index in array.indices.to_pylist():
        yield None if index is None else shared[index]


def _as_python(array: pa.Array, where: str) -> list[Any]:
    """Return Python values. Raise Misuse where there are none, such as for a date after the year 9999."""
    try:
        return array.to_pylist()
    except (pa.ArrowException, UnicodeError):
        raise
    except Exception as error:  # OverflowError for a date, ValueError for a repeated field of a struct, and others
        raise Misuse(
            f"{where} must hold text (or a list of messages), got values that Python lacks: {error}"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
