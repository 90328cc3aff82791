"""Attach to a tiny model of every package with experts of the installed transformers, and check what must hold.

Prints a table, one row per package and one column per check, and writes it to docs/families.md. Exit 1 if a check fails
that is not a named exception.

    python scripts/attach_every_family.py [package ...]    # with packages named, nothing is written
"""

import logging
import platform
import sys
import textwrap
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import attach_checks as checks
import torch
import transformers
from attach_checks import CHECKS, EXCEPTIONS, Inapplicable

PAGE = Path(__file__).parent.parent / "docs" / "families.md"

INTRODUCTION = """\
# Model families

*Made by `python scripts/attach_every_family.py`; the same checks are the tests in `tests/test_attach.py`.*

`AuxLosses` and `observe` attach to every package of transformers whose experts are on its experts interface, and to two
beyond it. Each is built tiny with random weights (three layers, 8 experts, fp32), given two rows of 12 tokens of which
the second ends in 4 of padding, and must pass every check below. `-`: there is nothing to check, and why is said at the
end.
"""


def main(names: Sequence[str]) -> int:
    """The table of these packages, or of all."""
    quiet()
    start = time.perf_counter()
    lines, wrong, notes = table([p for p in checks.ATTACHED if not names or p in names])
    refusals, unrefused = refused([p for p in checks.REFUSED if not names or p in names])
    wrong += unrefused
    page = "\n".join([INTRODUCTION, *lines, "", *refusals, *explanations(notes), *wrong, versions(), ""])
    if not names:
        PAGE.write_text(page)
    print("\n".join(page.splitlines()[len(INTRODUCTION.splitlines()) + len(lines) :]))
    print(f"{time.perf_counter() - start:.0f} s", file=sys.stderr)
    return 1 if wrong else 0


def quiet() -> None:
    """Only what is asked for is said."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("moestro").setLevel(logging.ERROR)


def table(packages: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """The rows, printed as they come, and what failed; then the reasons for cells that are not a plain yes."""
    columns = ["package", "model", "MoE layers", "k", "score function", *(check.column for check in CHECKS)]
    lines = [row(columns), row(["---"] * len(columns))]
    print("\n".join(lines), flush=True)
    wrong: list[str] = []
    notes: list[str] = []
    passed = {True: 0, False: 0}
    for package in packages:
        try:
            subject = checks.build(package)
        except Exception as error:
            wrong.append(f"* **{package} cannot be attached to: {type(error).__name__}: {error}**")
            continue
        results = checks.outcomes(subject)
        failures = checks.failures(package, results)
        wrong += [f"* **{package}, {column}: {why}**" for column, why in failures.items()]
        passed[subject.interface] += not failures
        cells = [cell(package, column, why, failures, notes) for column, why in results.items()]
        lines.append(row([package + ("" if subject.interface else " (beyond)"), *facts(subject), *cells]))
        print(lines[-1], flush=True)
    total = {inside: sum((p not in checks.tiny_models.OUTSIDE) == inside for p in packages) for inside in passed}
    lines += ["", f"{passed[True]} of {total[True]} packages on the experts interface pass, and {passed[False]} of "]
    lines[-1] += f"{total[False]} beyond it"
    named = [package for package, _ in EXCEPTIONS if package in packages]
    lines[-1] += f"; with a named exception: {', '.join(named)}." if named else "."
    return lines, wrong, notes


def row(cells: Sequence[str]) -> str:
    """A row of a markdown table."""
    return f"| {' | '.join(cells)} |"


def facts(subject: checks.Subject) -> list[str]:
    """What was attached to."""
    kinds = dict.fromkeys(str(layer.scores) if layer.scores else "looked up" for layer in subject.layers)
    return [
        f"`{type(subject.model).__name__}`",
        str(len(subject.layers)),
        str(subject.layers[0].top_k),
        ", ".join(kinds),
    ]


def cell(package: str, column: str, why: str | None, failures: dict[str, str], notes: list[str]) -> str:
    """What stands for one check of one package; `notes` collects the reasons."""
    if column in failures:
        return "**FAILS**"
    if why is None:
        return "yes"
    if isinstance(why, Inapplicable):
        note, mark = f"`-` under {column}: {why}.", "-"
    else:
        note, mark = f"`*` {package}, {column}: {EXCEPTIONS[package, column]}.", "\\*"
    if note not in notes:
        notes.append(note)
    return mark


def refused(packages: Sequence[str]) -> tuple[list[str], list[str]]:
    """The packages that cannot be watched, and those of them that are not refused properly."""
    wrong = [f"* **{package}: {why}**" for package in packages if (why := checks.is_refused(package))]
    names = ", ".join(packages)
    return [
        f"Outside, and refused by name with a line that says how to describe layers oneself: {names}.",
        "Not here: vitpose, whose experts belong to datasets; nothing routes tokens to them.",
        "",
    ], wrong


def explanations(notes: Sequence[str]) -> list[str]:
    """What each column means."""
    lines = [f"* **{check.column}**: {check.explanation}" for check in CHECKS] + [f"* {note}" for note in notes]
    return ["What the columns say:", "", *(textwrap.fill(line, 120, subsequent_indent="  ") for line in lines), ""]


def versions() -> str:
    """What it was made with."""
    return (
        f"transformers {transformers.__version__}, torch {torch.__version__}, Python {platform.python_version()}, CPU."
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
