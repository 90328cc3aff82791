"""Turn paths that users type into `Path`."""

from pathlib import Path

from moestro.errors import Misuse
from moestro.gate.visible import said


def user_path(text: str | Path) -> Path:
    """Return the path that a user typed, with ~ expanded. Raise Misuse if the system cannot look it up."""
    if not str(text):
        raise Misuse("a path must not be empty, got ''")
    try:
        path = Path(text).expanduser()
        path.stat()
    except FileNotFoundError:
        return path
    except (OSError, RuntimeError, ValueError) as error:  # no such user, names too long, NUL, loops, no permission
        reason = getattr(error, "strerror", None) or said(error)
        raise Misuse(f"{text} cannot be used as a path: {reason}") from error
    return path
