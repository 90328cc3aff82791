"""Lock a folder of results: a second process is refused before it writes anything."""

import errno
import fcntl
import logging
import os
import platform
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

from moestro.adapters.ranks import rank
from moestro.errors import Misuse
from moestro.gate.writing import failures_as_os_errors
from moestro.training.ranks import on_first_rank, together

LOCK = ".lock"
SHARED_WITHIN = 10.0
"""Seconds within which every rank must see what the first one wrote."""
ENDS_WITHIN = 2.0
"""Seconds within which a killed process has ended."""
logger = logging.getLogger(__name__)


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Create `folder` and lock it until the context ends; the first rank does so for all ranks.

    The lock is an flock of the operating system, which ends with the process, even if that is killed. On a network file
    system it works between machines only if that system supports flock (NFS since Linux 2.6.12, Lustre mounted with
    `flock`).

    Raises:
        Misuse: the folder cannot be made or written to, another process holds it, or a rank does not see it.
        OSError: raised within the context; it gets the folder as its file name if it has none.
    """
    with ExitStack() as stack:
        token = on_first_rank(lambda: hold(folder, stack))
        together(lambda: check_shared(folder, token))
        with failures_as_os_errors(folder):
            yield


def hold(folder: Path, stack: ExitStack) -> str:
    """Lock the folder until `stack` closes, and return the token that was written into the lock."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = stack.enter_context(os.fdopen(os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666), "r+"))
    except OSError as error:
        raise Misuse(unusable(folder, error)) from None
    try:
        lock(file)
    except BlockingIOError:
        holder = " ".join(file.read(200).split()[:4])
        raise Misuse(
            f"{folder} is in use by another process ({holder}): wait until it ends, or name another folder with --out"
        ) from None
    except OSError as error:
        logger.warning("%s does not support locks (%s): do not start a second process on it", folder, error.strerror)
    token = f"process {os.getpid()} on {platform.node()} {uuid.uuid4()}"
    file.truncate(0)
    file.write(token)
    file.flush()
    return token


def lock(file: IO[str]) -> None:
    """Lock a file. A holder that was killed a moment ago may still be ending: wait for it a little."""
    until = time.monotonic() + ENDS_WITHIN
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                raise
        time.sleep(0.05)


def check_writable(folder: Path) -> None:
    """Raise Misuse unless this process can write to `folder` or create it. Write nothing."""
    try:
        if folder.is_symlink() and not folder.exists():
            folder.stat()  # raises the reason why the link is broken
        above = next(path for path in (folder, *folder.parents) if path.exists())
        if not above.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(above))
        if not os.access(above, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(above))
    except OSError as error:
        raise Misuse(unusable(folder, error)) from None


def unusable(folder: Path, error: OSError) -> str:
    """Return the message for a folder that cannot hold results."""
    return f"--out must be a folder that can be written to: {error.strerror}: {error.filename or folder}"


def check_shared(folder: Path, token: str) -> None:
    """Raise Misuse unless this rank sees the first rank's token: all ranks must share the folder."""
    until = time.monotonic() + SHARED_WITHIN
    while True:
        with suppress(OSError):
            if (folder / LOCK).read_text(encoding="utf-8") == token:
                return
        if time.monotonic() > until:
            raise Misuse(
                f"{folder} must be one folder that all ranks share: rank {rank()} on {platform.node()} does not see "
                f"what rank 0 wrote there within {SHARED_WITHIN:.0f} s"
            )
        time.sleep(0.05)
