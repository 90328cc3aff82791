"""What the user names with `--data`, as documents.

A source is written `[LABEL=]PLACE[::COLUMN[+COLUMN...]]`. PLACE is a file, a folder (read recursively), a glob, or
`hf:NAME[:CONFIG[:SPLIT]]` for a data set of the Hugging Face hub (split `train` unless named). The domain of a
document is LABEL; without one, the stem of a file that was named, the name of a folder that was named, the folder
that holds a file which a glob found, or the last part of a data set's name.
"""

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from moestro.data.chats import Message
from moestro.data.files import NotText, read_rows
from moestro.data.folders import LeftOut, find_files
from moestro.data.rows import Row, columns_among, no_column, row_of
from moestro.errors import Misuse
from moestro.gate.loading import load_rows
from moestro.gate.paths import user_path

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One text, the unit of the split into train and held-out."""

    text: str
    domain: str
    source: str  # where it came from, as "path:row"
    chat: tuple[Message, ...] = ()  # messages of a chat; `text` is then the chat as plain text


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A `--data` argument, taken apart."""

    spec: str  # as the user typed it
    label: str | None
    place: str
    columns: tuple[str, ...]


def parse_source(spec: str, *, text_column: str = "text") -> Source:
    """Take `[LABEL=]PLACE[::COLUMN[+COLUMN...]]` apart; `text_column` (also `a+b`) applies where no column is given."""
    label, place = None, spec
    before, equals, after = spec.partition("=")
    if equals and "/" not in before and os.sep not in before and not before.startswith("hf:") and not _exists(spec):
        label, place = before, after
    place, separator, chosen = place.rpartition("::") if "::" in place else (place, "", "")
    columns = tuple((chosen if separator else text_column).split("+"))
    if not place or label == "" or not all(columns):
        raise Misuse(f"a data source must read [LABEL=]PLACE[::COLUMN[+COLUMN...]], got {spec!r}")
    return Source(spec=spec, label=label, place=place, columns=columns)


def read_source(spec: str, *, text_column: str = "text") -> Iterator[Document]:
    """Yield the documents of one source, files in sorted order, one row in memory at a time.

    A file of text (`.txt .md .rst .py`, and any other ending if the very file is named) is one document, or several if
    it is longer than 16 Mi characters; a row of JSON (`.jsonl .ndjson .json`), `.csv`, `.tsv`, `.parquet` or `.arrow`
    is one document. All may be compressed (`.gz .bz2 .xz .zst .lz4`). A row without a column `text` that holds a chat
    (`messages`, `conversations`, or `prompt` and `completion`) is a document with its messages.

    Skipped files and rows are counted in a warning: files of other endings, documents of white space alone, rows with
    an empty column, and binary files in folders and globs. Hidden files are ignored.

    Raises:
        Misuse: the place does not exist, cannot be read, is binary, has no such column, holds no text, or less than
            5 % of its bytes are of known endings.
    """
    source = parse_source(spec, text_column=text_column)
    left_out = LeftOut()
    hub = source.place.startswith("hf:")
    empty = True
    for document in _read_hub(source, left_out) if hub else _read_files(source, source.place, left_out):
        if not _is_unicode(document.text):
            left_out.others["rows with half a surrogate pair"] += 1
        elif document.text.strip():
            empty = False
            yield document
        else:
            left_out.others["documents without text"] += 1
    left_out.check(spec)
    if empty:
        raise Misuse(f"{spec} holds no text" + (f" (skipped: {left_out})" if str(left_out) else ""))
    if str(left_out):
        logger.warning("%s: skipped %s", spec, left_out)


def _read_files(source: Source, place: str, left_out: LeftOut) -> Iterator[Document]:
    files = find_files(source.spec, place, source.label, left_out)
    left_out.check(source.spec)
    for file in files:
        try:
            for row in read_rows(file.path, source.columns):
                yield _document(row, file.domain, f"{file.path}:{row.number}")
        except NotText as error:
            if file.named:
                raise
            logger.warning("skipped: %s", error)
            left_out.others["files that are not text"] += 1
            size = file.path.stat().st_size
            left_out.bytes_read -= size
            left_out.bytes_left_out += size


def _document(row: Row, domain: str, source: str) -> Document:
    return Document(text=row.text or "", domain=domain, source=source, chat=row.chat)


def _read_hub(source: Source, left_out: LeftOut) -> Iterator[Document]:
    """Rows of a data set, downloaded (or found in the local cache) by `datasets`, or saved by it in a folder."""
    name, config, split, *rest = [*source.place.removeprefix("hf:").split(":"), "", ""]
    if not name or any(rest):
        raise Misuse(f"a data set of the hub must read hf:NAME[:CONFIG[:SPLIT]], got {source.place!r}")
    source = replace(source, label=source.label or Path(name).name)
    folder = user_path(name)
    if (folder / "dataset_dict.json").is_file():
        yield from _read_files(source, str(folder / (split or "train")), left_out)
    elif (folder / "state.json").is_file():
        yield from _read_files(source, str(folder), left_out)
    else:
        yield from _read_data_set(source, name, config, split)


def _read_data_set(source: Source, name: str, config: str, split: str) -> Iterator[Document]:
    problem = f"{source.spec} cannot be loaded as a data set of the hub"
    rows = load_rows(name, config or None, split or "train", problem)
    chosen = columns_among(rows.column_names, source.columns)
    if chosen is None:
        raise no_column(source.spec, source.columns, rows.column_names)
    for number, record in enumerate(rows.select_columns(list(chosen)), start=1):
        where = f"{source.place}:{number}"
        row = row_of(where, number, dict(record), chosen, chat=chosen != source.columns)
        yield _document(row, source.label or name, where)


def _exists(place: str) -> bool:
    try:
        return user_path(place).exists()
    except Misuse:  # LABEL=PATH may be too long for a file name
        return False


def _is_unicode(text: str) -> bool:
    """Whether UTF-8 can hold the text: JSON can spell half a surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
