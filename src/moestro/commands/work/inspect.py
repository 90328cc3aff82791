"""The work of `moestro inspect`."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from moestro.commands.folders import slug
from moestro.gate.libraries import quiet
from moestro.inspection.checkpoints import find
from moestro.inspection.findings import describe
from moestro.inspection.running import Running
from moestro.inspection.texts import read_text
from moestro.report.printing import say
from moestro.report.routing_terminal import print_finding, print_study
from moestro.routing_study import study_routing
from moestro.training.checkpoints import verify_if_marked


def inspect_checkpoints(
    checkpoints: Sequence[str],
    data: Sequence[str],
    *,
    text_column: str,
    max_bytes: int,
    out: Path | None,
    running: Running,
) -> None:
    """Print what the checkpoints are and, with data, write and print the study of their routing."""
    quiet()
    found = find(checkpoints)
    for checkpoint in found:
        verify_if_marked(Path(checkpoint.place))
    text = read_text(data, text_column=text_column, max_bytes=max_bytes) if data else None
    findings = [describe(checkpoint) for checkpoint in found]
    console = Console()
    for finding in findings:
        print_finding(finding, console)
    if text is None:
        return
    folder = out or Path("runs") / f"inspect-{slug([checkpoint.name for checkpoint in found])}"
    result = study_routing(found, findings, text, running, folder, command=shlex.join(["moestro", *sys.argv[1:]]))
    print_study(result, console)
    print()
    say(f"report: {folder / 'report.html'}")
