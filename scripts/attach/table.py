"""The table in docs/families.md: a row for each package, a column for each check, and what is said below it."""

import sys
import textwrap
import time
from collections import defaultdict
from itertools import zip_longest

import tiny_models

from attach.building import build
from attach.checks import CHECKS, EXCEPTIONS, failures, outcomes
from attach.subject import Inapplicable, Subject


class Table:
    """The packages that were checked, and how."""

    def __init__(self) -> None:
        self.rows = [["package", "k", "score", *(check.column for check in CHECKS), "class"]]
        self.passed: dict[str, bool] = {}
        self.footnotes: list[str] = []
        self.inapplicable: dict[str, set[str]] = defaultdict(set)
        """By column, why there was nothing to check."""

    def add(self, package: str) -> None:
        """Check a package."""
        start = time.perf_counter()
        try:
            subject = build(package)
        except Exception as error:
            row, wrong = [self.failure(package, f"{type(error).__name__}: {error}")], {"build": ""}
        else:
            results = outcomes(subject)
            wrong = failures(package, results)
            cells = [self.cell(package, column, why, wrong.get(column)) for column, why in results.items()]
            row = [*facts(subject), *cells, f"`{type(subject.model).__name__}`"]
        self.rows.append([package, *row])
        self.passed[package] = not wrong
        print(f"{package:22} {time.perf_counter() - start:5.1f} s  {' '.join(wrong)}", file=sys.stderr, flush=True)

    def cell(self, package: str, column: str, why: str | None, wrong: str | None) -> str:
        """What stands for one check of one package."""
        if wrong is not None:
            return self.failure(package, f"{column}: {wrong}")
        if why is None:
            return "✓"
        if isinstance(why, Inapplicable):
            self.inapplicable[column].add(why)
            return "-"
        return self.mark("no", f"{package}: {EXCEPTIONS[package, column]}.")

    def failure(self, package: str, why: str) -> str:
        """What stands for what must not be."""
        return self.mark("**FAILS**", f"{package}, {why}")

    def mark(self, text: str, note: str) -> str:
        """A text with a footnote."""
        self.footnotes.append(note)
        return f"{text}[^{len(self.footnotes)}]"

    def lines(self) -> list[str]:
        """The table in markdown; its last column is not padded."""
        widths = [max(map(len, column)) for column in zip_longest(*self.rows, fillvalue="")]
        widths[-1] = 3
        rows = [self.rows[0], ["-" * width for width in widths], *self.rows[1:]]
        return [f"| {' | '.join(map(str.ljust, row, widths))} |" for row in rows]

    def summary(self) -> str:
        """How many pass."""
        counts = []
        for beyond in (False, True):
            passed = [good for package, good in self.passed.items() if (package in tiny_models.OUTSIDE) == beyond]
            counts.append(f"{sum(passed)} of {len(passed)}")
        named = [package for package, _ in EXCEPTIONS if self.passed.get(package)]
        exceptions = f"; with a named exception: {', '.join(named)}" if named else ""
        return f"{counts[0]} packages on the experts interface pass, and {counts[1]} beyond it{exceptions}."

    def explanations(self) -> list[str]:
        """What each column means."""
        lines = []
        for check in CHECKS:
            reasons = sorted(self.inapplicable[check.column])
            nothing = f" `-`: {'; '.join(reasons)}." if reasons else ""
            lines.append(fill(f"* **{check.column}**: {check.explanation}{nothing}", 2))
        return lines

    def notes(self) -> list[str]:
        """The footnotes."""
        return [fill(f"[^{number}]: {note}", 4) for number, note in enumerate(self.footnotes, 1)]


def facts(subject: Subject) -> list[str]:
    """How many experts a token has, and how routers score them."""
    kinds = dict.fromkeys(str(layer.scores) if layer.scores else "looked up" for layer in subject.layers)
    return [str(subject.layers[0].top_k), ", ".join(kinds)]


def fill(text: str, indent: int = 0) -> str:
    """A paragraph."""
    return textwrap.fill(text, 120, subsequent_indent=" " * indent, break_on_hyphens=False, break_long_words=False)
