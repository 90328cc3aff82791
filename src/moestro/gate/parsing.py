"""Parse the command line into one call, or raise Misuse with one line of explanation."""

import io
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from functools import partial, wraps
from itertools import pairwise
from typing import Any

import tyro

from moestro.errors import Misuse
from moestro.gate.mistakes import in_our_words

_FRAME = "│╭╮╰╯─┌┐└┘|+-• "
_HELP = re.compile(r"Argument helptext:|For full helptext|Perhaps you meant|Similar|Are you sure")
"""The first words of the advice that follows the mistake in tyro's message."""


def parsed(commands: Mapping[str, Callable[..., None]], description: str) -> Callable[[], None]:
    """Parse the command line of `moestro` and return the requested call without making it.

    Raises:
        Misuse: the command line cannot be parsed; the message says in one line why.
        SystemExit: help was asked for and printed.
    """
    words = sys.argv[1:]
    refuse_flags_without_values(words)
    box = io.StringIO()
    try:
        with redirect_stderr(box):
            return call(commands, description, words)
    except SystemExit as stop:
        if not stop.code:
            raise
    command = words[0] if words and words[0] in commands else ""

    def flags() -> list[str]:
        printed = io.StringIO()
        with redirect_stdout(printed), suppress(SystemExit):
            call(commands, description, [command, "--help"])
        return sorted(set(re.findall(r"--[a-z][\w-]*", printed.getvalue())))

    said = in_our_words(without_frame(box.getvalue()), words, list(commands), flags)
    raise Misuse(f"{said} (see moestro{' ' if command else ''}{command} --help)")


def call(commands: Mapping[str, Callable[..., None]], description: str, words: Sequence[str]) -> Callable[[], None]:
    """Return the call that the words ask for; on a mistake tyro prints a box on stderr and exits."""
    return tyro.extras.subcommand_cli_from_dict(
        {name: deferred(command) for name, command in commands.items()},
        prog="moestro",
        description=description,
        args=list(words),
        config=(tyro.conf.OmitArgPrefixes,),
    )


SEVERAL_VALUES = ("--data", "--set", "--report-to")
"""Flags that take several values. tyro takes one without any, as an unset shell variable leaves it, for its default."""


def refuse_flags_without_values(words: Sequence[str]) -> None:
    """Raise Misuse if a flag that takes several values stands without one."""
    for word, following in pairwise([*words, "--"]):
        if word in SEVERAL_VALUES and following.startswith("--"):
            raise Misuse(f"{word} needs at least one value")


def deferred(command: Callable[..., None]) -> Callable[..., Any]:
    """Return a function with the signature of `command` that returns the bound call."""

    @wraps(command)
    def bind(*args: Any, **options: Any) -> Any:
        return partial(command, *args, **options)

    return bind


def without_frame(box: str) -> str:
    """Return the mistake that tyro reports in `box`, without its frame and advice."""
    words = " ".join(line.strip(_FRAME) for line in box.splitlines())
    return " ".join(_HELP.split(words)[0].split())
