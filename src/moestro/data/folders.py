"""Find the files of a source: one file, a folder (links to folders are followed), or the matches of a glob."""

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from glob import escape, glob, has_magic
from pathlib import Path

from moestro.data.compression import open_bytes, without_compression
from moestro.data.files import KNOWN_ENDINGS, ending_of, stem_of
from moestro.errors import Misuse
from moestro.gate.paths import user_path

METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
"""Metadata files beside the rows of a hub data set or of `datasets.save_to_disk`; they hold no text."""
NEVER_TEXT = {
    *(".png", ".jpg", ".jpeg", ".gif", ".webp", ".svg", ".ico", ".bmp", ".tif", ".tiff"),
    *(".mp3", ".wav", ".flac", ".ogg", ".mp4", ".webm", ".mov", ".avi", ".mkv", ".woff", ".woff2", ".ttf", ".otf"),
    *(".pyc", ".so", ".o", ".a", ".dll", ".exe", ".class", ".lock"),
}
"""Endings of images, sound and compiled code; their bytes do not count towards SMALLEST_SHARE."""
SMALLEST_SHARE = 0.05
"""Smallest share of a folder's bytes that must be readable, not counting NEVER_TEXT."""
_LISTED = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A file to read."""

    path: Path
    domain: str
    named: bool
    """The user named this very file, so that it must be readable."""


@dataclass(slots=True)
class LeftOut:
    """Counts of files and rows of a source that were skipped, for the warning."""

    endings: Counter[str] = field(default_factory=Counter)
    """Files of unknown ending, or of none."""
    others: Counter[str] = field(default_factory=Counter)
    """Everything else that was skipped, by a description."""
    bytes_read: int = 0
    bytes_left_out: int = 0

    def file(self, path: Path) -> None:
        """Count a file of unknown ending."""
        compression = path.name[len(without_compression(path)) :]
        ending = f"{ending_of(path)}{compression}".lower()
        self.endings[ending or "no ending"] += 1
        if ending_of(path) not in NEVER_TEXT:
            self.bytes_left_out += path.stat().st_size

    def __str__(self) -> str:
        common = self.endings.most_common()
        parts = [f"{ending} ({count})" for ending, count in common[:_LISTED]]
        if rest := common[_LISTED:]:
            parts.append(f"{len(rest)} more endings ({sum(count for _, count in rest)})")
        return ", ".join(parts + [f"{what} ({count})" for what, count in sorted(self.others.items())])

    def check(self, spec: str) -> None:
        """Raise Misuse if almost nothing of a source is readable: perhaps only its README would be read."""
        total = self.bytes_read + self.bytes_left_out
        if self.bytes_read < SMALLEST_SHARE * total:
            raise Misuse(
                f"{spec} must be read to at least {SMALLEST_SHARE:.0%} of its bytes, got {self.bytes_read:,} of "
                f"{total:,} (skipped: {self}): name the files that you mean, by a glob such as {spec}/*.txt"
            )


def find_files(spec: str, place: str, label: str | None, left_out: LeftOut) -> list[Found]:
    """Return the files of known endings at `place` in sorted order; count all others in `left_out`.

    Each real folder is read once, even if several links lead to it. Hidden files and folders are ignored.

    Raises:
        Misuse: there is no such place, or a folder cannot be listed.
    """
    path = user_path(place)
    seen: set[str] = set()
    if path.is_file():
        found = [Found(path=path, domain=label or stem_of(path), named=True)]
    elif path.is_dir():
        found = list(_walk(path, label, left_out, seen))
    elif path.exists():
        raise Misuse(f"{spec} must be a file, a folder or a glob, got a device or a pipe")
    elif has_magic(place) and (matches := sorted(set(expand(str(path))))):
        found = list(_matches(list(map(Path, matches)), place, label, left_out, seen))
    else:
        raise Misuse(f"{spec} does not exist: no file, folder or glob match of that name")
    left_out.bytes_read = sum(file.path.stat().st_size for file in found)
    return found


def expand(pattern: str) -> Iterator[str]:
    """Yield the matches of a pattern. `**` enters each real folder once; `glob` would follow loops of links."""
    parts = Path(pattern).parts
    if "**" not in parts:
        yield from glob(pattern)
        return
    place = parts.index("**")
    rest = parts[place + 1 :]
    seen: set[str] = set()
    for base in glob(str(Path(*parts[:place]))) if place else ["."]:
        for parent, files in folders_of(Path(base), seen):
            if rest:
                yield from expand(str(Path(escape(str(parent)), *rest)))
            else:
                yield from (str(parent / name) for name in files if not name.startswith("."))


def _matches(matches: list[Path], place: str, label: str | None, left_out: LeftOut, seen: set[str]) -> Iterator[Found]:
    files: set[tuple[str, str]] = set()
    for match in matches:
        if match.is_file():
            real = (os.path.realpath(match.parent), match.name)
            if real not in files:
                files.add(real)
                yield from _chosen(match, label or match.resolve().parent.name or "root", left_out)
        elif match.is_dir() and "**" not in place:  # `**` already lists what lies in the folders that it matches
            yield from _walk(match, label, left_out, seen)


def folders_of(folder: Path, seen: set[str]) -> Iterator[tuple[Path, list[str]]]:
    """Yield each real folder at or below `folder`, through links, with its file names; hidden folders are left out."""
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=_unlisted):
        real = os.path.realpath(parent)
        if real in seen:
            folders[:] = []
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield Path(parent), sorted(files)


def _walk(folder: Path, label: str | None, left_out: LeftOut, seen: set[str]) -> Iterator[Found]:
    domain = label or folder.resolve().name or "root"
    for parent, files in folders_of(folder, seen):
        saved = _saved_shards(parent)
        for name in files:
            path = parent / name
            if name.startswith("."):
                continue
            if not path.is_file():
                left_out.others["broken links" if path.is_symlink() else "devices and pipes"] += 1
            elif saved is not None and ending_of(path) == ".arrow" and name not in saved:
                left_out.others["caches of a data set"] += 1
            else:
                yield from _chosen(path, domain, left_out)


def _chosen(path: Path, domain: str, left_out: LeftOut) -> Iterator[Found]:
    """Yield the file if it is to be read; count it otherwise."""
    if path.name in METADATA or _is_card(path):
        left_out.others["metadata of a data set"] += 1
    elif ending_of(path) in KNOWN_ENDINGS:
        yield Found(path=path, domain=domain, named=False)
    else:
        left_out.file(path)


def _saved_shards(folder: Path) -> set[str] | None:
    """Return the files that `datasets.save_to_disk` lists; None if the folder is not such a data set."""
    try:
        state = json.loads((folder / "state.json").read_text())
        return {entry["filename"] for entry in state["_data_files"]}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _is_card(path: Path) -> bool:
    """Return whether this is the README of a data set of the hub, which begins with its metadata in YAML."""
    if path.name != "README.md":
        return False
    with open_bytes(path) as stream:
        return stream.readline(8).strip() == b"---"


def _unlisted(error: OSError) -> None:
    raise Misuse(f"{error.filename} cannot be listed: {error.strerror}") from error
