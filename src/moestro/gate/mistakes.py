"""Say what is wrong with a command line in our words, given tyro's message about it."""

import re
from collections.abc import Callable, Sequence
from difflib import get_close_matches

from moestro.gate.ranges import either, shown

KINDS = {
    "int()": "a whole number, such as 20_000",
    "float()": "a number",
    "could not convert string to float": "a number",
}
"""What a flag must be, by the words of Python's own error."""


def in_our_words(mistake: str, typed: Sequence[str], commands: Sequence[str], flags: Callable[[], list[str]]) -> str:
    """Return the mistake in one sentence; tyro's own words if it is of no known kind.

    Args:
        mistake: tyro's message, without its advice.
        typed: the words of the command line.
        commands: the known commands.
        flags: returns the flags of the command that was typed.
    """
    if found := re.search(r"Error parsing (--[\w-]+): (.*)", mistake):
        return wrong_value(found[1], found[2], typed)
    if found := re.search(r"invalid choice (.*) for argument '(--[\w-]+)'\. Expected one of \((.*)\)", mistake):
        choices = sorted({choice.strip("' ") for choice in found[3].split(",")} - {"None", ""})
        return f"{found[2]} must be {either(choices)}, got {found[1]}"
    if found := re.search(r"Missing value for argument '(--[\w-]+)'", mistake):
        return f"{found[1]} needs a value"
    if found := re.search(r"Required options Missing from moestro \w+: \w+ ([^;]*)", mistake):
        needed = found[1].strip()
        return f"{typed[0]} needs {needed[:1].lower()}{needed[1:]}"
    if "Missing subcommand" in mistake:
        return f"a command must follow: {either(list(commands))}"
    if "Unrecognized" in mistake:
        return unknown_word(mistake, typed, commands, flags)
    return mistake


def wrong_value(flag: str, reason: str, typed: Sequence[str]) -> str:
    """Say what the value of a flag must be."""
    kind = next((kind for words, kind in KINDS.items() if words in reason), None)
    got = next(iter(re.findall(r"\['(.*?)'\]", reason) or re.findall(r": '(.*)'$", reason)), None)
    if kind is None and flag == "--sweep":
        kind = "one or more numbers"
    if kind is None or got is None:
        return f"{flag}: {reason}"
    return f"{flag} must be {kind}, got {shown(got)}"


def unknown_word(mistake: str, typed: Sequence[str], commands: Sequence[str], flags: Callable[[], list[str]]) -> str:
    """Name the word that the command line does not know, and a known one that is close to it."""
    if not typed or typed[0] not in commands:
        word = typed[0] if typed else ""
        return f"unknown command {shown(word)}{close(word, commands)}; the commands are {', '.join(commands)}"
    first = re.split(r"[, ]", mistake.partition("options: ")[2])[0]
    known = flags()
    unknown = [w for w in typed[1:] if w.startswith("-") and w.partition("=")[0].replace("_", "-") not in known]
    word = next((w for w in unknown if w.partition("=")[0].lstrip("-") == first.lstrip("-").partition("=")[0]), None)
    if word is None:
        return f"{typed[0]} does not know what to do with {shown(first)}"
    return f"{typed[0]} has no option {word.partition('=')[0]}{close(word.partition('=')[0], known)}"


def close(word: str, known: Sequence[str]) -> str:
    """Return ` (did you mean ...?)` if a known word is close to `word`, else nothing."""
    found = get_close_matches(word, known, n=1)
    return f" (did you mean {found[0]}?)" if found else ""
