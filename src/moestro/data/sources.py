"""What the user names with `--data`, as documents.

A source is written `[LABEL=]PLACE[::COLUMN[+COLUMN...]]`. PLACE is a file, a folder (read recursively), a glob, or
`hf:NAME[:CONFIG[:SPLIT]]` for a data set of the Hugging Face hub (split `train` unless named). The domain of a
document is LABEL; without one, the stem of a file that was named, the name of a folder that was named, the folder
that holds a file which a glob found, or the last part of a data set's name.
"""

import logging
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path

from moestro.data.files import KNOWN_ENDINGS, NotText, ending_of, join_columns, no_column, read_rows, stem_of
from moestro.errors import Misuse
from moestro.gate.loading import load_rows

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One text, the unit of the split into train and held-out."""

    text: str
    domain: str
    source: str  # where it came from, as "path:row"


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A `--data` argument, taken apart."""

    spec: str  # as the user typed it
    label: str | None
    place: str
    columns: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    path: Path
    domain: str
    named: bool  # the user named this very file, so that it must be readable


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
    """Yield the documents of one source, files in sorted order.

    A file of text (`.txt .md .rst .py`, and any other ending if the very file is named) is one document; a row of
    `.jsonl .json .csv .tsv .parquet` is one document. All may be gzipped (`.gz`). Documents of nothing but white
    space are dropped. In folders and globs, files of other endings and binary files are skipped, hidden ones not
    looked at; what was skipped is logged as a warning with its count.

    Raises:
        Misuse: the place does not exist, cannot be read, is binary, has no such column, or holds no text.
    """
    source = parse_source(spec, text_column=text_column)
    skipped: Counter[str] = Counter()
    empty = True
    documents = _read_hub(source) if source.place.startswith("hf:") else _read_files(source, skipped)
    for document in documents:
        if not _is_unicode(document.text):
            skipped["rows with half a surrogate pair"] += 1
        elif document.text.strip():
            empty = False
            yield document
    summary = ", ".join(f"{what} ({count})" for what, count in sorted(skipped.items()))
    if empty:
        raise Misuse(f"{spec} holds no text" + (f" (skipped: {summary})" if summary else ""))
    if summary:
        logger.warning("%s: skipped %s", spec, summary)


def _read_files(source: Source, skipped: Counter[str]) -> Iterator[Document]:
    for file in _find_files(source):
        if not file.named and ending_of(file.path) not in KNOWN_ENDINGS:
            skipped["files of unknown ending"] += 1
            continue
        try:
            for number, text in read_rows(file.path, source.columns):
                yield Document(text=text, domain=file.domain, source=f"{file.path}:{number}")
        except NotText:
            if file.named:
                raise
            skipped["files that are not text"] += 1


def _find_files(source: Source) -> Iterator[_Found]:
    path = Path(source.place).expanduser()
    if path.is_file():
        yield _Found(path=path, domain=source.label or stem_of(path), named=True)
    elif path.is_dir():
        yield from _walk(path, source.label)
    elif path.exists():
        raise Misuse(f"{source.spec} must be a file, a folder or a glob, got a device or a pipe")
    elif has_magic(source.place) and (matches := sorted(glob(str(path), recursive=True))):
        for match in map(Path, matches):
            if match.is_file():
                yield _Found(path=match, domain=source.label or match.resolve().parent.name, named=False)
            elif "**" not in source.place:  # `**` already lists what lies in the folders that it matches
                yield from _walk(match, source.label)
    else:
        raise Misuse(f"{source.spec} does not exist: no file, folder or glob match of that name")


def _walk(folder: Path, label: str | None) -> Iterator[_Found]:
    domain = label or folder.resolve().name or "root"
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            path = Path(parent, name)
            if not name.startswith(".") and path.is_file():
                yield _Found(path=path, domain=domain, named=False)


def _read_hub(source: Source) -> Iterator[Document]:
    """Rows of a data set, downloaded (or found in the local cache) by `datasets`."""
    name, config, split, *rest = [*source.place.removeprefix("hf:").split(":"), "", ""]
    if not name or any(rest):
        raise Misuse(f"a data set of the hub must read hf:NAME[:CONFIG[:SPLIT]], got {source.place!r}")
    problem = f"{source.spec} cannot be loaded as a data set of the hub"
    rows = load_rows(name, config or None, split or "train", problem)
    if not set(source.columns).issubset(rows.column_names):
        raise no_column(source.spec, source.columns, rows.column_names)
    for number, row in enumerate(rows.select_columns(list(source.columns)), start=1):
        where = f"{source.place}:{number}"
        text = join_columns(where, dict(row), source.columns)
        if text is not None:
            yield Document(text=text, domain=source.label or Path(name).name, source=where)


def _exists(place: str) -> bool:
    return Path(place).expanduser().exists()


def _is_unicode(text: str) -> bool:
    """Whether UTF-8 can hold the text: JSON can spell half a surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
