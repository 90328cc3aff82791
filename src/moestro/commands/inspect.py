"""`moestro inspect`."""

from pathlib import Path
from typing import Annotated

import tyro

from moestro.errors import Misuse
from moestro.gate.ranges import Bytes, check
from moestro.inspection.running import DEFAULT_MAX_BYTES, Running, check_number

RUNNING = Running()


def inspect(
    checkpoints: tyro.conf.Positional[tuple[str, ...]],
    /,
    data: tuple[str, ...] = (),
    text_column: str = "text",
    max_bytes: int = DEFAULT_MAX_BYTES,
    out: Path | None = None,
    running: Annotated[Running, tyro.conf.arg(name="")] = RUNNING,
) -> None:
    """Print what one or two checkpoints are and which losses apply; with --data, report how they route a text.

    Args:
        checkpoints: One or two: a folder, a run of `moestro train`, an adapter of PEFT, or a name on the hub.
        data: Files, folders, globs or hf:NAME; LABEL=PATH names its domain, PATH::COLUMN its text column.
        text_column: Column that holds the text in JSON, CSV, TSV, Parquet and Arrow files; a+b joins two columns.
        max_bytes: Largest number of bytes read of each domain.
        out: Folder of report.html and routing.json. Default: runs/inspect- and the checkpoints' names.
    """
    if running.robustness and not data:
        raise Misuse("--robustness needs a text to run the model on: name it with --data")
    check_number(checkpoints)
    check("max_bytes", max_bytes, Bytes)
    from moestro.commands.work.inspect import inspect_checkpoints

    inspect_checkpoints(checkpoints, data, text_column=text_column, max_bytes=max_bytes, out=out, running=running)
