"""Attach to a tiny model of every package with experts of the installed transformers, and check what must hold.

Prints a page with a table, one row per package and one column per check, and writes it to docs/families.md. Exit 1 if a
check fails that is not a named exception.

    python scripts/attach_every_family.py [package ...]    # with packages named, nothing is written
"""

import argparse
import logging
import platform
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from attach.checks import ATTACHED, REFUSED, is_refused
from attach.table import Table, fill

PAGE = Path(__file__).parent.parent / "docs" / "families.md"

INTRODUCTION = """\
# Model families

*Made by `python scripts/attach_every_family.py`; the same checks are the tests in `tests/test_attach.py`.*

`AuxLosses` and `observe` attach to every package of transformers whose experts are on its experts interface, and to two
beyond it. Each is built tiny with random weights (three layers, 8 experts, fp32), given two rows of 12 tokens of which
the second ends in 4 of padding, and must pass every check below. `-` is where there is nothing to check.
"""


def main(names: Sequence[str]) -> int:
    """The page of these packages, or of all."""
    quiet()
    if unknown := sorted(set(names) - {*ATTACHED, *REFUSED}):
        print(f"error: packages must be among those of docs/families.md, got {unknown[0]}", file=sys.stderr)
        return 2
    start = time.perf_counter()
    table = Table()
    for package in ATTACHED:
        if not names or package in names:
            table.add(package)
    unrefused = {p: why for p in REFUSED if (not names or p in names) and (why := is_refused(p))}
    refused = [f"{p} {table.failure(p, unrefused[p])}" if p in unrefused else p for p in REFUSED]
    page = [INTRODUCTION, *table.lines(), "", table.summary(), "", "What the columns say:", "", *table.explanations()]
    page += ["", outside(refused), "", versions(), *(["", *table.notes()] if table.footnotes else []), ""]
    print("\n".join(page))
    if not names:
        PAGE.write_text("\n".join(page))
    print(f"{time.perf_counter() - start:.0f} s", file=sys.stderr)
    return 0 if all(table.passed.values()) and not unrefused else 1


def quiet() -> None:
    """Only what is asked for is said."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("moestro").setLevel(logging.ERROR)


def outside(packages: Sequence[str]) -> str:
    """The packages that cannot be watched."""
    return fill(
        "Outside, and refused by name with a line that says how to describe layers oneself: "
        f"{', '.join(packages)}. Not here: vitpose, whose experts belong to datasets; nothing routes tokens to them."
    )


def versions() -> str:
    """What it was made with."""
    return (
        f"transformers {transformers.__version__}, torch {torch.__version__}, Python {platform.python_version()}, CPU."
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", nargs="*")
    raise SystemExit(main(parser.parse_args().package))
