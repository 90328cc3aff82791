"""Folders that are built exactly once, despite crashes and concurrent builders."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from moestro.errors import Misuse
from moestro.gate.paths import user_path
from moestro.gate.writing import failures_as_os_errors

CHECKSUMS = "checksums.json"
_BUILDING = ".building-"
_LOCK = "lock"


def default_cache_dir() -> Path:
    """Return `$MOESTRO_CACHE`, else `~/.cache/moestro`."""
    return user_path(os.environ.get("MOESTRO_CACHE") or "~/.cache/moestro")


def cached_folder(folder: Path, build: Callable[[Path], None], *, expected: Iterable[str] = ()) -> Path:
    """Return `folder` as `build` fills it; build it only if it does not exist intact.

    `build` fills a temporary folder, which is sealed and renamed when complete, so a killed build leaves nothing that
    looks like a result. Other processes wait for the one that builds, and use its result.
    """
    if is_whole(folder):
        return folder
    with workplace(folder.parent, folder.name) as place:
        if not is_whole(folder):
            content = place / "content"
            shutil.rmtree(content, ignore_errors=True)
            content.mkdir()
            build(content)
            seal(content, expected)
            put(content, folder)
    return folder


@contextlib.contextmanager
def workplace(parent: Path, name: str) -> Iterator[Path]:
    """Lock a working folder in `parent` for this process; wait while another process holds it.

    A killed process leaves its folder behind, and the next process with the same name continues in it. Unlocked folders
    of other names are removed. The folder is removed when the context ends, unless the user interrupts.
    """
    place = parent / f"{_BUILDING}{name}"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        lock = _locked(place)
        _clear_abandoned(parent)
    except OSError as error:
        raise Misuse(f"the cache folder {parent} must be writable (or set MOESTRO_CACHE): {error}") from error
    interrupted = False
    try:
        with failures_as_os_errors(parent):
            yield place
    except KeyboardInterrupt:
        interrupted = True
        raise
    finally:
        if not interrupted:
            shutil.rmtree(place, ignore_errors=True)  # while still locked, so no other process uses it
        os.close(lock)


def seal(content: Path, expected: Iterable[str] = ()) -> None:
    """Record checksum, size and modification time of every file.

    Raises:
        Misuse: an expected file is missing.
    """
    lost = [name for name in expected if not (content / name).is_file()]
    if lost:
        raise Misuse(f"the cache folder must be left alone while it is built: {', '.join(lost)} in {content} is gone")
    replace_text(content / CHECKSUMS, json.dumps({name: _facts(path) for name, path in _files(content)}))


def is_whole(folder: Path) -> bool:
    """Return whether every sealed file exists and is unchanged.

    A file with the same size and modification time counts as unchanged; one with another time is read and compared.
    """
    try:
        sealed = json.loads((folder / CHECKSUMS).read_text())
        files = dict(_files(folder))
        return files.keys() == sealed.keys() and all(_is_same(path, sealed[name]) for name, path in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


def put(content: Path, folder: Path) -> None:
    """Rename finished content to `folder`, unless another process was faster; replace a damaged folder."""
    try:
        os.rename(content, folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        if not is_whole(folder):
            with contextlib.suppress(FileNotFoundError):  # another process has cleared it away
                os.rename(folder, content.with_name("broken"))
            put(content, folder)


def replace_text(path: Path, text: str) -> None:
    """Replace a file atomically: a reader finds the old text or the new one."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    temporary.write_text(text)
    os.replace(temporary, path)


def _locked(place: Path, *, wait: bool = True) -> int:
    """Create and lock `place`; return the lock, which ends when it is closed or the process dies."""
    while True:
        place.mkdir(exist_ok=True)
        try:
            lock = os.open(place / _LOCK, os.O_RDWR | os.O_CREAT)
        except FileNotFoundError:
            if (place / _LOCK).is_symlink():  # to a folder that does not exist
                raise
            continue  # another process has removed the folder since it was made here
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if _is_current(lock, place / _LOCK):
                return lock
        except OSError:
            os.close(lock)
            raise
        os.close(lock)  # the previous holder has removed the folder


def _is_current(lock: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(lock), path.stat())
    except FileNotFoundError:
        return False


def _clear_abandoned(parent: Path) -> None:
    """Remove unlocked working folders, which killed builders left behind."""
    for place in parent.glob(f"{_BUILDING}*"):
        with contextlib.suppress(BlockingIOError, FileNotFoundError):
            lock = _locked(place, wait=False)
            shutil.rmtree(place, ignore_errors=True)
            os.close(lock)


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != CHECKSUMS:
            yield path.relative_to(folder).as_posix(), path


def _facts(path: Path) -> dict[str, Any]:
    status = path.stat()
    return {"sha256": _checksum(path), "size": status.st_size, "changed": status.st_mtime_ns}


def _checksum(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _is_same(path: Path, sealed: dict[str, Any]) -> bool:
    status = path.stat()
    if status.st_size != sealed["size"]:
        return False
    return status.st_mtime_ns == sealed["changed"] or _checksum(path) == sealed["sha256"]
