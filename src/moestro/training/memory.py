"""Measure the peak memory of training, if the system reports it."""

import resource
import sys
from pathlib import Path

import torch

STATUS, FORGET, PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs"), "VmHWM:"


def forget_peak() -> bool:
    """Reset the peak if the system can; return False if the peak must not be reported.

    Linux resets it through /proc, which containers may mount read-only: False. Other systems cannot reset it, and their
    peak includes the time before training: True.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return True
    if sys.platform != "linux":
        return True
    try:
        FORGET.write_text("5")
    except OSError:
        return False
    return True


def peak_memory_bytes() -> int | None:
    """Return the peak memory in bytes of the CUDA device, else of this process; None if the system hides it."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if sys.platform != "linux":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        figures = STATUS.read_text().partition(PEAK)[2].split()
    except OSError:
        return None
    return 1024 * int(figures[0]) if figures else None
