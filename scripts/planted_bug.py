"""What a planted bug is."""

from typing import NamedTuple


class Bug(NamedTuple):
    """One wrong line."""

    name: str
    file: str
    right: str
    wrong: str
    tests: str
