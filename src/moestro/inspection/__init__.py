"""What a checkpoint is, what can be trained of its routing, and how it routes a text."""

from moestro.inspection.checkpoints import Checkpoint, find, load, on_meta, stored_dtype
from moestro.inspection.findings import Finding, describe
from moestro.inspection.measuring import Conditions, Measured, RoutingStudy, study
from moestro.inspection.robustness import Robustness, RobustnessTest, Scope
from moestro.inspection.texts import Text, read_text

__all__ = [
    "Checkpoint",
    "Conditions",
    "Finding",
    "Measured",
    "Robustness",
    "RobustnessTest",
    "RoutingStudy",
    "Scope",
    "Text",
    "describe",
    "find",
    "load",
    "on_meta",
    "read_text",
    "stored_dtype",
    "study",
]
