"""Folders that are built once, whoever is killed meanwhile and however many build at the same time."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from moestro.errors import Misuse

CHECKSUMS = "checksums.json"
_BUILDING = ".building-"
_ABANDONED_AFTER = 24 * 3600  # seconds


def default_cache_dir() -> Path:
    """`$MOESTRO_CACHE`, else `~/.cache/moestro`."""
    return Path(os.environ.get("MOESTRO_CACHE") or "~/.cache/moestro").expanduser()


def cached_folder(folder: Path, build: Callable[[Path], None]) -> Path:
    """Return `folder` as `build` fills it, building it only where it is not there whole.

    `build` fills a temporary folder beside it, which is renamed when complete: a killed build leaves nothing that
    could be taken for a result. Of several processes that build at once, the first to rename wins and the others
    use its result. A folder whose files do not match their checksums is built again.
    """
    if is_whole(folder):
        return folder
    workplace = _new_workplace(folder.parent)
    try:
        content = workplace / "content"
        content.mkdir()
        build(content)
        (content / CHECKSUMS).write_text(json.dumps(_checksums(content)))
        _put(content, folder)
    finally:
        shutil.rmtree(workplace, ignore_errors=True)
    return folder


def is_whole(folder: Path) -> bool:
    """Whether every file that was written is there and unchanged."""
    try:
        return json.loads((folder / CHECKSUMS).read_text()) == _checksums(folder)
    except (OSError, ValueError):
        return False


def _checksums(folder: Path) -> dict[str, str]:
    sums = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != CHECKSUMS:
            with path.open("rb") as stream:
                sums[path.relative_to(folder).as_posix()] = hashlib.file_digest(stream, "sha256").hexdigest()
    return sums


def _new_workplace(parent: Path) -> Path:
    """A private folder beside the results; those that killed processes left behind are cleared away after a day."""
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for old in parent.glob(f"{_BUILDING}*"):
            if time.time() - old.stat().st_mtime > _ABANDONED_AFTER:
                shutil.rmtree(old, ignore_errors=True)
        return Path(tempfile.mkdtemp(prefix=_BUILDING, dir=parent))
    except OSError as error:
        raise Misuse(f"the cache folder {parent} must be writable (or set MOESTRO_CACHE): {error}") from error


def _put(content: Path, folder: Path) -> None:
    """Rename finished content to its place, unless another process has been faster; a broken folder there gives way."""
    try:
        os.rename(content, folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        if not is_whole(folder):
            with contextlib.suppress(FileNotFoundError):  # another process has cleared it away
                os.rename(folder, content.with_name("broken"))
            _put(content, folder)
