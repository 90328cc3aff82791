"""`moestro inspect --data`: models run over a text on this machine; routing.json and report.html."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

import moestro
from moestro.gate.ranges import BatchTokens, Length, check_fields
from moestro.inspection import Checkpoint, Conditions, Finding, RoutingStudy, Text, stored_dtype, study
from moestro.records import write_record
from moestro.report.routing_report import write_routing_report
from moestro.training.environment import environment
from moestro.training.owner import owned
from moestro.training.precision import faster_dtype
from moestro.training.train import Interrupted


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """How to run the models."""

    tokenizer: str | None = None
    """Folder or name of a tokenizer of transformers. Default: each checkpoint's own."""
    sequence_length: Length | None = None
    """Default: 512, or what the model can take."""
    batch_tokens: BatchTokens = 4096
    """Tokens that run at once; MaxVio within a batch depends on it."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the computation. auto: bfloat16 where this machine gains by it."""
    robustness: bool = False
    """Also run the text with each token's first expert disabled, in every layer singly and in all, with random experts
    in its place, and with noise on the router's logits: one pass for each."""

    def __post_init__(self) -> None:
        check_fields(self)


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
