"""Detect changed sources without reading them, by paths, sizes and times of change."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from moestro.data import standard_library
from moestro.data.folders import expand, folders_of
from moestro.data.sources import parse_source
from moestro.gate.paths import user_path


def inventory(sources: Sequence[str], *options: object) -> str | None:
    """Return a hash of the files that `sources` name and of `options`; None if a source is not made of files.

    Files of unreadable formats count too: a needless change costs one reading, a missed one would train on old text.
    Writing a file changes its time of change, even if its size stays the same.
    """
    places = [parse_source(spec).place for spec in sources]
    if any(place.startswith("hf:") for place in places):
        return None
    files = [_files(place) for place in places] if sources else [standard_library.files()]
    digest = hashlib.sha256(repr((tuple(sources), options)).encode())
    for path in (path for each in files for path in each):
        status = path.stat()
        entry = (os.fspath(path), status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        digest.update(repr(entry).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _files(place: str) -> Iterator[Path]:
    """Yield the files that a path or glob names; nothing if there are none."""
    path = user_path(place)
    for match in [path] if path.exists() else sorted(map(Path, set(expand(str(path))))):
        if match.is_dir():
            yield from _below(match)
        elif match.exists():
            yield match.absolute()


def _below(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder in sorted order, except those of hidden folders, which are never read."""
    for parent, names in folders_of(folder.absolute(), set()):
        yield from (path for name in names if (path := parent / name).exists())
