"""How a script ends that was asked for what cannot be: one line, and exit code 2."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from moestro import Misuse


@contextmanager
def one_line() -> Iterator[None]:
    """Print a mistake of the user, or a file that cannot be read, as one line instead of a traceback."""
    try:
        yield
    except (Misuse, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
