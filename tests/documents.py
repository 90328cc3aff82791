"""README and docs as tests read them: their commands, their Python, their links."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
LOG = ROOT / "docs" / "log.md"
PAGES = [ROOT / "README.md", *(page for page in sorted((ROOT / "docs").rglob("*.md")) if page != LOG)]
"""Not the log, whose commands are history."""

FENCE = re.compile(r"```(\w*)\n(.*?)```", re.DOTALL)
PROGRAMS = ("moestro", "python", "make")


@dataclass(frozen=True)
class Passage:
    """A piece of code of a page."""

    page: Path
    text: str

    @property
    def title(self) -> str:
        """The page's name and the code's first words."""
        return f"{self.page.stem}: {self.text[:60]}"


def python_blocks() -> list[Passage]:
    """Every block of Python."""
    return [Passage(page, text) for page in PAGES for kind, text in FENCE.findall(page.read_text()) if kind == "python"]


def block_commands() -> list[Passage]:
    """Every command in a block of code: a line that begins with a program, and the lines it goes on in."""
    return [
        Passage(page, command)
        for page in PAGES
        for kind, text in FENCE.findall(page.read_text())
        if kind != "python"
        for line in text.replace("\\\n", " ").splitlines()
        if (command := without_comment(line)).split(" ")[0] in PROGRAMS
    ]


def inline_commands() -> list[Passage]:
    """Every command within a sentence."""
    spans = [
        Passage(page, without_comment(" ".join(span.split())))
        for page in PAGES
        for span in re.findall(r"`([^`]+)`", FENCE.sub("", page.read_text()))
    ]
    return [span for span in spans if span.text.split(" ")[0] in PROGRAMS and " " in span.text]


def without_comment(line: str) -> str:
    """The command alone, without the virtual environment's folder."""
    return line.split("  #")[0].strip().removeprefix(".venv/bin/")


def flags(command: str) -> list[str]:
    """The flags that a command names."""
    return [word.partition("=")[0] for word in shlex.split(command) if word.startswith("--")]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as code hosts make them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
