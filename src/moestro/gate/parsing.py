"""Parse the command line into one call, or raise Misuse with one line of explanation."""

import io
import re
import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr
from functools import partial, wraps
from typing import Any

import tyro

from moestro.errors import Misuse

_FRAME = "│╭╮╰╯─┌┐└┘|+-• "
_HELP = re.compile(r"Argument helptext:|For full helptext|Perhaps you meant|Similar|Are you sure")
"""The first words of the advice that follows the mistake in tyro's message."""


def parsed(commands: Mapping[str, Callable[..., None]], description: str) -> Callable[[], None]:
    """Parse the command line of `moestro` and return the requested call without making it.

    Raises:
        Misuse: the command line cannot be parsed; the message is the text of tyro's box in one line.
        SystemExit: help was asked for and printed.
    """
    box = io.StringIO()
    try:
        with redirect_stderr(box):
            return tyro.extras.subcommand_cli_from_dict(
                {name: deferred(command) for name, command in commands.items()},
                prog="moestro",
                description=description,
                config=(tyro.conf.OmitArgPrefixes,),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
    raise Misuse(in_one_line(box.getvalue()))


def deferred(command: Callable[..., None]) -> Callable[..., Any]:
    """Return a function with the signature of `command` that returns the bound call."""

    @wraps(command)
    def bind(*args: Any, **options: Any) -> Any:
        return partial(command, *args, **options)

    return bind


def in_one_line(box: str) -> str:
    """Return the mistake that tyro reports in `box`, without its frame and advice, and name the command for help."""
    words = " ".join(line.strip(_FRAME) for line in box.splitlines())
    mistake = " ".join(_HELP.split(words)[0].split())
    typed = next((word for word in sys.argv[1:2] if word.isalpha()), "")
    return f"{mistake} (see moestro {typed} --help)" if typed else f"{mistake} (see moestro --help)"
