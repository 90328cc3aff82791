"""Turn the errors of libraries that cannot write, for example to a full disk, into the system's OSError."""

import errno
import os
import re
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

FULL = 2**20
"""A disk with fewer free bytes is said to be full where a library does not name the reason."""
TORCH_WRITER = ("PytorchStreamWriter", "inline_container", "unexpected pos")


@contextmanager
def failures_as_os_errors(folder: Path) -> Iterator[None]:
    """Turn a library's failed write within the context into OSError; `folder` is its file name if it has none.

    safetensors, tokenizers, torch.save and SQLite raise error types of their own, with the system's error number in the
    text or not at all.
    """
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:  # errors of a full disk name no file
            error.filename = str(folder)
        raise
    except Exception as error:
        if (code := error_number(error)) is None:
            raise
        code = errno.ENOSPC if code == errno.EIO and is_full(folder) else code
        raise OSError(code, os.strerror(code), str(folder)) from error


def is_full(folder: Path) -> bool:
    """Return whether less than `FULL` bytes are free on the disk that holds the folder or will hold it."""
    place = next((place for place in (folder, *folder.parents) if place.exists()), None)
    return place is not None and shutil.disk_usage(place).free < FULL


def error_number(error: Exception) -> int | None:
    """Return the system's error number of a library's failed write (EIO if unknown); None for any other error."""
    text = str(error)
    if isinstance(error, sqlite3.Error):
        return errno.ENOSPC if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL else errno.EIO
    if isinstance(error, RuntimeError):
        return errno.EIO if any(name in text for name in TORCH_WRITER) else None
    if isinstance(error, SafetensorError) or type(error) is Exception:  # tokenizers raises a bare Exception
        number = re.search(r"os error (\d+)", text)
        return int(number.group(1)) if number else errno.EIO if isinstance(error, SafetensorError) else None
    return None
