"""`moestro inspect --data`: models run over a text on this machine; routing.json and report.html."""

from collections.abc import Sequence
from pathlib import Path

import torch

import moestro
from moestro.errors import Interrupted
from moestro.inspection.checkpoints import Checkpoint, stored_dtype
from moestro.inspection.findings import Finding
from moestro.inspection.measuring import Conditions, RoutingStudy, study
from moestro.inspection.running import Running
from moestro.inspection.texts import Text
from moestro.records import write_record
from moestro.report.routing_report import write_routing_report
from moestro.training.environment import environment
from moestro.training.owner import owned
from moestro.training.precision import faster_dtype


def study_routing(
    found: Sequence[Checkpoint],
    findings: Sequence[Finding],
    text: Text,
    running: Running,
    folder: Path,
    *,
    command: str,
) -> RoutingStudy:
    """Run the checkpoints over the text and write the study to `folder`. Raises Interrupted on Ctrl-C."""
    with owned(folder):
        try:
            result = study(
                found,
                findings,
                text,
                conditions_here(found, running),
                version=moestro.__version__,
                command=command,
                environment=environment(),
            )
        except KeyboardInterrupt:
            raise Interrupted("stopped: no report was written") from None
        write_record(result, folder / "routing.json")
        write_routing_report(result, folder / "report.html")
    return result


def conditions_here(found: Sequence[Checkpoint], running: Running) -> Conditions:
    """On this machine: weights as they are stored, unless they are of 16 bits and this machine is slow with those."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = faster_dtype(device)[0] if running.dtype == "auto" else getattr(torch, running.dtype)
    stored = [stored_dtype(checkpoint) for checkpoint in found]
    return Conditions(
        tokenizer=running.tokenizer,
        sequence_length=running.sequence_length,
        batch_tokens=running.batch_tokens,
        dtypes=tuple(torch.float32 if dtype == torch.float32 else of_file for of_file in stored),
        autocast=dtype == torch.bfloat16,
        robustness=running.robustness,
        device=device,
    )
